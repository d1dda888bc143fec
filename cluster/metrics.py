"""The metrics of a run: lines that are appended, never rewritten, whatever the storage; merged when they are read.

On a file system they stand in one file, `metrics.jsonl`. An object store cannot append, so there each start of the run writes
segments, every SEGMENT_S seconds one new object with the lines since the last:

    metrics/START-FROM-FIRST-LAST.jsonl     START: which start of the run, by its lease; FROM: the step it continued after;
                                            FIRST to LAST: which of its segments these are

GATHER segments are gathered into one, so that every line is written twice in all and a long run leaves hundreds of objects, not
tens of thousands. Reading takes the starts in order: one that continued after FROM drops what earlier starts logged beyond
it. So nothing has to be removed on a resume, and what a start writes that has been cut off and does not know it counts nothing:
its number is that of its lease, so it never comes after its successor's, also where it was frozen before it wrote its first
segment.
`metrics.jsonl` beside them (of an older version, or made by `python -m pipeline sync`) counts as the first start of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Protocol

from cluster import storage
from cluster.errors import RunFailure

FILE, FOLDER = "metrics.jsonl", "metrics"
SEGMENT_S = 60.0
GATHER = 64
LEASED = 100_000
"""Starts with a lease are numbered from here: after those of versions that counted them."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 15.0  # between attempts while the storage is away
SYNC_S, CLOSE_S = 600.0, 60.0  # how long a checkpoint and the end of a run wait for it
_SEGMENT = re.compile(r"(\d{6})-(\d{10})-(\d{8})-(\d{8})\.jsonl$")
log = logging.getLogger(__name__)

Line = tuple[int, bytes]


class Writer(Protocol):
    """Where lines go. One thread appends."""

    def append(self, line: bytes) -> None:
        """Takes a line without waiting for the storage and without failing with it."""

    def sync(self) -> None:
        """Returns when every line so far is durable. Raises RunFailure where the storage stays away."""

    def close(self) -> None:
        """Syncs and lets go."""


def open_writer(
    url: str,
    step: int,
    guard: Callable[[], None] = lambda: None,
    replace: Callable[[bytes], None] | None = None,
    epoch: int | None = None,
) -> Writer:
    """Continues the metrics of the run at `url` after `step`: later lines no longer count.

    guard: called before an object store is written to, from another thread; raises RunFailure to stop writing for good.
    replace: writes the file of a file system anew, for who holds the directory (`cluster.lease`); later lines are appended to
    that very file, so that those of a start that has lost the directory go nowhere.
    epoch: number of the lease under which this start writes; None: without one (a tool beside the run).
    """
    if storage.is_local(url):
        return FileWriter(url, [line for number, line in read_lines(url) if number <= step], replace)
    if epoch is None:
        return SegmentWriter(url, _new_start(url, step), step, guard)
    start = LEASED + epoch
    storage.create(segment_url(url, start, step, 0, 0), b"")  # there already: this very call, tried twice
    return SegmentWriter(url, start, step, guard)


def read_lines(url: str) -> list[Line]:
    """(step, line) of the run at `url`, in order of steps, each once; a torn line (killed while writing) is left out."""
    try:
        found = [(0, 0, parse(storage.read_bytes(storage.join(url, FILE))))]
    except FileNotFoundError:
        found = []
    if not storage.is_local(url):
        found += _read_segments(url)
    return merge(found)


def merge(starts: Iterable[tuple[int, int, Sequence[Line]]]) -> list[Line]:
    """Lines of (start, step it continued after, its lines), in any order, as the run has them: pure."""
    steps: dict[int, bytes] = {}
    at = None
    for start, step, lines in sorted(starts, key=lambda item: item[0]):
        if start != at:
            steps = {number: line for number, line in steps.items() if number <= step}
            at = start
        steps.update(lines)
    return sorted(steps.items())


def parse(data: bytes) -> list[Line]:
    """The complete lines of a piece."""
    lines = []
    for line in data.splitlines():
        try:
            lines.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def write_merged(url: str) -> int:
    """Makes `metrics.jsonl` of the segments of an object store, for tools that want one file; returns its lines."""
    lines = read_lines(url)
    if lines and not storage.is_local(url):
        storage.write_atomic(storage.join(url, FILE), b"".join(line + b"\n" for _, line in lines))
    return len(lines)


def _segments(url: str) -> list[tuple[int, int, int, int, str]]:
    """(start, step it continued after, first, last, name), those left out that a gathered one holds; by start and first."""
    found = []
    for name in storage.list_names(storage.join(url, FOLDER)):
        match = _SEGMENT.match(name)
        if match:
            start, step, first, last = map(int, match.groups())
            found.append((start, step, first, last, name))
    kept: list[tuple[int, int, int, int, str]] = []
    for segment in sorted(found, key=lambda s: (s[0], s[2], -s[3])):
        if kept and kept[-1][0] == segment[0] and segment[3] <= kept[-1][3]:
            continue
        kept.append(segment)
    return kept


def _read_segments(url: str) -> list[tuple[int, int, list[Line]]]:
    def read(segment: tuple[int, int, int, int, str]) -> tuple[int, int, list[Line]]:
        start, step, _, _, name = segment
        return start + 1, step, parse(storage.read_bytes(storage.join(url, FOLDER, name)))

    for _ in range(3):
        try:
            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(read, _segments(url)))
        except FileNotFoundError:  # gathered meanwhile by the run that writes them
            continue
    raise RunFailure(f"{storage.join(url, FOLDER)} changes faster than it can be read: try again")


