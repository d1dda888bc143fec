"""The closed formulas for what autograd keeps, against what torch keeps (every tensor saved in a real forward, each storage
once), for each switch that changes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.config import load
from model import activations, plan, targets
from model.losses.reduce import SingleProcess
from model.pretrain import Student
from model.teacher import make_teacher
from pipeline.config import PretrainConfig
from tests.synthetic_batch import STATISTICS, make_batch

BASE = [
    "data.views_global={hr_px: 64, series_px: 8, s2_dates: 2, s1_dates: 1}",
    "data.views_local={hr_px: 32, series_px: 4, s2_dates: 2, s1_dates: 1}", "model.size=debug",
    "objective={prototypes: 256, head_hidden: 128, head_bottleneck: 32, queries: 4}", "train.precision=fp32",
]  # fmt: skip
SITES = 2


def saved_bytes(config: PretrainConfig) -> int:
    """Bytes that one forward of the student leaves behind for its backward, parameters not counted."""
    torch.manual_seed(0)
    student = Student(config.model, config.objective, STATISTICS)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype)
    teacher = make_teacher(student)
    view = config.data.views_global
    canvas = {"hr": view.hr_px, "s2": view.series_px, "s1": view.series_px}
    batch = make_batch(SITES, canvas=canvas, dates={"hr": 1, "s2": view.s2_dates, "s1": view.s1_dates}, missing=0.0)
    target = teacher.center([teacher.teacher_forward(batch)], 0, SingleProcess())[0]
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    student.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(batch, target)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ([], 0.03),
        (["model.activation_checkpointing=true"], 0.05),
        (["train.precision=bf16"], 0.03),
        (["model.moe.experts=0", "model.merge={hr: [false, true, true]}"], 0.03),
        (["model.moe.top_k=2", "model.moe.blocks=3", "model.prompts=0"], 0.03),
        (["model.position=learned", "model.fusion.depth=3", "model.fusion.dim=64"], 0.05),
        (["objective.qsacl_weight=0", "model.fusion.depth=0"], 0.03),
        (["model.fusion.kind=frames", "model.fusion.depth=2"], 0.05),
        (["objective.heads=per_level", "objective.prototypes=2048"], 0.03),
    ],
    ids=str,
)
def test_formula_is_what_torch_keeps(overrides: list[str], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the few padded slots that spare a kernel: nothing at real sizes, much at these; and with every row of the heads, also
    those that are left out because nothing of v lies under them: the formulas are for the fullest step."""
    monkeypatch.setattr(targets, "on_host", lambda masks: [np.ones(mask.shape, bool) for mask in masks])
    monkeypatch.setattr(plan, "PADDED_SLOTS", 0)
    monkeypatch.setattr(plan, "PADDED_SCORES", 0)
    config = load(PretrainConfig, None, [*BASE, *overrides])
    figures = activations.table(config, fused=False)
    checkpointing = config.model.activation_checkpointing
    fixed = figures["fixed"] + (0 if checkpointing else figures["fixed_in_blocks"])
    predicted = SITES * figures["checkpointed" if checkpointing else "full"] + fixed
    assert predicted == pytest.approx(saved_bytes(config), rel=tolerance)


def test_parts_add_up() -> None:
    figures = activations.table(load(PretrainConfig, None, BASE), fused=False)
    assert sum(figures["by"].values()) == pytest.approx(figures["full"])


def test_routed_elements_by_hand() -> None:
    """One MoE block in stage 4 (dim 128), hr 16 px -> 4 -> 2 -> 1 -> 1 tokens, s2 and s1 2 x 2 tokens, no prompts."""
    view = "{hr_px: 16, series_px: 8, s2_dates: 2, s1_dates: 1}"
    config = load(PretrainConfig, None, ["model.size=debug", "model.prompts=0", "model.moe.blocks=1",
                                         f"data.views_global={view}", "objective.qsacl_weight=0"])  # fmt: skip
    tokens = 1 + 2 * 4 + 4
    flops = tokens * 2 * (128 * 512 + 512 * 128)
    assert activations.routed(config) == {"elements": 128 * tokens, "calls": 3, "layers": 1, "flops": flops}
