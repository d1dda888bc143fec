"""Tracking: the run directory is the truth; whatever a store does, afterwards it holds each step once and equal."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from cluster.logs import record_failure
from cluster.rundir import RunDir
from pipeline.config import PretrainConfig, RunConfig, TrackingConfig
from pipeline.tracking import Dataset, RunFacts, open_tracker
from pipeline.tracking.facts import describe
from pipeline.tracking.mirror import (
    Mirror,
    add_event,
    points_of,
    ranges,
    read_events,
    set_status,
    status_now,
    write_record,
)
from pipeline.tracking.mlflow_store import check_uri
from pipeline.tracking.store import MemoryStore, StoreUnavailable
from pipeline.tracking.system import SystemSampler
from pipeline.tracking.tracker import Tracker

FACTS = RunFacts(2, "world=2 zero=2 ep=2", (Dataset("memory://shards", "a" * 64, "b" * 64, "train", 10),))


def _line(step: int) -> dict[str, float | int]:
    return {"step": step, "samples": step * 8, "time": 1000.0 + step, "loss": 1.0 / step, "moe/load": 0.5}


def _run(url: str, steps: int = 0) -> RunDir:
    rundir = RunDir(url)
    rundir.write_resolved(PretrainConfig(run=RunConfig(dir=url)))
    rundir.start_metrics(0)
    for step in range(1, steps + 1):
        rundir.append_metrics(_line(step))
    write_record(rundir, "test", "a run", FACTS)
    return rundir


@settings(max_examples=25, deadline=None)
@given(failures=st.lists(st.integers(0, 5), min_size=1, max_size=12), first=st.integers(0, 20))
def test_whatever_fails_the_store_ends_level(
    tmp_path_factory: pytest.TempPathFactory, failures: list[int], first: int
) -> None:
    rundir, store = _run(str(tmp_path_factory.mktemp("run")), 20), MemoryStore()
    mirror, lines = Mirror(rundir, store), rundir.read_metrics()
    for fail_next in [*failures, 0]:
        store.fail_next = fail_next
        try:
            mirror.send(lines[:first])
            mirror.send(lines)
            mirror.send_files()
        except StoreUnavailable:
            mirror = Mirror(rundir, store) if fail_next % 2 else mirror  # a restart, or the same process again
    assert mirror.differences() == []
    assert len(store.runs) == 1


class _ForgetfulStore(MemoryStore):
    """Takes the points, and loses the answer on the way: the case that doubles values elsewhere."""

    lose = 0

    def log_points(self, run_id, points):
        super().log_points(run_id, points)
        if self.lose > 0:
            self.lose -= 1
            raise StoreUnavailable("timed out")


def test_an_answer_lost_on_the_way_doubles_nothing(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path), 5), _ForgetfulStore()
    store.lose = 1
    mirror = Mirror(rundir, store)
    with pytest.raises(StoreUnavailable):
        mirror.send(rundir.read_metrics())
    assert mirror.send(rundir.read_metrics()) == 0
    assert mirror.differences() == []


def test_tracker_in_a_thread_survives_an_outage_and_ends_level(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path)), MemoryStore()
    store.fail_next = 1
    tracker = Tracker(rundir, store, flush_s=0.01)
    for step in range(1, 40):
        rundir.append_metrics(_line(step))
        tracker.log(step, step * 8, _line(step))
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"png")
    tracker.artifact(str(picture))
    tracker.checkpoint("s3://bucket/step-00000020", 20, {"probe/knn/fused": 0.5})
    tracker.close("FINISHED")
    (run,) = store.runs.values()
    assert tracker.failures >= 1
    assert Mirror(rundir, store).differences() == []
    assert run["status"] == "FINISHED"
    assert run["artifacts"]["plot.png"] == b"png"
    assert "resolved.json" in run["artifacts"]
    assert run["checkpoints"] == {("s3://bucket/step-00000020", 20): {"probe/knn/fused": 0.5}}
    assert run["params"]["model.moe.experts"] == "8"
    assert run["datasets"] == list(FACTS.datasets)
    assert run["tags"]["geoloom.layout"] == FACTS.layout


class _HangingStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def log_points(self, run_id, points):
        self.go.wait()
        super().log_points(run_id, points)


def test_logging_returns_while_the_store_hangs(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path)), _HangingStore()
    tracker = Tracker(rundir, store, flush_s=0.0)
    for step in range(1, 200):  # would never end if one call waited for the store
        rundir.append_metrics(_line(step))
        tracker.log(step, step * 8, _line(step))
    store.go.set()
    tracker.close()
    assert Mirror(rundir, store).differences() == []


class _TellingStore(MemoryStore):
    """Refuses points until `opened`, and tells when it has the step that is waited for."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.refused, self.opened, self.has_all = (
            last,
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )

    def log_points(self, run_id, points):
        if not self.opened.is_set():
            self.refused.set()
            raise StoreUnavailable("away")
        super().log_points(run_id, points)
        if any(point.step == self.last for point in points):
            self.has_all.set()


