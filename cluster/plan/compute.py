"""Floating-point work and time of one step.

A step's work per sample is 4 forwards: the student's forward, its backward (2 forwards) and the teacher's forward; activation
checkpointing recomputes the student's forward once more. Time = work / (peak · MFU), MFU a range (see `hardware.yaml`).
"""

from __future__ import annotations

from cluster.plan.communication import IMBALANCE, payload_bytes, seconds
from cluster.plan.facts import Hardware, Layout, Model

PUBLISHED_H20 = 3.8
"""Samples/s per H20 of the paper's run: 600 k steps of 1024 samples in about 44,500 GPU-hours (method notes, section 5)."""


def step_flops(model: Model, layout: Layout) -> float:
    """Work of one rank in one step, recomputation included."""
    again = model.student_forward_flops if layout.checkpointing else 0.0
    return layout.samples_per_rank * (model.flops + again)


def step_seconds(model: Model, layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """(best, worst): high MFU with gradients reduced behind the backward, low MFU with nothing overlapped."""
    peak = hardware.tflops(layout.precision) * 1e12
    best, worst = (step_flops(model, layout) / (peak * mfu) for mfu in (hardware.mfu[1], hardware.mfu[0]))
    worst *= 1 + waiting_share(model, layout)
    wire = seconds(payload_bytes(model, layout), layout, hardware)
    exposed = wire["expert_all_to_all"] + wire["teacher_all_gather"] + wire["weight_all_gather"]
    backward = best / 2
    best += exposed / IMBALANCE + max(0.0, wire["gradient_all_reduce"] - backward)
    return best, worst + sum(wire.values())


def waiting_share(model: Model, layout: Layout) -> float:
    """Share of the compute time that ranks wait for the one whose experts have most rows (nothing waits with ep = 1)."""
    expert_share = model.routed["flops"] / model.student_forward_flops if model.experts else 0.0
    return (IMBALANCE - 1) * expert_share if layout.ep > 1 else 0.0


def anchor(model: Model, layout: Layout, step_s: tuple[float, float], hardware: Hardware) -> dict[str, object] | None:
    """How the plan stands to the published run, on the hardware it was published for."""
    if hardware.key != "h20":
        return None
    rate = [layout.samples_per_rank / s for s in reversed(step_s)]
    needed = PUBLISHED_H20 * model.flops / (hardware.bf16_tflops * 1e12)
    return {
        "published_samples_per_s_per_gpu": PUBLISHED_H20, "planned_samples_per_s_per_gpu": rate,
        "mfu_that_would_match": needed,
        "tflop_per_sample_at_40_percent_mfu": 0.4 * hardware.bf16_tflops / PUBLISHED_H20,
        "tflop_per_sample_here": model.flops / 1e12,
    }  # fmt: skip
