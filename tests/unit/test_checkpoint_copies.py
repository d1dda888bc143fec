"""A second place for checkpoints: what goes there, what a resume takes, and that its absence costs nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cluster import storage
from cluster.errors import RunFailure, UsageError
from cluster.lease import Lease
from cluster.rundir import RunDir
from pipeline import resume
from pipeline.checkpoint import Saver, committed, store
from pipeline.checkpoint.load import open_files
from pipeline.config import CheckpointConfig


def engine(step: int) -> Any:
    """What a save sees of an engine of one rank: one parameter of four elements."""
    master, module = SimpleNamespace(tensor=torch.arange(4.0) + step), torch.nn.Module()
    piece = SimpleNamespace(
        name="w", shape=(4,), start=0, size=4, owned=(0, 4), of=lambda flat: flat, master=master
    )  # fmt: skip
    state = SimpleNamespace(pieces=[piece], adam_step=step, moment=lambda piece, key: master.tensor + 1)
    teacher = SimpleNamespace(module=module, of=lambda piece: master.tensor + 2)
    return SimpleNamespace(
        state=state, layout=SimpleNamespace(ep=1, zero_stage=2), student=module, teacher=teacher
    )  # fmt: skip


def save(run: RunDir, copy_to: str, steps: list[int], lease: Lease | None = None, **settings: Any) -> Saver:
    config = CheckpointConfig(copy_to=copy_to, asynchronous=False, **settings)
    copies = store.copies_url(copy_to, run.url)
    saver = Saver(run.checkpoints_url, config, 0, 1, lambda: None, lease=lease, copies=copies)
    for step in steps:
        saver.save(cast(Any, engine(step)), step, step, {})
    return saver


def steps_at(url: str) -> list[int]:
    return [store.open_checkpoint(found).step for found in committed(url)]


def first_element(url: str) -> float:
    with open_files(store.open_checkpoint(url)) as files:
        return float(files.read("student", "w", 0, 1)[0])


def test_every_second_one_and_the_one_before_a_stop_are_copied(tmp_path: Path) -> None:
    run, copy_to = RunDir(str(tmp_path / "runs" / "a")), f"memory://{tmp_path.name}"
    save(run, copy_to, [10, 20, 30, 40, 43], every=10, copy_every=2, keep_last=3)
    assert steps_at(run.checkpoints_url) == [43, 40, 30]
    assert steps_at(f"{copy_to}/a/checkpoints") == [43, 40, 20]
    assert store.resolve(f"{copy_to}/a") == f"{copy_to}/a/checkpoints/step-00000043"  # as probe and export ask


def test_a_resume_takes_the_newest_of_both_places_and_the_copy_of_a_lost_one(tmp_path: Path) -> None:
    run, copy_to = RunDir(str(tmp_path / "runs" / "a")), str(tmp_path / "copies")
    save(run, copy_to, [10, 20], every=10)
    copies = store.copies_url(copy_to, run.url)
    own = [store.step_url(run.checkpoints_url, step) for step in (20, 10)]
    other = [store.step_url(copies, step) for step in (20, 10)]
    assert resume._candidates("auto", run, copies) == [own[0], other[0], own[1], other[1]]
    store.remove(own[0])
    assert resume._candidates("auto", run, copies) == [other[0], own[1], other[1]]
    shutil.rmtree(run.url)
    found = resume._candidates("auto", run, copies)
    assert found == other
    assert [first_element(url) for url in found] == [20.0, 10.0]
    with pytest.raises(UsageError, match=r"up to step-00000020 \(.*copies/a/checkpoints"):
        resume._candidates("never", run, copies)


def test_a_place_that_is_away_costs_its_copy_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    run, copy_to = RunDir(str(tmp_path / "runs" / "a")), str(tmp_path / "file" / "copies")
    save(run, copy_to, [10], every=10).check()
    assert steps_at(run.checkpoints_url) == [10]
    assert "the copy of step 10" in caplog.text
    assert "the run goes on" in caplog.text
    assert resume._candidates("auto", run, store.copies_url(copy_to, run.url)) == [
        store.step_url(run.checkpoints_url, 10)
    ]


def test_an_overtaken_start_copies_nothing(tmp_path: Path) -> None:
    run, copy_to = RunDir(str(tmp_path / "runs" / "a")), str(tmp_path / "copies")
    run.claim()
    saver = save(run, copy_to, [10], run.lease, every=10)
    Lease.acquire(run.url)
    with pytest.raises(RunFailure, match="a later start"):
        saver.save(cast(Any, engine(20)), 20, 20, {})
    assert steps_at(store.copies_url(copy_to, run.url)) == steps_at(run.checkpoints_url) == [10]


def test_the_copy_lies_elsewhere() -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.copy_to=runs is where run\.dir lies"):
        store.copies_url("runs", "runs/a")
    assert store.copies_url("", "runs/a") == ""
    assert storage.join("s3://b", "a", "checkpoints") == store.copies_url("s3://b/", "runs/a")
