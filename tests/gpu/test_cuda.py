"""What only CUDA can break: kernels that a CPU has not, waits of the host, bits that differ from run to run. `make gpu` runs these."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.config import load
from model.config import ModelConfig, MoEConfig
from model.losses.reduce import DistributedReduce, SingleProcess
from model.moe.experts import Experts, experts_grouped, experts_loop
from model.pretrain import Student
from model.skysense import SkySense
from model.teacher import make_teacher
from pipeline.config import PretrainConfig
from pipeline.launch import free_port
from tests.model_views import random_view
from tests.synthetic_batch import STATISTICS, batch_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEBUG = ModelConfig(size="debug", window=4, moe=MoEConfig(experts=4, blocks=2))
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact() -> Any:
    """float32 as it is written; what a run does with TF32 is its own affair."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["cell", "frames"])
def test_features_and_gradients_equal_the_cpu_s(kind: str) -> None:
    torch.manual_seed(0)
    cfg = replace(DEBUG, fusion=replace(DEBUG.fusion, kind=kind), drop_path=0.3)
    here = SkySense(cfg).train()
    there = copy.deepcopy(here).to(CUDA)
    view, seeds = random_view(2, hr=64, series=16), torch.tensor([3, 4])
    a, b = here(view, seeds), there(view.to(CUDA), seeds.to(CUDA))
    torch.testing.assert_close(b.fused.cpu(), a.fused, rtol=1e-4, atol=1e-4)
    a.fused.square().sum().backward()
    b.fused.square().sum().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters()):
        assert p.grad is not None
        assert q.grad is not None
        scale = float(p.grad.abs().max()) + 1e-3
        torch.testing.assert_close(
            q.grad.cpu() / scale, p.grad / scale, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("counts", [[5, 0, 9, 2], [0, 0, 16, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_experts_equal_the_loop_forward_and_backward(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 64, 256).to(CUDA, torch.bfloat16)
    x = torch.randn(sum(counts), 64, device=CUDA, dtype=torch.bfloat16)
    number = torch.tensor(counts, device=CUDA)
    found: list[list[Tensor]] = []
    for function in (experts_loop, experts_grouped):
        own, rows = copy.deepcopy(experts), x.clone().requires_grad_()
        y = function(rows, number, own.w1_EDF, own.b1_EF, own.w2_EFD, own.b2_ED)
        y.float().square().sum().backward()
        assert rows.grad is not None
        found.append([y, rows.grad, *(p.grad for p in own.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 6
    for a, b in zip(*found):
        torch.testing.assert_close(b.float(), a.float(), rtol=3e-2, atol=3e-2)


def student_step(precision: str, sites: int = 2) -> tuple[Any, Any, Any]:
    config = load(PretrainConfig, "tests/runs/small.yaml", ["objective.ita_embeddings=null", "model.drop_path=0.2"])
    torch.manual_seed(0)
    student = Student(config.model, config.objective, STATISTICS).train().to(CUDA)
    if precision == "bf16":
        for parameter in student.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return student, make_teacher(student), batch_of(config, sites, missing=0.2).to(CUDA)


def run_step(student: Any, teacher: Any, batch: Any) -> tuple[Tensor, list[Tensor]]:
    student.zero_grad()
    [target] = teacher.center([teacher.teacher_forward(batch)], 0, SingleProcess())
    loss, _ = student(batch, target, diagnose=False)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in student.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_repeats_bit_by_bit(precision: str) -> None:
    """No sum whose order is left to atomics."""
    student, teacher, batch = student_step(precision)
    first, second = (run_step(student, teacher, batch) for _ in range(2))
    assert torch.equal(first[0], second[0])
    different = [
        name for (name, _), a, b in zip(student.named_parameters(), first[1], second[1]) if not torch.equal(a, b)
    ]
    assert different == []


def test_the_host_waits_at_most_twelve_times() -> None:
    """torch's own watch over synchronising calls, on the grouped product that waits for nothing."""
    student, teacher, batch = student_step("bf16")
    run_step(student, teacher, batch)  # constants are made in the first
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run_step(student, teacher, batch)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in found if "synchroniz" in str(w.message)]
    assert len(waits) <= 12, waits


def test_compiled_blocks_equal_eager_ones() -> None:
    torch.manual_seed(0)
    plain = SkySense(replace(DEBUG, drop_path=0.0)).to(CUDA).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    view = random_view(2, hr=64, series=16).to(CUDA)
    a, b = plain(view), compiled(view)
    torch.testing.assert_close(b.fused, a.fused, rtol=1e-4, atol=1e-4)


def test_nccl_with_one_rank_sums() -> None:
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        value = torch.arange(4.0, device=CUDA)
        assert torch.equal(DistributedReduce().sum(value), value)
    finally:
        dist.destroy_process_group()


def test_a_full_size_step_fits_one_card() -> None:
    """One site of the full-size model, bfloat16 weights, teacher beside the student, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs a card of 80 GB")
    config = load(PretrainConfig, "pipeline/runs/skysense_v2.yaml", ["objective.ita_embeddings=null"])
    with CUDA:
        student = Student(config.model, config.objective, STATISTICS).train()
    for parameter in student.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    loss, _ = run_step(student, make_teacher(student), batch_of(config, 1).to(CUDA))
    assert bool(loss.isfinite())
    assert torch.cuda.max_memory_allocated() < 78 * 2**30
