"""Samples from object storage: large ranges, several in flight, ahead of their use, in a bounded arena of re-used memory.

The coming samples of a rank are known. A planner thread takes as many as fit into one of ARENAS equal pieces of
`data.read_ahead_mb`, joins neighbours in the same shard into ranges of at most `data.range_mb`, and hands them to I/O
threads; the next piece is planned as soon as its memory is free. Samples are read in the order of use and released by the
decoder, so the oldest outstanding sample can always go on: there is no deadlock and no more memory than stated (a sample
larger than a piece makes that piece as large as the sample).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cluster.errors import RunFailure
from pipeline.config import DataConfig
from pipeline.reader.cache import DiskCache
from pipeline.reader.faults import BadSample, FaultLog, RetryPolicy, with_retries
from pipeline.reader.ranges import Ranges
from pipeline.reader.spans import SpanParts, Spans

ARENAS = 4
GAP_BYTES = 16 << 10  # neighbours further apart than this are not worth reading through: tar headers, an unused member


@dataclasses.dataclass
class _Arena:
    """One piece of the read-ahead memory. left: samples in it that are not released yet."""

    memory: memoryview
    left: int = 0


@dataclasses.dataclass
class _Place:
    """Where a coming sample will be: its bytes of an arena are there when all futures are done."""

    arena: _Arena
    begin: int
    end: int
    reads: list[Future[None]]


@dataclasses.dataclass
class Run:
    """Neighbouring samples read together: bytes [start, stop) of one shard."""

    shard: int
    start: int
    stop: int
    items: list[int]  # indices into the planned samples


def runs(shard: list[int], start: list[int], stop: list[int], limit: int) -> list[Run]:
    """Joins samples of one shard that lie next to each other into runs of at most `limit` bytes (or one sample)."""
    found: list[Run] = []
    for item in sorted(range(len(shard)), key=lambda i: (shard[i], start[i])):
        last = found[-1] if found else None
        near = last is not None and last.shard == shard[item] and start[item] - last.stop <= GAP_BYTES
        if last is not None and near and max(stop[item], last.stop) - last.start <= limit:
            last.stop = max(stop[item], last.stop)
            last.items.append(item)
        else:
            found.append(Run(shard[item], start[item], stop[item], [item]))
    return sorted(found, key=lambda run: min(run.items))


class RemoteFetcher:
    """Shard sets in object storage, with read-ahead and an optional disk cache."""

    def __init__(
        self, spans: Spans, ranges: Ranges, data: DataConfig, policy: RetryPolicy, faults: FaultLog, hashes: list[str]
    ) -> None:
        """hashes: sha256 of each shard, for names in the cache."""
        self._spans, self._ranges, self._policy, self._faults, self._hashes = spans, ranges, policy, faults, hashes
        self._range_bytes = data.range_mb << 20
        self._arena_bytes = max((data.read_ahead_mb << 20) // ARENAS, 1)
        self._arenas = [_Arena(memoryview(b"")) for _ in range(ARENAS)]
        self._cache = DiskCache(data.cache_dir, int(data.cache_gb * 1e9), faults) if data.cache_dir else None
        in_flight = min(max(data.read_ahead_mb // data.range_mb, 2), 16)
        self._pool = ThreadPoolExecutor(in_flight, "range")
        self._stopping, lock = threading.Event(), threading.Lock()
        # one lock, two reasons to wait: waking the planner for each sample that is let go would cost more than the planning
        self._planned, self._emptied = threading.Condition(lock), threading.Condition(lock)
        self._places: dict[int, _Place] = {}
        self._failure: BaseException | None = None
        self._planner: threading.Thread | None = None
        self.bytes_read = 0

    def follow(self, rows: Iterator[int]) -> None:
        self._end_planner()
        self._stopping.clear()
        self._places, self._failure = {}, None
        for arena in self._arenas:
            arena.left = 0
        self._planner = threading.Thread(target=self._plan_all, args=(rows,), name="read-ahead", daemon=True)
        self._planner.start()

    def get(self, ticket: int, row: int) -> SpanParts:
        place = self._place(ticket)
        try:
            for read in place.reads:
                read.result()
        except BadSample:  # perhaps only its neighbour in the same range: ask for this one alone
            return self.again(row)
        return SpanParts(place.arena.memory[place.begin : place.end], self._spans.start[row])

    def release(self, ticket: int) -> None:
        with self._emptied:
            place = self._places.pop(ticket, None)
            if place is not None:
                place.arena.left -= 1
                if place.arena.left == 0:
                    self._emptied.notify()

    def again(self, row: int) -> SpanParts:
        if self._cache is not None:
            self._cache.drop(self._cached(row))
        view = memoryview(bytearray(self._spans.stop[row] - self._spans.start[row]))
        self._read(self._spans.shard[row], self._spans.start[row], view)
        if self._cache is not None:
            self._cache.put(self._cached(row), view)
        return SpanParts(view, self._spans.start[row])

    def close(self) -> None:
        self._stopping.set()  # before the sockets go: what fails now is not tried again
        self._ranges.close()
        self._end_planner()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _end_planner(self) -> None:
        self._stopping.set()
        with self._planned:
            self._planned.notify_all()
            self._emptied.notify_all()
        if self._planner is not None:
            self._planner.join()
        for place in list(self._places.values()):
            for read in place.reads:
                if not read.cancel():
                    read.exception()  # waits: it may still write to the arena

    def _place(self, ticket: int) -> _Place:
        with self._planned:
            while ticket not in self._places:
                if self._failure is not None:
                    raise self._failure
                if self._stopping.is_set() or not threading.main_thread().is_alive():
                    raise RunFailure("the reader was closed")
                self._planned.wait(1.0)
            return self._places[ticket]

    # --- the planner thread

    def _plan_all(self, rows: Iterator[int]) -> None:
        try:
            ticket, number, waiting = 0, 0, next(rows, None)
            while waiting is not None and not self._stopping.is_set():
                # a sixteenth is left for what lies between neighbours, or a piece would often have to grow
                limit = self._arena_bytes * 15 // 16
                limit = limit if number else min(self._range_bytes, limit)  # the first piece: be quick
                taken, size = [waiting], self._size(waiting)
                waiting = next(rows, None)
                while waiting is not None and size + self._size(waiting) <= limit:
                    taken.append(waiting)
                    size += self._size(waiting)
                    waiting = next(rows, None)
                arena = self._arenas[number % ARENAS]
                if not self._wait_for(arena):
                    return
                self._plan(arena, taken, ticket)
                ticket, number = ticket + len(taken), number + 1
        except BaseException as error:
            with self._planned:
                self._failure = error
                self._planned.notify_all()

    def _size(self, row: int) -> int:
        return self._spans.stop[row] - self._spans.start[row]

    def _wait_for(self, arena: _Arena) -> bool:
        with self._emptied:
            while arena.left > 0:
                if self._stopping.is_set():
                    return False
                self._emptied.wait()
        return not self._stopping.is_set()

    def _plan(self, arena: _Arena, rows: list[int], first_ticket: int) -> None:
        """Gives every sample its place in the arena and starts the reads."""
        spans = self._spans
        found = runs(
            [spans.shard[r] for r in rows],
            [spans.start[r] for r in rows],
            [spans.stop[r] for r in rows],
            self._range_bytes,
        )
        total = sum(run.stop - run.start for run in found)
        if len(arena.memory) < total:
            arena.memory = memoryview(bytearray(max(total, self._arena_bytes)))
        places: dict[int, _Place] = {}
        at = 0
        for run in found:
            reads = self._start(run, arena.memory[at : at + run.stop - run.start], [rows[item] for item in run.items])
            for item in run.items:
                begin = at + spans.start[rows[item]] - run.start
                places[first_ticket + item] = _Place(arena, begin, begin + self._size(rows[item]), reads)
            at += run.stop - run.start
        with self._planned:
            arena.left = len(rows)
            self._places |= places
            self._planned.notify_all()

    def _start(self, run: Run, view: memoryview, rows: list[int]) -> list[Future[None]]:
        """Starts the reads of one run: from the cache where all of it is there, else from storage in one or more ranges."""
        if self._cache is not None:
            return [self._pool.submit(self._read_cached, run, view, rows)]
        step = self._range_bytes
        return [
            self._pool.submit(self._read, run.shard, run.start + cut, view[cut : cut + step])
            for cut in range(0, len(view), step)
        ]

    # --- I/O threads

    def _read(self, shard: int, offset: int, view: memoryview) -> None:
        url = self._spans.urls[shard]
        what = f"{url}, bytes {offset} to {offset + len(view)}"
        with_retries(
            lambda: self._ranges.read_into(url, offset, view), what, self._policy, self._faults, self._stopping
        )
        self.bytes_read += len(view)

    def _read_cached(self, run: Run, view: memoryview, rows: list[int]) -> None:
        assert self._cache is not None
        parts = {row: view[self._spans.start[row] - run.start : self._spans.stop[row] - run.start] for row in rows}
        missing = [row for row, part in parts.items() if not self._cache.read_into(self._cached(row), part)]
        if not missing:
            return
        if len(missing) < len(parts):
            for row in missing:
                self._read(run.shard, self._spans.start[row], parts[row])
        else:
            self._read(run.shard, run.start, view)
        for row in missing:
            self._cache.put(self._cached(row), parts[row])

    def _cached(self, row: int) -> Path:
        assert self._cache is not None
        return self._cache.path(self._hashes[self._spans.shard[row]], self._spans.start[row], self._spans.stop[row])