@pytest.mark.parametrize(("max_pending", "overflows"), [(4096, False), (10, True)])
def test_after_an_outage_the_run_directory_is_read_only_if_memory_overflowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_pending: int, overflows: bool
) -> None:
    monkeypatch.setattr("pipeline.tracking.tracker.MAX_PENDING", max_pending)
    monkeypatch.setattr("pipeline.tracking.tracker.FIRST_WAIT_S", 0.01)
    rundir, store = _run(str(tmp_path)), _TellingStore(40)
    store.opened.set()
    counted, read = [], rundir.read_metrics
    monkeypatch.setattr(rundir, "read_metrics", lambda: counted.append(1) or read())
    tracker = Tracker(rundir, store, flush_s=0.01)
    level = threading.Event()
    monkeypatch.setattr(tracker._mirror, "send_files", level.set)
    assert level.wait(60)  # the first look, which reads what an earlier start may have left
    store.opened.clear()
    for step in range(1, 41):
        tracker.log(step, step * 8, rundir.append_metrics(_line(step)))
    assert store.refused.wait(60)
    store.opened.set()
    assert store.has_all.wait(60)
    assert (len(counted) > 1) == overflows
    assert sorted(step for step, _ in store.history("run1", "samples")) == list(range(1, 41))
    tracker.close()


def test_resume_continues_the_run_and_no_step_stands_twice(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path), 10), MemoryStore()
    Mirror(rundir, store).send(rundir.read_metrics())  # killed after step 10, last checkpoint at step 6
    rundir.start_metrics(6)
    tracker = Tracker(RunDir(str(tmp_path)), store, flush_s=0.0)
    for step in range(7, 15):
        rundir.append_metrics(_line(step))
        tracker.log(step, step * 8, _line(step))
    tracker.close()
    assert len(store.runs) == 1
    assert Mirror(rundir, store).differences() == []


def test_differences_names_what_departs(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path), 3), MemoryStore()
    mirror = Mirror(rundir, store)
    mirror.send(rundir.read_metrics()[:2])
    store.log_points(mirror.open(), points_of(_line(1)))
    text = "\n".join(mirror.differences())
    assert "loss: 1 steps stand twice" in text
    assert "loss at step 3: store None, run directory" in text


def test_points_leave_out_what_is_no_number_and_put_the_marker_last() -> None:
    points = points_of(
        {"step": 4, "samples": 32, "time": 2.5, "loss": None, "note": "x", "lr": 0.1, "bad": float("inf")}
    )
    assert [(point.key, point.step, point.time_ms) for point in points] == [("lr", 4, 2500), ("samples", 4, 2500)]


def test_no_tracking_needs_no_store_and_keeps_files(tmp_path: Path) -> None:
    cfg = PretrainConfig(run=RunConfig(dir=str(tmp_path / "run")))
    rundir = RunDir(cfg.run.dir)
    rundir.write_resolved(cfg)
    tracker = open_tracker(cfg, rundir)
    tracker.log(1, 8, {"loss": 1.0})
    tracker.checkpoint("somewhere", 1)
    tracker.close()
    assert tracker.run_id is None
    assert read_events(rundir) == [{"url": "somewhere", "step": 1, "metrics": {}}]


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:///tmp/mlruns", "htp://x"])
def test_a_store_mlflow_cannot_open_is_refused_at_once(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tracking\.uri="):
        check_uri(uri)


def test_passwords_never_reach_the_store(tmp_path: Path) -> None:
    rundir, store = RunDir(str(tmp_path)), MemoryStore()
    uri = "postgresql://me:secret@host:5432/mlflow"
    rundir.write_resolved(PretrainConfig(tracking=TrackingConfig(uri=uri)))
    mirror = Mirror(rundir, store)
    mirror.send([])
    mirror.send_files()
    assert "secret" not in repr(store.runs)
    assert store.runs[mirror.open()]["params"]["tracking.uri"] == "postgresql://me:***@host:5432/mlflow"


def test_a_changed_setting_is_tagged_not_overwritten(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path)), MemoryStore()
    Mirror(rundir, store).open()
    rundir.write_resolved(PretrainConfig(run=RunConfig(dir="elsewhere")))
    run = store.runs[Mirror(rundir, store).open()]
    assert run["params"]["run.dir"] == str(tmp_path)
    assert run["tags"]["geoloom.changed.run.dir"] == f"{tmp_path} -> elsewhere"


