"""The storage door and the run directory on a real S3 server, and what they say when it is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import metrics, storage
from cluster.errors import Fenced, RunFailure
from cluster.lease import Lease, history
from cluster.rundir import RunDir
from tests import storage_contract
from tests.s3_server import S3Server

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("check", storage_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None], s3_url: str) -> None:
    check(s3_url)


def test_uploads_arrive(s3_url: str, tmp_path: Path) -> None:
    storage_contract.uploads_arrive(s3_url, str(tmp_path / "source"))


def test_run_directory_on_s3(s3_url: str) -> None:
    first = RunDir(s3_url)
    first.claim()
    first.start_metrics(0)
    for step in (1, 2, 3):
        first.append_metrics({"step": step, "loss": 0.1})
    first.sync()
    second = RunDir(s3_url)
    second.claim()
    second.start_metrics(2)
    second.append_metrics({"step": 3, "loss": 0.2})
    second.close()
    assert [line["loss"] for line in RunDir(s3_url).read_metrics()] == [0.1, 0.1, 0.2]
    with pytest.raises(RunFailure, match="later start"):
        first.check_claim()


def test_an_endpoint_that_is_away_is_one_line(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises((RunFailure, OSError)) as caught:
            storage.read_bytes(storage.join(s3_url, "a"))
        assert "127.0.0.1:9" in str(caught.value)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


class Door:
    """Who goes through the door to storage, how many bytes of lines were handed over, and how many were written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: set[str] = set()
        self.given = self.written = 0
        filesystem, write, append = storage.filesystem, storage.write_atomic, metrics.SegmentWriter.append

        def entered(url: str) -> tuple[Any, str]:
            self.threads.add(threading.current_thread().name)
            return filesystem(url)

        def counted(url: str, data: bytes) -> None:
            write(url, data)
            self.written += len(data)

        def taken(writer: metrics.SegmentWriter, line: bytes) -> None:
            self.given += len(line) + 1
            append(writer, line)

        monkeypatch.setattr(storage, "filesystem", entered)
        monkeypatch.setattr(metrics.SegmentWriter, "append", taken)
        monkeypatch.setattr(storage, "write_atomic", counted)


def test_metrics_of_a_long_run_are_linear_and_outlive_the_server(
    s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 lines in 142 checkpoints; the server is killed on the way and comes back; another start then goes back over the last
    lines. Every line is written once, and once more when its segment is gathered, however long the run."""
    run, door = RunDir(s3_url), Door(monkeypatch)
    run.claim()
    run.start_metrics(0)
    missed = threading.Event()
    monkeypatch.setattr(metrics.log, "warning", lambda *_: missed.set())
    saver = ThreadPoolExecutor(1, "saver")  # checkpoints are committed by a thread, too
    for step in range(1, 100_001):
        run.append_metrics({"step": step, "loss": 1.0 / step, "samples": step * 1024})
        if step % 700 == 0 and not 50_000 <= step < 60_000:
            saver.submit(run.sync).result()
            assert door.written <= 2 * door.given
        if step == 49_999:
            s3_server.kill()
            door.threads.clear()
        if step == 50_000:
            outlived = saver.submit(run.sync)
            assert missed.wait(120)
        if step == 59_999:
            assert not outlived.done()
            assert "MainThread" not in door.threads  # the loop has not waited for anything
            s3_server.start()
            outlived.result()
    run.close()
    assert door.given < door.written <= 2 * door.given
    later = RunDir(s3_url)
    later.start_metrics(99_990)
    later.append_metrics({"step": 99_991, "loss": 2.0})
    later.close()
    found = RunDir(s3_url).read_metrics()
    assert [line["step"] for line in found] == list(range(1, 99_992))
    assert found[-1]["loss"] == 2.0
    assert len(storage.list_names(f"{s3_url}/metrics")) < 80


def test_a_write_under_way_during_a_takeover_does_not_survive_it(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start has looked at the version and the lease, is frozen, and sends its write after the second's."""
    first, target = Lease.acquire(s3_url), storage.join(s3_url, "tracked.json")
    first.write(target, b"before")
    replace = storage.replace

    def frozen(url: str, data: bytes, expected: str | None) -> bool:
        monkeypatch.setattr(storage, "replace", replace)
        Lease.acquire(s3_url).write(target, b"of the second")
        return replace(url, data, expected)

    monkeypatch.setattr(storage, "replace", frozen)
    with pytest.raises(Fenced, match="a later start"):
        first.write(target, b"of the first")
    assert storage.read_bytes(target) == b"of the second"
    assert [record["epoch"] for record in history(s3_url)] == [1, 2]


def test_of_many_starts_at_once_each_gets_its_own_number(s3_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: Lease.acquire(s3_url).epoch, range(6)))
    assert sorted(found) == list(range(1, 7))