def _new_start(url: str, step: int) -> int:
    """Takes the next number for a start; its empty first segment is what makes earlier lines beyond `step` void."""
    start = max((segment[0] for segment in _segments(url)), default=-1) + 1
    while not storage.create(segment_url(url, start, step, 0, 0), b""):
        start += 1
    return start


def segment_url(url: str, start: int, step: int, first: int, last: int) -> str:
    return storage.join(url, FOLDER, f"{start:06d}-{step:010d}-{first:08d}-{last:08d}.jsonl")


class FileWriter:
    """Appends to `metrics.jsonl` on a file system; a full disk keeps the lines until there is room."""

    def __init__(self, url: str, kept: Sequence[bytes], replace: Callable[[bytes], None] | None = None) -> None:
        self._url = storage.join(url, FILE)
        data = b"".join(line + b"\n" for line in kept)
        storage.write_atomic(self._url, data) if replace is None else replace(data)
        self._file: IO[bytes] = open(storage.local_path(self._url), "ab", buffering=0)  # noqa: SIM115  (kept over the run)
        self._end = self._file.tell()
        self._pending: list[bytes] = []
        self._error: OSError | None = None

    def append(self, line: bytes) -> None:
        self._pending.append(line)
        self._write()

    def _write(self) -> None:
        """Whole lines or, where the disk fails in the middle of one, nothing of it."""
        data = b"".join(line + b"\n" for line in self._pending)
        try:
            done = self._file.write(data)
            if done != len(data):
                raise OSError(f"only {done} of {len(data)} bytes could be written")
        except OSError as error:
            if self._error is None:
                log.warning("%s: %s; %d lines are kept and tried again", self._url, error, len(self._pending))
            self._error = error
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            return
        self._end, self._pending, self._error = self._end + len(data), [], None

    def sync(self) -> None:
        if self._pending:
            self._write()
        if self._error is not None:
            raise RunFailure(f"{self._url}: {len(self._pending)} lines cannot be written: {self._error}")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


class SegmentWriter:
    """Appends to an object store from a thread: lines wait in memory, also through an outage, until a segment holds them."""

    def __init__(
        self, url: str, start: int, step: int, guard: Callable[[], None], every_s: float = SEGMENT_S, gather: int = GATHER,
        sync_s: float = SYNC_S,
    ) -> None:  # fmt: skip
        self._url, self._start, self._step, self._guard = url, start, step, guard
        self._every_s, self._gather, self._sync_s = every_s, gather, sync_s
        self._wake = threading.Condition()
        self._pending: list[bytes] = []
        self._stored = self._taken = 0  # lines that are durable, and that were appended
        self._hurry = self._closing = False
        self._error: Exception | None = None
        self._fenced: RunFailure | None = None
        self._number = 1  # of the next segment; 0 is the mark of the start
        self._ungathered: list[bytes] = []  # the segments since the last gathering
        self._thread: threading.Thread | None = None

    def append(self, line: bytes) -> None:
        with self._wake:
            self._pending.append(line)
            self._taken += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
                self._thread.start()

    def sync(self) -> None:
        self._wait_durable(self._sync_s)

    def close(self) -> None:
        try:
            self._wait_durable(min(CLOSE_S, self._sync_s))
        finally:
            with self._wake:
                self._closing = True
                self._wake.notify_all()
            if self._thread is not None:
                self._thread.join(5.0)

    def _wait_durable(self, patience_s: float) -> None:
        with self._wake:
            wanted, self._hurry = self._taken, True
            self._wake.notify_all()
            done = self._wake.wait_for(lambda: self._stored >= wanted or self._fenced is not None, patience_s)
            if self._fenced is not None:
                raise self._fenced
            if not done:
                raise RunFailure(
                    f"{storage.join(self._url, FOLDER)}: {wanted - self._stored} lines of metrics could not be stored in "
                    f"{patience_s:.0f} s: {self._error}"
                )

    def _run(self) -> None:
        wait_s = self._every_s
        while True:
            with self._wake:
                away = self._error is not None
                self._wake.wait_for(lambda: self._closing or (not away and self._hurry and bool(self._pending)), wait_s)  # noqa: B023
                if self._closing:
                    return
                self._hurry, lines = self._hurry and away, list(self._pending)
            try:
                if lines:
                    self._guard()
                    self._store(lines)
                wait_s, self._error = self._every_s, None
            except Exception as error:
                if isinstance(error, RunFailure) and error.__cause__ is None:  # the guard's; an outage has a cause
                    with self._wake:
                        self._fenced = error
                        self._wake.notify_all()
                    return
                if self._error is None:
                    log.warning("metrics wait for their storage, the run goes on: %s", " ".join(str(error).split()))
                wait_s = FIRST_WAIT_S if self._error is None else min(wait_s * 2, LONGEST_WAIT_S)
                self._error = error

    def _store(self, lines: list[bytes]) -> None:
        data, number = b"".join(line + b"\n" for line in lines), self._number
        storage.write_atomic(segment_url(self._url, self._start, self._step, number, number), data)
        self._number += 1
        self._ungathered.append(data)
        with self._wake:
            del self._pending[: len(lines)]
            self._stored += len(lines)
            self._wake.notify_all()
        if len(self._ungathered) >= self._gather:
            self._gather_now()

    def _gather_now(self) -> None:
        last = self._number - 1
        first = last - len(self._ungathered) + 1
        storage.write_atomic(segment_url(self._url, self._start, self._step, first, last), b"".join(self._ungathered))
        self._ungathered = []
        single = [segment_url(self._url, self._start, self._step, number, number) for number in range(first, last + 1)]
        storage.remove_all(single)
