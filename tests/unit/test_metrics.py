"""Metrics are appended, never rewritten: what is written, what an outage and a full disk leave, what a cut-off start counts."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import metrics, storage
from cluster.errors import RunFailure
from cluster.metrics import FileWriter, SegmentWriter, merge, read_lines


def line(step: int, **more: object) -> bytes:
    return json.dumps({"step": step, **more}).encode()


def steps(url: str) -> list[int]:
    return [number for number, _ in read_lines(url)]


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def writer(url: str, step: int = 0, start: int | None = None, **options: object) -> SegmentWriter:
    number = metrics._new_start(url, step) if start is None else start
    return SegmentWriter(url, number, step, **{"guard": lambda: None, **options})  # type: ignore[arg-type]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    written: list[tuple[str, int]] = []
    write = storage.write_atomic

    def counting(where: str, data: bytes) -> None:
        written.append((where, len(data)))
        write(where, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", counting)
        yield written


def test_every_line_is_written_twice_at_most_and_objects_stay_few(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as written:
        out = writer(url, gather=8)
        for step in range(1, 101):
            out.append(line(step, loss=0.25))
            out.sync()
        out.close()
    assert steps(url) == list(range(1, 101))
    size = sum(len(text) + 1 for _, text in read_lines(url))
    assert size <= sum(count for _, count in written) <= 2 * size
    assert len(storage.list_names(f"{url}/metrics")) == 1 + 100 // 8 + 100 % 8
    assert metrics.write_merged(url) == 100
    assert steps(url) == list(range(1, 101))


def test_an_outage_keeps_the_lines_and_nobody_waits(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(metrics, "LONGEST_WAIT_S", 0.02)
    write, there, failed = storage.write_atomic, threading.Event(), threading.Event()

    def away(where: str, data: bytes) -> None:
        if not there.is_set():
            failed.set()
            raise ConnectionError("no route to storage")
        write(where, data)

    monkeypatch.setattr(storage, "write_atomic", away)
    out = writer(url, every_s=0.01)
    out.append(line(1))
    assert failed.wait(10)
    for step in range(2, 50):
        out.append(line(step))
    assert steps(url) == []
    there.set()
    out.close()
    assert steps(url) == list(range(1, 50))


def test_an_outage_that_lasts_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(where: str, data: bytes) -> None:
        raise ConnectionError("no route to storage")

    monkeypatch.setattr(storage, "write_atomic", away)
    monkeypatch.setattr(metrics, "FIRST_WAIT_S", 0.001)
    out = writer(url, sync_s=0.05)
    out.append(line(1))
    with pytest.raises(RunFailure, match=r"metrics: 1 lines of metrics could not be stored.*no route to storage"):
        out.close()


def test_a_start_that_was_cut_off_counts_nothing_more(url: str) -> None:
    zombie = writer(url)
    for step in (1, 2, 3, 4):
        zombie.append(line(step, who="first"))
    zombie.sync()
    heir = writer(url, step=2)
    heir.append(line(3, who="second"))
    heir.sync()
    zombie.append(line(5, who="first"))
    zombie.close()
    found = {number: json.loads(text)["who"] for number, text in read_lines(url)}
    heir.close()
    assert found == {1: "first", 2: "first", 3: "second"}


def test_a_guard_stops_it_for_good(url: str) -> None:
    def fenced() -> None:
        raise RunFailure("a later start of this run writes here now")

    out = writer(url, guard=fenced)
    out.append(line(1))
    for _ in range(2):
        with pytest.raises(RunFailure, match="a later start"):
            out.sync()
    assert steps(url) == []


def test_gathered_twice_counts_once(url: str) -> None:
    """Killed between writing the gathered segment and removing its parts."""
    storage.write_atomic(metrics.segment_url(url, 0, 0, 0, 0), b"")
    for number in (1, 2, 3):
        storage.write_atomic(metrics.segment_url(url, 0, 0, number, number), line(number) + b"\n")
    storage.write_atomic(metrics.segment_url(url, 0, 0, 1, 2), line(1) + b"\n" + line(2) + b"\n")
    assert [s[2:4] for s in metrics._segments(url)] == [(0, 0), (1, 2), (3, 3)]
    assert steps(url) == [1, 2, 3]


def test_two_starts_at_once_are_two(url: str) -> None:
    assert [metrics._new_start(url, step) for step in (0, 0, 5)] == [0, 1, 2]


def test_an_older_file_is_continued(url: str) -> None:
    storage.write_atomic(f"{url}/metrics.jsonl", b"".join(line(n) + b"\n" for n in range(1, 8)))
    out = writer(url, step=5)
    out.append(line(6))
    out.close()
    assert steps(url) == [1, 2, 3, 4, 5, 6]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6)), max_size=6))
def test_merging_is_what_appending_and_truncating_one_file_would_be(starts: list[tuple[int, int]]) -> None:
    plain: list[tuple[int, bytes]] = []
    found = []
    for start, (step, count) in enumerate(starts):
        step = min(step, plain[-1][0] if plain else 0)
        lines = [(n, line(n, start=start)) for n in range(step + 1, step + count + 1)]
        plain = [item for item in plain if item[0] <= step] + lines
        found += [(start, step, lines[:2]), (start, step, lines[2:])]
    assert merge(found) == plain


def test_a_full_disk_keeps_the_lines_and_tears_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = FileWriter(str(tmp_path), [])
    out.append(line(1))
    real = out._file

    class Full:
        """As a disk does that fills up in the middle of a line."""

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def write(self, data: bytes) -> int:
            real.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    out._file = Full()  # type: ignore[assignment]
    for step in (2, 3):
        out.append(line(step))
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + b"\n"
    with pytest.raises(RunFailure, match=r"2 lines cannot be written.*No space left"):
        out.sync()
    out._file = real
    out.append(line(4))
    out.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(line(n) + b"\n" for n in (1, 2, 3, 4))
