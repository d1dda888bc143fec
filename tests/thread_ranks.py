"""Ranks as threads of one process: enough to test what losses sum across ranks, without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor


class ThreadReduce:
    """`model.losses.reduce.Reduce` of one thread; sums in rank order, so every thread gets the same bits."""

    def __init__(self, rank: int, world: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self._slots, self._barrier = rank, world, slots, barrier

    def sum(self, value: Tensor) -> Tensor:
        self._slots[self.rank] = value.detach()
        self._barrier.wait()
        total = self._slots[0].clone()
        for part in self._slots[1:]:
            total = total + part
        self._barrier.wait()
        return total


def run_ranks(world: int, work: Callable[[int, ThreadReduce], Any]) -> list[Any]:
    """`work(rank, reduce)` on `world` threads; results by rank. A failing rank breaks the barrier for all."""
    slots: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def guarded(rank: int) -> Any:
        try:
            return work(rank, ThreadReduce(rank, world, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(world)]
        errors = [future.exception() for future in futures]
        real = [e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)]
        if real:
            raise real[0]
        return [future.result() for future in futures]
