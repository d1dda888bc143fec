"""Memory of one rank at its fullest, by part.

weights      compute precision; ZeRO-3 shards them
masters      float32 copies, sharded by ZeRO >= 1; with ZeRO-0 the weights are float32 and their own masters
moments      Adam's two, float32, sharded by ZeRO >= 1 (ZeRO: arXiv 1910.02054, section 5)
gradients    whole with ZeRO-0 and -1; sharded by ZeRO >= 2
teacher      compute weights whole, and the float32 average sharded as the masters are
activations  kept for the backward (`model.activations`), and the gradients of the block that is being computed
buffers      DeepSpeed's reduction buckets, and the copy that is summed
inputs       the pixels of a rank's step
"""

from __future__ import annotations

from cluster.plan.facts import Hardware, Layout, Model

BUCKET_ELEMENTS = 50_000_000
"""`reduce_bucket_size` of the trainer; one bucket, a second one where communication overlaps (accelerators)."""

DEVICE_RESERVE_GB = 3.0
"""CUDA context, NCCL channels and fragmentation of the caching allocator on an accelerator: assumed, not measured."""


def memory_bytes(model: Model, layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Bytes by part for one rank; "total" is their sum."""
    here, sharded, stage = model.on_rank(layout.ep), model.sharded(layout), layout.zero_stage
    on_device = 0.0 if layout.offload else 1.0
    parts = {
        "weights": layout.compute_bytes * (model.parameters / layout.world if stage == 3 else here),
        "masters": 4 * sharded * on_device if stage else 0.0,
        "moments": 8 * sharded * on_device,
        "gradients": _gradients(here, sharded, layout),
        "teacher": layout.compute_bytes * here + 4 * sharded,
        "activations": _activations(model, layout, hardware),
        "inputs": layout.samples_per_rank * model.kept["cpu"]["inputs"],
        "buffers": _buffers(here, layout, hardware),
    }
    if not hardware.is_cpu:
        parts["reserve"] = DEVICE_RESERVE_GB * 1e9
    return {**parts, "total": sum(parts.values())}


def _gradients(here: float, sharded: float, layout: Layout) -> float:
    if layout.zero_stage >= 2:
        return layout.gradient_bytes * sharded
    return layout.compute_bytes * here


def _activations(model: Model, layout: Layout, hardware: Hardware) -> float:
    kept = model.kept["cpu" if hardware.is_cpu else "gpu"]
    if layout.checkpointing:  # the block that is recomputed stands beside what is kept, and its gradients
        return layout.micro_batch * (kept["checkpointed"] + 1.5 * kept["block"]) + kept["fixed"]
    return layout.micro_batch * kept["full"] + kept["fixed"] + kept["fixed_in_blocks"]


def _buffers(here: float, layout: Layout, hardware: Hardware) -> float:
    """Gradients wait in a bucket of the compute precision (ZeRO-3: of the one they are summed in). A bucket that is to be summed in
    another one is copied whole for that: within the backward, beside all activations, only where it runs full; what is left in it
    at the end is copied when they are gone."""
    if layout.zero_stage == 0:
        return 0.0
    number = 1 if hardware.is_cpu else 2
    if layout.zero_stage == 3:
        return number * BUCKET_ELEMENTS * layout.reduce_bytes
    buckets = number * BUCKET_ELEMENTS * layout.compute_bytes
    runs_full = here > BUCKET_ELEMENTS and layout.reduce_bytes != layout.compute_bytes
    return buckets + (BUCKET_ELEMENTS * layout.reduce_bytes if runs_full else 0.0)
