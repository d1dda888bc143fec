"""How losses add over ranks and micro-batches: the convention, and the one collective they need.

One optimiser step holds A micro-batches on each of W ranks. Every loss term is a weighted mean over the valid elements
(pixel pairs, objects, images, queries, labelled tokens) of the *whole step*:

    term = (1/N) Σ_ranks Σ_micro-batches Σ_elements value(element),      N = number of valid elements of the whole step

N follows from validity masks and the teacher alone, so it is known before the student runs (`center` sums it once). What a rank
returns for one micro-batch is `W·A/N · Σ_elements value`; hence the *mean* over the step's W·A micro-batches is the
term. An engine that averages gradients over ranks and divides by A (DeepSpeed does both) gets the exact gradient of the
term, and the mean of the logged metrics over ranks and micro-batches is the exact figure. No gradient ever has to flow
through a collective: everything that spans micro-batches is a constant to autograd.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Reduce(Protocol):
    """Sum over the ranks that split the global batch (data-parallel ranks, expert parallelism included)."""

    world: int
    rank: int

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over ranks; same shape on all of them, the same result on all; not differentiable."""
        ...


class SingleProcess:
    """One rank: nothing to add."""

    world, rank = 1, 0

    def sum(self, value: Tensor) -> Tensor:
        return value.detach()


class DistributedReduce:
    """`torch.distributed` all-reduce; every rank must call it the same number of times in the same order."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().clone().contiguous()
        dist.all_reduce(total, group=self.group)
        return total
