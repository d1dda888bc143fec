"""One frozen object owns every parallel degree: it validates them together and prints itself. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import UsageError
from cluster.ranks import Ranks
from pipeline.config import PretrainConfig


@dataclass(frozen=True)
class Layout:
    """How one step is spread over the ranks.

    Ranks of one expert-parallel group are consecutive (they share a node, where all-to-all is cheap): rank r holds expert
    slice `r % ep`; the `world / ep` ranks with the same slice are its expert-data-parallel group.

    Attributes:
        world, rank: processes of the job, and this one.
        ep: expert-parallel degree.
        zero_stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 weights too.
        micro_batch: samples per rank and forward pass.
        accumulation: micro-batches per optimizer step.
        precision: "fp32" or "bf16" (fp32 master weights either way).
        offload: optimizer state and masters in CPU memory.
    """

    world: int
    rank: int
    ep: int
    zero_stage: int
    micro_batch: int
    accumulation: int
    precision: str
    offload: bool

    @property
    def batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.world * self.micro_batch * self.accumulation

    @property
    def batch_per_rank(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def expert_rank(self) -> int:
        """Which slice of the experts this rank holds."""
        return self.rank % self.ep

    @staticmethod
    def of(config: PretrainConfig, ranks: Ranks) -> Layout:
        """The layout of a run. Raises UsageError for one that cannot work or is known to compute something else."""
        parallel, train = config.parallel, config.train
        per_rank, left = divmod(train.batch, ranks.world)
        if left or not per_rank:
            near = [str(n * ranks.world) for n in (per_rank, per_rank + 1) if n]
            raise UsageError(
                f"train.batch={train.batch} is not divisible by {ranks.world} processes; use {' or '.join(near)}"
            )
        micro = train.micro_batch or per_rank
        if micro < 1 or per_rank % micro:
            raise UsageError(f"train.micro_batch={micro} does not divide the {per_rank} samples of a rank's step")
        _check_degrees(config, ranks)
        accumulation = per_rank // micro
        _check_precision(config, accumulation)
        return Layout(
            world=ranks.world, rank=ranks.rank, ep=parallel.ep, zero_stage=parallel.zero_stage, micro_batch=micro,
            accumulation=accumulation, precision=train.precision, offload=parallel.offload,
        )  # fmt: skip

    def __str__(self) -> str:
        parts = [f"{self.world} processes", f"ZeRO-{self.zero_stage}", f"ep={self.ep}", self.precision]
        parts.append(f"batch {self.batch} = {self.world} x {self.micro_batch} x {self.accumulation}")
        return " · ".join(parts + (["optimizer offloaded"] if self.offload else []))


def _check_degrees(config: PretrainConfig, ranks: Ranks) -> None:
    parallel, experts, world = config.parallel, config.model.moe.experts, ranks.world
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise UsageError(f"parallel.zero_stage={parallel.zero_stage} is not one of 0, 1, 2, 3")
    if parallel.ep < 1 or world % parallel.ep:
        raise UsageError(f"parallel.ep={parallel.ep} does not divide the {world} processes; use a divisor of {world}")
    if parallel.ep == 1:
        return
    if not experts:
        raise UsageError(f"parallel.ep={parallel.ep} needs experts, and model.moe.experts=0; set parallel.ep=1")
    if experts % parallel.ep:
        raise UsageError(f"parallel.ep={parallel.ep} does not divide model.moe.experts={experts}")
    if 1 < ranks.local_world < world and ranks.local_world % parallel.ep and not parallel.ep_across_nodes:
        raise UsageError(
            f"parallel.ep={parallel.ep} does not fit into nodes of {ranks.local_world} processes: its all-to-all would leave the "
            f"node; use a divisor of {ranks.local_world}, or allow it with parallel.ep_across_nodes=true"
        )
    if parallel.zero_stage == 3:
        raise UsageError(
            "parallel.zero_stage=3 with parallel.ep>1: DeepSpeed shards no expert group there; use ZeRO-2, or ep=1"
        )


def _check_precision(config: PretrainConfig, accumulation: int) -> None:
    stage, precision = config.parallel.zero_stage, config.train.precision
    if precision == "bf16" and stage == 0:
        raise UsageError(
            "train.precision=bf16 with parallel.zero_stage=0 keeps no fp32 masters we can save; use ZeRO-1 or -2"
        )
    if precision == "bf16" and stage == 1 and accumulation > 1:
        raise UsageError(
            "train.precision=bf16 with ZeRO-1 accumulates in bf16; use ZeRO-2, or micro_batch = batch / processes"
        )
    if config.parallel.offload and stage == 0:
        raise UsageError("parallel.offload needs parallel.zero_stage 1, 2 or 3")
