"""Jobs that run inside ranks: train the stand-in under many layouts and return losses, weights, teacher, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cluster.config import from_dict
from cluster.ranks import Ranks
from model.losses.reduce import DistributedReduce
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.parallel.layout import Layout
from tests.standin import Rows, StandIn, make_batch


def config_of(case: dict[str, Any]) -> PretrainConfig:
    return from_dict(PretrainConfig, {
        "model": {"moe": {"experts": case.get("experts", 4)}},
        "train": {"steps": case.get("total", 20), "batch": 8, "micro_batch": case.get("micro"), "precision": case.get("precision", "fp32")},
        "optimizer": {"lr": 1e-2, "warmup_samples": 40, "clip": case.get("clip", 0.5), "lr_scale": {"leave": 0.5}},
        "objective": {"ema_momentum": [0.9, 1.0]},
        "parallel": {"zero_stage": case["stage"], "ep": case.get("ep", 1), "offload": case.get("offload", False)},
    })  # fmt: skip


def build(case: dict[str, Any]) -> Engine:
    config, ranks = config_of(case), Ranks.from_environment()
    torch.manual_seed(case.get("seed", 0))
    student, teacher = StandIn(case.get("experts", 4)), StandIn(case.get("experts", 4))
    teacher.load_state_dict(student.state_dict())
    layout = Layout.of(config, ranks)
    return Engine(student, teacher, config, layout, torch.device("cpu"), DistributedReduce())


def micro_batches(layout: Layout, step: int) -> list[Rows]:
    whole, mine = make_batch(step, layout.batch), []
    for i in range(layout.accumulation):
        start = layout.rank * layout.batch_per_rank + i * layout.micro_batch
        part = slice(start, start + layout.micro_batch)
        mine.append(Rows(whole.x_BLD[part], whole.valid_BL[part], whole.keys[part]))
    return mine


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole logical fp32 tensors, put together from all ranks' pieces: `student/NAME`, `exp_avg/…`, `teacher/…`."""
    mine = []
    for piece in engine.state.pieces:
        a, b = piece.owned
        values = {
            "student": piece.of(piece.master.tensor.detach()), "teacher": engine.teacher.of(piece),
            "exp_avg": engine.state.moment(piece, "exp_avg"), "exp_avg_sq": engine.state.moment(piece, "exp_avg_sq"),
        }  # fmt: skip
        mine.append((piece.name, piece.shape, piece.start + a, {k: v[a:b].clone() for k, v in values.items()}))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, int] = {}
    for pieces in everyone:
        for name, shape, start, values in pieces:
            for kind, part in values.items():
                key = f"{kind}/{name}"
                flat = whole.setdefault(key, torch.full(shape, float("nan"))).view(-1)
                flat[start : start + part.numel()] = part
                covered[key] = covered.get(key, 0) + part.numel()
    assert all(covered[key] == tensor.numel() for key, tensor in whole.items()), "pieces overlap or leave gaps"
    return whole


def train_all(cases: list[dict[str, Any]]) -> list[Any]:
    """Each case from scratch: losses of every step, gradient norms, and (rank 0) all tensors as nested lists."""
    results = []
    for case in cases:
        engine = build(case)
        losses, norms = [], []
        for step in range(case.get("steps", 20)):
            result = engine.step(micro_batches(engine.layout, step), step * engine.layout.batch)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        state = full_state(engine)
        twin = {name: p.detach().float() for name, p in engine.teacher.module.named_parameters()}
        drift = max(  # the teacher computes with its average
            (twin[n.split("/", 1)[1]] - t[: len(twin[n.split("/", 1)[1]])]).abs().max().item()
            for n, t in state.items() if n.startswith("teacher/") and "experts" not in n
        )  # fmt: skip
        tensors = {k: v.flatten().tolist() for k, v in state.items()} if dist.get_rank() == 0 else {}
        results.append({"losses": losses, "norms": norms, "tensors": tensors, "teacher_drift": drift})
        engine.deepspeed.destroy()
    return results
