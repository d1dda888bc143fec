"""Tries every layout that the trainer supports on the given ranks and keeps the fastest that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cluster.plan.compute import step_seconds
from cluster.plan.facts import Hardware, Layout, Model
from cluster.plan.memory import memory_bytes

FILL = 0.92
"""Share of the device memory that a plan may use; the rest is for what is not modelled."""


def layouts(model: Model, base: Layout) -> Iterator[Layout]:
    """All supported layouts on `base`'s ranks and batch (the trainer's matrix: ARCHITECTURE.md)."""
    per_rank = base.samples_per_rank
    room = base.world if base.per_node == 1 else base.per_node  # the trainer keeps the all-to-all inside a node
    degrees = [ep for ep in range(1, model.experts + 1) if model.experts % ep == 0 and room % ep == 0] or [1]
    for stage in (1, 2, 3) if base.precision == "bf16" else (0, 1, 2, 3):
        for ep in degrees if stage < 3 else [1]:
            for micro in [m for m in range(per_rank, 0, -1) if per_rank % m == 0]:
                accumulation = per_rank // micro
                if base.precision == "bf16" and stage == 1 and accumulation > 1:
                    continue  # accumulates in bf16: refused by the trainer
                for checkpointing in (False, True):
                    yield dataclasses.replace(
                        base, zero_stage=stage, ep=ep, micro_batch=micro, accumulation=accumulation,
                        checkpointing=checkpointing, offload=False,
                    )  # fmt: skip


def fits(model: Model, layout: Layout, hardware: Hardware) -> bool:
    return memory_bytes(model, layout, hardware)["total"] <= FILL * hardware.memory_gb * 1e9


def recommend(model: Model, base: Layout, hardware: Hardware) -> Layout | None:
    """The fitting layout with the least worst-case step time; of equals the simplest (low stage, ep 1, few micro-batches)."""
    candidates = [layout for layout in layouts(model, base) if fits(model, layout, hardware)]

    def cost(layout: Layout) -> tuple[float, ...]:
        slow = step_seconds(model, layout, hardware)[1]
        return (round(slow, 4), layout.zero_stage, layout.ep, layout.accumulation)

    return min(candidates, key=cost, default=None)


def as_overrides(layout: Layout) -> dict[str, object]:
    """The layout as config keys, to be pasted after CONFIG."""
    return {
        "parallel.zero_stage": layout.zero_stage, "parallel.ep": layout.ep, "train.micro_batch": layout.micro_batch,
        "model.activation_checkpointing": layout.checkpointing,
    }  # fmt: skip
