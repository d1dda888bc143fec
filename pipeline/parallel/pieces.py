"""Which piece of which logical parameter every rank holds, as a pure function of shapes and layout: no engine, no torch.

`pipeline.parallel.zero` reads the same off a built engine, for its own rank alone. This says it for any rank of any world, so
that a test can lay the pieces of all 1,024 side by side, and the planner can say what a resume reads. A test holds the two equal
on engines built under torch's fake process group. The rules are DeepSpeed 0.19.8's:

    ZeRO-1, -2   each optimizer group is flattened in order, padded to a multiple of ALIGNMENT · ranks, cut into equal ranges
    ZeRO-3       each parameter is padded to a multiple of the ranks and cut into equal ranges
    ZeRO-0       everything is everywhere; each rank answers for an equal share of each parameter

A group of experts is cut over the world / ep ranks that hold the same experts (rank r holds slice r % ep).
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 2  # elements; DeepSpeed's `nccl_start_alignment_factor`

Owned = tuple[str, int, int]  # logical name, start in the flattened logical parameter, size


@dataclass(frozen=True)
class Group:
    """One group of the optimizer. parameters: (logical name, logical shape), in order. experts: cut by expert parallelism."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    experts: bool

    def local_numels(self, ep: int) -> list[int]:
        """Elements of each parameter on one rank."""
        return [math.prod(shape) // (ep if self.experts else 1) for _, shape in self.parameters]


def owned(groups: Sequence[Group], stage: int, world: int, ep: int, rank: int) -> list[Owned]:
    """The pieces that `rank` alone answers for, in the order of the optimizer's memory."""
    return [piece for group in groups for piece in _of_group(group, stage, world, ep, rank)]


def _of_group(group: Group, stage: int, world: int, ep: int, rank: int) -> Iterator[Owned]:
    parts, part, slice_ = (world // ep, rank // ep, rank % ep) if group.experts else (world, rank, 0)
    numels, ends = _numels(group, ep)
    names = [name for name, _ in group.parameters]
    if stage in (1, 2):
        size = -(-ends[-1] // (ALIGNMENT * parts)) * ALIGNMENT
        low = part * size
        for index in range(bisect_right(ends, low), len(names)):
            offset = ends[index] - numels[index]
            a, b = max(offset, low), min(ends[index], low + size)
            if a >= b:
                break
            yield names[index], slice_ * numels[index] + a - offset, b - a
        return
    for name, n in zip(names, numels):
        size = -(-n // parts)
        a, b = (n * part // parts, n * (part + 1) // parts) if stage == 0 else (part * size, min((part + 1) * size, n))
        if a < b:
            yield name, slice_ * n + a, b - a


@functools.lru_cache(maxsize=256)
def _numels(group: Group, ep: int) -> tuple[list[int], list[int]]:
    """Elements of each parameter on one rank, and where each ends in the flattened group."""
    numels = group.local_numels(ep)
    return numels, list(itertools.accumulate(numels))


def spans(groups: Sequence[Group], stage: int, world: int, ep: int) -> dict[str, list[tuple[int, int, int]]]:
    """Per logical parameter (start, size, rank) of the pieces of all ranks, by start: what a checkpoint's manifest lists."""
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for group in groups for name, _ in group.parameters}
    for rank in range(world):
        for name, start, size in owned(groups, stage, world, ep, rank):
            found[name].append((start, size, rank))
    return {name: sorted(pieces) for name, pieces in found.items()}


def tiling_faults(groups: Iterable[Group], found: Mapping[str, Sequence[tuple[int, int, int]]]) -> list[str]:
    """Where pieces leave a gap, overlap or go beyond their parameter; empty: every element is held exactly once."""
    faults = []
    for name, shape in ((name, shape) for group in groups for name, shape in group.parameters):
        end = 0
        for start, size, rank in found[name]:
            if start != end:
                faults.append(f"{name}: {'gap' if start > end else 'overlap'} before element {start} (rank {rank})")
            end = start + size
        if end != math.prod(shape):
            faults.append(f"{name}: pieces end at {end} of {math.prod(shape)}")
    return faults


def state_bytes(groups: Sequence[Group], stage: int, world: int, ep: int, rank: int) -> int:
    """fp32 master, two moments and the teacher's average of what a rank answers for."""
    return 16 * sum(size for _, _, size in owned(groups, stage, world, ep, rank))
