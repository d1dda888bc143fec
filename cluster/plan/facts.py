"""What the planner works with: the model's figures (from the trainer's dry run), a layout, and a hardware profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UsageError

PROFILES = Path(__file__).with_name("hardware.yaml")
BYTES = {"fp32": 4, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links; see `hardware.yaml` for units and sources."""

    key: str
    name: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    intra_gb_s: float
    inter_gb_s: float
    gpus_per_node: int
    mfu: tuple[float, float]
    link_efficiency: float
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.key == "cpu"

    def tflops(self, precision: str) -> float:
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


def hardware(name: str, path: str | Path = PROFILES) -> Hardware:
    """The profile called `name`. Raises UsageError for one that does not exist or lacks a figure."""
    profiles = yaml.safe_load(Path(path).read_text())
    if name not in profiles:
        raise UsageError(f"--hardware {name} is not one of {', '.join(profiles)} (profiles lie in {path})")
    entry = dict(profiles[name])
    try:
        return Hardware(key=name, **{**entry, "mfu": tuple(entry["mfu"])})
    except (TypeError, KeyError) as error:
        raise UsageError(f"{path}: profile {name}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step is spread. Ranks of an expert-parallel group are consecutive, so that it stays in a node if it fits."""

    nodes: int
    per_node: int
    zero_stage: int
    ep: int
    micro_batch: int
    accumulation: int
    precision: str
    checkpointing: bool
    offload: bool = False
    reduce: str = "fp32"

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def batch(self) -> int:
        return self.world * self.micro_batch * self.accumulation

    @property
    def samples_per_rank(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def compute_bytes(self) -> int:
        return BYTES[self.precision]

    @property
    def reduce_bytes(self) -> int:
        """What one gradient weighs on the wire (`parallel.reduce`)."""
        return max(self.compute_bytes, BYTES[self.reduce])

    @property
    def gradient_bytes(self) -> int:
        """Gradients are accumulated in float32, except by ZeRO-1 in bf16 (which does not accumulate)."""
        return 2 if self.precision == "bf16" and self.zero_stage == 1 else 4


@dataclasses.dataclass(frozen=True)
class Model:
    """Figures of a resolved config. Parameters: dense (replicated by expert parallelism) and in experts, all of them.

    flops: per sample and step, student forward and backward and teacher forward, nothing recomputed; forward_flops: of the
    student alone; kept: activation bytes (`model.activations`) by device kind; routed: what one forward sends to experts.
    """

    dense: int
    expert: int
    experts: int
    flops: float
    student_forward_flops: float
    kept: Mapping[str, Mapping[str, Any]]
    routed: Mapping[str, float]
    centring_bytes: int
    steps: int
    batch: int

    @property
    def parameters(self) -> int:
        return self.dense + self.expert

    def on_rank(self, ep: int) -> float:
        """Parameters that one rank computes with."""
        return self.dense + self.expert / ep

    def sharded(self, layout: Layout) -> float:
        """Parameters whose optimizer state one rank holds: its share of the dense ones, and of its experts among the ranks
        that hold the same ones."""
        if layout.zero_stage == 0:
            return self.on_rank(layout.ep)
        return self.dense / layout.world + self.expert / layout.world


def model_facts(answer: Mapping[str, Any]) -> Model:
    """From the last JSON line of `pipeline train CONFIG --dry-run --json`."""
    parameters, resolved, flops = answer["parameters"], answer["resolved"], answer["flops_per_sample"]
    moe = resolved["model"]["moe"]
    experts, idle = moe["experts"], parameters["total"] - parameters["active"]
    expert = 0
    if experts and parameters["moe_increment"]:
        # `active` leaves out the experts a token does not pass through: total - active = (E - k) experts of every layer
        expert = experts * idle // (experts - moe["top_k"]) if experts > moe["top_k"] else parameters["moe_increment"]
    return Model(
        dense=parameters["total"] - expert, expert=expert, experts=experts, flops=float(flops["train"]),
        student_forward_flops=float(flops["train"]) / 4, kept=answer["activations"], routed=answer["routed"],
        centring_bytes=_centring(resolved), steps=resolved["train"]["steps"], batch=resolved["train"]["batch"],
    )  # fmt: skip


def configured_layout(resolved: Mapping[str, Any], nodes: int, per_node: int) -> Layout:
    """The layout that the config itself asks for on so many ranks. Raises UsageError where the batch does not fit them."""
    train, parallel, world = resolved["train"], resolved["parallel"], nodes * per_node
    if train["batch"] % world:
        raise UsageError(
            f"train.batch={train['batch']} is not divisible by {world} processes ({nodes} nodes x {per_node})"
        )
    per_rank = train["batch"] // world
    micro = min(train["micro_batch"] or per_rank, per_rank)
    return Layout(
        nodes, per_node, parallel["zero_stage"], parallel["ep"], micro, max(per_rank // micro, 1), train["precision"],
        resolved["model"]["activation_checkpointing"], parallel["offload"], parallel.get("reduce", "fp32"),
    )  # fmt: skip


def _centring(resolved: Mapping[str, Any]) -> int:
    """Bytes of the losses' all-reduces per step: prototype totals of each Sinkhorn iteration (float32, one row per group of
    features that is centred by itself) and which prototypes were hit (int64)."""
    objective, spaces = resolved["objective"], len(resolved["model"]["modalities"]) + 1
    groups = spaces * len(objective["mgcl_levels"]) if objective["mgcl_weight"] else 0
    per_level = len(objective["mgcl_levels"]) if objective["heads"] == "per_level" else 1
    heads = 2 * per_level if objective["mgcl_weight"] else 0
    if objective["qsacl_weight"]:
        groups, heads = groups + 1, heads + 1
    iterations = objective["sinkhorn_iterations"] if objective["centering"] == "sinkhorn" else 0
    return int(objective["prototypes"] * (4 * iterations * groups + 8 * heads))
