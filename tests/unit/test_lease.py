"""The lease: exactly one holder per number, and nothing of an earlier holder lands, however late its writes come."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from pathlib import Path

import pytest

from cluster import lease as leases
from cluster import logs, metrics, storage
from cluster.errors import Fenced
from cluster.exit_codes import FENCED
from cluster.lease import Lease
from cluster.rundir import RunDir
from pipeline.probes.outcomes import Outcomes, keep_round
from pipeline.tracking import RunFacts
from pipeline.tracking.mirror import Mirror, add_event, read_record, set_status, write_record
from pipeline.tracking.store import MemoryStore
from pipeline.tracking.tracker import Tracker


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_numbers_grow_and_each_has_one_holder(tmp_path: Path) -> None:
    found: list[Lease] = []
    threads = [threading.Thread(target=lambda: found.append(Lease.acquire(str(tmp_path)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.epoch for lease in found) == list(range(1, 9))
    assert len({lease.record["token"] for lease in found}) == 8
    holders = [lease for lease in found if not _is_fenced(lease)]
    assert [lease.epoch for lease in holders] == [8]
    assert [record["epoch"] for record in leases.history(str(tmp_path))] == list(range(1, 9))


def _is_fenced(lease: Lease) -> bool:
    try:
        lease.check()
    except Fenced:
        return True
    return False


def test_an_earlier_holder_cannot_write_check_or_remove(url: str) -> None:
    first = Lease.acquire(url)
    target = storage.join(url, "a.json")
    first.write(target, b"1")
    second = Lease.acquire(url)
    second.write(target, b"2")
    for action in (first.check, lambda: first.write(target, b"late"), lambda: first.remove(target)):
        with pytest.raises(Fenced, match="a later start of this run on"):
            action()
    assert first.is_lost
    assert not second.is_lost
    assert storage.read_bytes(target) == b"2"
    assert Fenced.exit_code == FENCED


def test_a_write_stopped_after_its_check_does_not_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is frozen between the look at the lease and the rename, and thawed when another has taken over."""
    url, target = str(tmp_path), str(tmp_path / "tracked.json")
    first, rename = Lease.acquire(url), os.replace

    def frozen(source: str, name: str) -> None:
        monkeypatch.setattr(os, "replace", rename)
        Lease.acquire(url).write(target, b"of the second")
        rename(source, name)

    monkeypatch.setattr(os, "replace", frozen)
    with pytest.raises(Fenced):
        first.write(target, b"of the first")
    assert (tmp_path / "tracked.json").read_bytes() == b"of the second"
    assert first.is_lost
    assert [name for name in os.listdir(tmp_path / "lease") if "staging" in name] == ["00000002.staging"]


def test_other_ranks_hold_the_same_lease(url: str) -> None:
    first = Lease.acquire(url)
    other = Lease.of(url, first.record)
    assert other is not None
    other.write(storage.join(url, "x"), b"1")
    Lease.acquire(url)
    with pytest.raises(Fenced):
        other.write(storage.join(url, "x"), b"2")


def test_who_overtook_whom(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for job, restart in (("7", 0), ("7", 1), ("8", 0)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        Lease.acquire(url)
    by = leases.overtaken(url, "7", 1)
    assert by is not None
    assert by["job"] == "8"
    assert leases.overtaken(url, "8", 0) is None
    assert leases.overtaken(url, "9", 0) is None  # never had it


def test_a_fenced_start_changes_no_file_and_no_run(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a start writes, tried by a fenced one: run directory and store stay as the successor left them."""
    store = MemoryStore()
    first = _started(url, store)
    tracker = Tracker(first, store, flush_s=0.01)
    first.append_metrics({"step": 1, "samples": 8, "loss": 1.0})
    second = _started(url, store)
    second.append_metrics({"step": 1, "samples": 8, "loss": 2.0})
    second.sync()
    mirror = Mirror(second, store)
    mirror.send(second.read_metrics())
    before, runs = _content(url), repr(store.runs)

    attempts = {
        "metrics": lambda: (first.append_metrics({"step": 2, "samples": 16, "loss": 1.0}), first.sync()),
        "sync": first.sync if "memory" in url else first.check_claim,
        "resolved": lambda: first.write_resolved({"a": 2}),
        "run id": lambda: setattr(first, "run_id", "other"),
        "status": lambda: set_status(first, "FAILED"),
        "event": lambda: add_event(first, "x", 1, {}),
        "send": lambda: Mirror(first, store).send([{"step": 3, "samples": 1, "loss": 1.0}]),
        "end": lambda: Mirror(first, store).end("KILLED"),
    }
    for name, attempt in attempts.items():
        with pytest.raises(Fenced):
            attempt()
        assert _content(url) == before, name
    logs.record_failure(first.logs_url, 0, 5, RuntimeError("mine"), first.lease)
    tracker.log(2, 16, {"loss": 1.0})
    tracker.tag("a", "b")
    tracker.checkpoint("x", 2)
    tracker.close("FAILED")
    keep_round(Outcomes("ab" * 8, (), {}), Outcomes("ab" * 8, (), {}), url, 3, first.lease)
    assert _content(url) == before
    assert repr(store.runs) == runs
    assert read_record(second)["status"] == "RUNNING"


def test_a_listing_that_lags_gives_no_number_twice(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows no lease at all for a while."""
    first, look = Lease.acquire(url), leases.newest_epoch
    looks: list[int] = []
    monkeypatch.setattr(
        leases, "newest_epoch", lambda url: 0 if len(looks) < 200 and not looks.append(1) else look(url)
    )
    assert Lease.acquire(url).epoch == first.epoch + 1


def test_a_start_frozen_before_its_first_metrics_voids_nothing_of_its_successors(url: str) -> None:
    """It holds the directory, has logged nothing yet, and comes back when its successor is done: a start after step 0 would void
    all that earlier ones logged, and it is none after its successor."""
    first, second = RunDir(url), RunDir(url)
    first.claim()
    second.claim()
    second.start_metrics(0)
    for step in (1, 2, 3):
        second.append_metrics({"step": step, "loss": 1.0})
    second.close()
    with pytest.raises(Fenced):
        first.start_metrics(0)
    if "memory" in url:  # the look at the lease was right before the freeze: the write itself
        assert first.lease is not None
        metrics.open_writer(url, 0, epoch=first.lease.epoch)
    assert [line["step"] for line in second.read_metrics()] == [1, 2, 3]
    third = RunDir(url)
    third.claim()
    third.start_metrics(2)
    third.append_metrics({"step": 3, "loss": 2.0})
    third.close()
    assert [(line["step"], line["loss"]) for line in third.read_metrics()] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_fenced_start_logs_to_its_terminal_only(tmp_path: Path) -> None:
    lease, rank_log = Lease.acquire(str(tmp_path)), tmp_path / "logs" / "rank-00000.log"
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        logs.start_logging(str(tmp_path / "logs"), 0, lease=lease)
        logging.getLogger("x").info("before")
        Lease.acquire(str(tmp_path))
        logging.getLogger("x").info("after")
    finally:
        root.handlers[:] = handlers
    assert "before" in rank_log.read_text()
    assert "after" not in rank_log.read_text()


def _started(url: str, store: MemoryStore) -> RunDir:
    rundir = RunDir(url)
    rundir.claim()
    rundir.write_resolved({"a": 1})
    rundir.start_metrics(0)
    write_record(rundir, "test", "run", RunFacts())
    Mirror(rundir, store).open()
    return rundir


def _content(url: str) -> dict[str, bytes]:
    fs, path = storage.filesystem(url)
    return {name: fs.cat_file(name) for name in fs.find(path)}