def test_system_figures_are_finite_numbers() -> None:
    figures = SystemSampler().sample()
    assert figures["system/process_memory_gb"] > 0
    assert all(key.startswith("system/") and value >= 0 for key, value in figures.items())


def test_a_step_that_ran_twice_alike_keeps_its_first_record(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path), 10), MemoryStore()
    Mirror(rundir, store).send(rundir.read_metrics())
    rundir.start_metrics(6)
    again = [
        rundir.append_metrics(_line(step) | {"time": 5000.0 + step, "samples_per_s": 3.0}) for step in range(7, 10)
    ]
    changed = rundir.append_metrics(_line(10) | {"loss": 0.5, "samples_per_s": 3.0})
    assert [line["time"] for line in again] == [1007.0, 1008.0, 1009.0]  # same losses: the same step
    assert changed["samples_per_s"] == 3.0  # another loss: another trajectory, the file tells the truth
    assert Mirror(rundir, store).differences() != []


def test_a_committed_checkpoint_is_found_with_the_scores_of_its_step(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path)), MemoryStore()
    tracker = Tracker(rundir, store, flush_s=0.01)
    line = rundir.append_metrics(_line(8) | {"probe/knn/fused": 0.5, "probe/knn/fused/low": 0.4, "probe/split": 7.0})
    tracker.log(8, 64, line)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000008\n")
    tracker.close()
    (run,) = store.runs.values()
    assert run["checkpoints"] == {(f"{tmp_path}/checkpoints/step-00000008", 8): {"probe/knn/fused": 0.5}}


def _claimed(url: str, steps: int = 3) -> tuple[RunDir, MemoryStore]:
    """A run that is under way: claimed, sent, and nobody has ended it."""
    rundir, store = _run(url, steps), MemoryStore()
    rundir.claim()
    Mirror(rundir, store).send(rundir.read_metrics())
    return rundir, store


def _dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def _rewrite(rundir: RunDir, name: str, **changes: object) -> None:
    path = Path(rundir.url) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_whose_writer_died_without_a_word_is_killed_or_failed(tmp_path: Path) -> None:
    rundir, _ = _claimed(str(tmp_path))
    assert status_now(rundir) == "RUNNING"  # this process lives
    _rewrite(rundir, "writer.json", pid=_dead_pid())
    assert status_now(rundir) == "KILLED"
    record_failure(rundir.logs_url, 0, 3, RuntimeError("out of memory"))
    assert status_now(rundir) == "FAILED"
    set_status(rundir, "SCHEDULED")  # its last word counts
    assert status_now(rundir) == "SCHEDULED"


def test_a_process_number_that_another_process_got_since_is_not_the_writer(tmp_path: Path) -> None:
    rundir, _ = _claimed(str(tmp_path))
    _rewrite(rundir, "writer.json", time=psutil.Process().create_time() - 100)
    assert status_now(rundir) == "KILLED"


@pytest.mark.parametrize(
    ("host", "job", "slurm", "expected"),
    [
        ("elsewhere", None, "", "RUNNING"),  # nobody knows
        ("elsewhere", "7", "JobState=RUNNING", "RUNNING"),
        ("elsewhere", "7", "JobState=NODE_FAIL", "KILLED"),
        ("elsewhere", "7", "JobState=PENDING", "SCHEDULED"),
        (None, "7", "JobState=PENDING", "SCHEDULED"),  # this host, process gone
        (None, "7", "JobState=FAILED", "KILLED"),
        (None, "7", None, "KILLED"),  # no SLURM here: the process table is enough
        ("elsewhere", "7", None, "RUNNING"),
    ],
)
def test_a_writer_elsewhere_is_judged_by_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None, job: str | None, slurm: str | None, expected: str
) -> None:
    rundir, _ = _claimed(str(tmp_path / "run"))
    _rewrite(rundir, "writer.json", host=host or socket.gethostname(), job=job, pid=_dead_pid())
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    if slurm is not None:
        scontrol.write_text(f"#!/bin/bash\necho JobId=7\necho '   {slurm} Restarts=0'\n")
        scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}" + (":/bin:/usr/bin" if slurm is not None else ""))
    assert status_now(rundir) == expected


