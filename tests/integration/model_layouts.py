"""Job that runs inside ranks: train the real (debug-size) student under several layouts and return losses and weight sums."""

from __future__ import annotations

from typing import Any

import torch

from cluster.config import from_dict
from cluster.ranks import Ranks
from model.losses.reduce import DistributedReduce
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.first_weights import first_networks
from pipeline.parallel.layout import Layout
from tests.integration.layouts import full_state
from tests.synthetic_batch import STATISTICS, make_batch, split

BATCH, STEPS = 8, 3
CLASSES = ["water", "crop", "grass", "built"]


def config_of(case: dict[str, Any]) -> PretrainConfig:
    model = {"size": "debug", "drop_path": 0.3, "moe": {"experts": 4, "top_k": 2}, **case.get("model", {})}
    small = {
        "prototypes": 32,
        "head_hidden": 32,
        "head_bottleneck": 16,
        "queries": 4,
        "pixel_pairs": 8,
        "object_clusters": 2,
    }
    return from_dict(PretrainConfig, {
        "model": model, "objective": {**small, **case.get("objective", {})},
        "train": {"steps": STEPS, "batch": BATCH, "micro_batch": case.get("micro"), "precision": "fp32"},
        # eps: a tiny gradient moves its weight by little; Adam's usual 1e-8 makes a full step of its rounding error's sign
        "optimizer": {"lr": 1e-3, "warmup": 8, "eps": 1e-3},
        "parallel": {"zero_stage": case["stage"], "ep": case.get("ep", 1)},
    })  # fmt: skip


def train(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses of every step, and the norm of every logical parameter after the last one (rank 0)."""
    results, ranks = [], Ranks.from_environment()
    for case in cases:
        config = config_of(case)
        layout, device = Layout.of(config, ranks), torch.device("cpu")
        student, teacher = first_networks(config, layout, STATISTICS, CLASSES, device)
        engine = Engine(student, teacher, config, layout, device, DistributedReduce())
        losses = []
        for step in range(STEPS):
            parts = split(make_batch(BATCH, seed=step), layout.world * layout.accumulation)
            mine = parts[layout.rank * layout.accumulation : (layout.rank + 1) * layout.accumulation]
            losses.append(engine.step(mine, step * BATCH).loss)
        state = full_state(engine)
        results.append({"losses": losses, "norms": {k: float(v.double().norm()) for k, v in state.items()}})
        engine.deepspeed.destroy()
    return results
