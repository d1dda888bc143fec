"""What one rank hands to collectives per optimizer step, and how long that takes.

Volumes are payloads: the bytes of this rank's input (for all_gather: of its own part). They are what a counter around
`torch.distributed` sees, and are checked against one. Times put them on the wire:

    all_reduce     2 (n-1)/n · S   per rank (ring; the lower bound, Patarasuk & Yuan 2009)
    all_gather     (n-1) · S_own
    all_to_all     (n-1)/n · S · imbalance, the part that leaves the node over the slower link
"""

from __future__ import annotations

from cluster.plan.facts import Hardware, Layout, Model

IMBALANCE = 1.25
"""Rows of the busiest expert-parallel rank over the mean; the balance loss keeps it near 1, early training does not."""


def payload_bytes(model: Model, layout: Layout) -> dict[str, float]:
    """Bytes into each kind of collective per rank and step. Groups of one rank exchange nothing and count nothing."""
    volumes = {"gradient_all_reduce": 0.0, "weight_all_gather": 0.0, "teacher_all_gather": 0.0,
               "expert_all_to_all": 0.0, "loss_all_reduce": 0.0}  # fmt: skip
    if layout.world == 1:
        return volumes
    width = layout.compute_bytes
    reductions = layout.accumulation if layout.zero_stage >= 2 else 1
    moved = _shared(model, layout)
    if layout.zero_stage == 3:
        return {**volumes, **_zero3(model, layout)}
    volumes["gradient_all_reduce"] = layout.reduce_bytes * moved["reduced"] * reductions
    if layout.zero_stage:
        volumes["weight_all_gather"] = width * moved["own"]
        volumes["teacher_all_gather"] = width * moved["own"]
    volumes["loss_all_reduce"] = float(model.centring_bytes)
    if layout.ep > 1:
        volumes["expert_all_to_all"] = _all_to_all(model, layout)
    return volumes


def _shared(model: Model, layout: Layout) -> dict[str, float]:
    """Parameters of which a rank reduces gradients, and of which it owns the part it sends to others."""
    replicas = layout.world // layout.ep  # ranks that hold the same experts
    reduced, own = float(model.dense), model.dense / layout.world
    if replicas > 1:
        reduced += model.expert / layout.ep
        own += model.expert / layout.world
    return {"reduced": reduced, "own": own}


def _zero3(model: Model, layout: Layout) -> dict[str, float]:
    """ZeRO-3: weights are gathered for each forward and backward of every micro-batch; not validated here."""
    width, own = layout.compute_bytes, model.parameters / layout.world
    passes = 3 if layout.checkpointing else 2
    return {
        "gradient_all_reduce": layout.reduce_bytes * model.parameters * layout.accumulation,
        "weight_all_gather": width * own * passes * layout.accumulation,
        "teacher_all_gather": width * own, "loss_all_reduce": float(model.centring_bytes),
    }  # fmt: skip


def _all_to_all(model: Model, layout: Layout) -> float:
    """Rows to the experts and back: teacher forward, student forward, student backward, and what is recomputed."""
    exchanges = 2 * (4 if layout.checkpointing else 3)
    rows = layout.samples_per_rank * model.routed["elements"] * layout.compute_bytes * exchanges
    # before every forward exchange, how many rows go to each expert (int64)
    counts = layout.accumulation * model.routed["calls"] * model.experts * 8 * (exchanges // 2 - 1)
    return float(rows + counts)


def seconds(volumes: dict[str, float], layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Time on the wire of each kind, without overlap with anything."""
    n = layout.world
    slow = hardware.intra_gb_s if layout.nodes == 1 else hardware.inter_gb_s
    rate, inside = slow * 1e9 * hardware.link_efficiency, hardware.intra_gb_s * 1e9 * hardware.link_efficiency
    times = {
        name: (2 * (n - 1) / n if name.endswith("reduce") else n - 1) * volume / rate
        for name, volume in volumes.items() if name != "expert_all_to_all"
    }  # fmt: skip
    leaving = share_leaving_node(layout)
    volume = volumes["expert_all_to_all"] * IMBALANCE
    staying = max((layout.ep - 1) / layout.ep - leaving, 0.0)
    times["expert_all_to_all"] = volume * (
        staying / inside + leaving / (hardware.inter_gb_s * 1e9 * hardware.link_efficiency)
    )
    return times


def share_leaving_node(layout: Layout) -> float:
    """Share of all-to-all rows whose expert lives on another node (balanced experts)."""
    return max(0.0, 1.0 - layout.per_node / layout.ep)