def test_a_start_closes_runs_of_its_directory_that_nobody_writes(tmp_path: Path) -> None:
    rundir, store = _claimed(str(tmp_path / "run"))
    tags = dict(store.runs["run1"]["tags"])
    strangers = {
        "dead": tags | {"geoloom.pid": str(_dead_pid())},
        "alive": tags,  # a process of this host that still runs
        "other directory": tags | {"geoloom.pid": str(_dead_pid()), "geoloom.run_dir": str(tmp_path)},
        "other host": tags | {"geoloom.pid": "1", "geoloom.host": "elsewhere"},  # its /…/run is another folder
    }
    ids = {name: store.open_run(None, "test", name, found) for name, found in strangers.items()}
    ids["other experiment"] = store.open_run(None, "other", "x", strangers["dead"])
    ids["finished"] = store.open_run(None, "test", "x", strangers["dead"])
    store.end_run(ids["finished"], "FINISHED")
    tracker = Tracker(RunDir(rundir.url), store, flush_s=0.01)
    tracker.close("SCHEDULED")
    status = {name: store.runs[run_id]["status"] for name, run_id in ids.items()}
    assert status == {
        "dead": "KILLED", "alive": "RUNNING", "other directory": "RUNNING", "other host": "RUNNING",
        "other experiment": "RUNNING", "finished": "FINISHED",
    }  # fmt: skip
    assert store.runs["run1"]["status"] == "SCHEDULED"


def test_the_run_directory_is_tagged_by_a_path_that_holds_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(FACTS, "runs/a", "f", {})["geoloom.run_dir"] == str(tmp_path / "runs" / "a")
    assert describe(FACTS, "s3://bucket/a", "f", {})["geoloom.run_dir"] == "s3://bucket/a"


def test_steps_redone_with_another_loss_are_named_in_a_tag(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path), 10), MemoryStore()
    Mirror(rundir, store).send(rundir.read_metrics())
    rundir.start_metrics(6)
    tracker = Tracker(rundir, store, flush_s=0.01)
    for step in range(7, 13):
        line = rundir.append_metrics(_line(step) | ({"loss": 0.5} if step in (8, 9, 12) else {}))
        tracker.log(step, step * 8, line)
    tracker.close()
    assert Mirror(rundir, store).redone() == [8, 9]
    (run,) = store.runs.values()
    assert run["tags"]["geoloom.redone_steps"].startswith("8-9: these are the first figures")


def test_ranges_of_steps() -> None:
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"


def test_every_checkpoint_has_the_scores_of_its_step(tmp_path: Path) -> None:
    """Five checkpoints faster than the tracker looks, told and untold; a restart finds what its predecessor could not tell."""
    rundir, store = _run(str(tmp_path)), MemoryStore()
    tracker = Tracker(rundir, store, flush_s=0.01)
    checkpoints = tmp_path / "checkpoints"
    for step in range(10, 60, 10):
        line = rundir.append_metrics(_line(step) | {"probe/knn/s2": step / 100})
        tracker.log(step, step * 8, line)
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (checkpoints / f"step-{step:08d}" / "manifest.json").write_text("{}")
        (checkpoints / "LATEST").write_text(f"step-{step:08d}\n")
        if step != 30:  # the start was killed between commit and telling
            tracker.checkpoint(str(checkpoints / f"step-{step:08d}"), step)
    tracker.close()
    [run] = store.runs.values()
    wanted = {step: {"probe/knn/s2": step / 100} for step in range(10, 60, 10)}
    assert {step: scores for (_, step), scores in run["checkpoints"].items()} == wanted
    (tmp_path / "tracked.jsonl").unlink()
    Tracker(RunDir(str(tmp_path)), store, flush_s=0.01).close()
    assert {event["step"]: event["metrics"] for event in read_events(rundir)} == wanted


def test_a_checkpoint_registered_without_scores_gets_them_later(tmp_path: Path) -> None:
    rundir, store = _run(str(tmp_path)), MemoryStore()
    mirror = Mirror(rundir, store)
    for scores in ({}, {"probe/knn/s2": 0.5}):
        add_event(rundir, "x", 10, scores)
        mirror.send_files()
    [run] = store.runs.values()
    assert run["checkpoints"] == {("x", 10): {"probe/knn/s2": 0.5}}
