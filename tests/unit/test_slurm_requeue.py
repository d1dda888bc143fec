"""Back into the queue or not: as long as there is progress, and never for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import logs
from cluster.commands.requeue import read_attempt
from cluster.exit_codes import REQUEUE, USAGE
from cluster.rundir import RunDir
from cluster.slurm.requeue import (
    NO_PROGRESS_LIMIT,
    Attempt,
    decide,
    is_ended_by_slurm,
    read_attempts,
    record_attempt,
    signature,
)


def attempt(code: int = 1, step: int = 10, error: str = "boom", checkpointed: bool = False) -> Attempt:
    return Attempt("1", 0, code, step, error, checkpointed)


def action(last: Attempt, *earlier: Attempt, ended: bool = False, limit: int | None = None) -> str:
    return decide(last, earlier, ended, limit).action


def test_each_ending_has_its_decision() -> None:
    assert action(attempt(code=0)) == "done"
    assert action(attempt(code=0, checkpointed=True)) == "requeue"
    assert action(attempt(code=USAGE)) == "stop"
    assert action(attempt(code=137, error="killed")) == "requeue"


def test_what_slurm_ends_itself_is_left_to_it() -> None:
    assert action(attempt(code=0, checkpointed=True), ended=True) == "leave"
    assert action(attempt(), attempt(), ended=True) == "leave"
    ended = {"CANCELLED": True, "COMPLETING": True, "RUNNING": False, "": False}
    assert {state: is_ended_by_slurm({"JobState": state, "Reason": "None"}) for state in ended} == ended
    assert not is_ended_by_slurm({"JobState": "COMPLETING", "Reason": "TimeLimit"})


def test_twice_at_the_same_step_with_the_same_error_stops() -> None:
    assert action(attempt(), attempt()) == "stop"
    assert action(attempt(), attempt(step=9)) == "requeue"
    assert action(attempt(), attempt(error="another")) == "requeue"
    # not only in a row: a preemption between two equal failures is no progress
    assert action(attempt(), attempt(), attempt(code=0, checkpointed=True)) == "stop"


def test_ids_and_addresses_do_not_make_an_error_new() -> None:
    assert signature("rank 3 at 0xdeadbeef on 10.0.0.1:29500") == signature("rank 7 at 0x1 on 10.0.0.22:29511")
    assert signature("KeyError: 'a'") != signature("KeyError: 'b'")


def test_stopping_before_any_step_is_limited() -> None:
    stopped = attempt(code=0, checkpointed=True)
    assert action(stopped, *[stopped] * (NO_PROGRESS_LIMIT - 2)) == "requeue"
    assert action(stopped, *[stopped] * (NO_PROGRESS_LIMIT - 1)) == "stop"


def test_max_requeues() -> None:
    assert action(attempt(step=3), attempt(step=1), limit=2) == "requeue"
    assert action(attempt(step=3), attempt(step=1), attempt(step=2), limit=2) == "stop"


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"]), st.booleans()), min_size=60, max_size=60))
def test_a_run_that_makes_no_progress_ends(starts: list[tuple[int, str, bool]]) -> None:
    """Over any history of starts within 4 steps and 2 errors, failures cannot go on: at most 8 different ones exist."""
    history: list[Attempt] = []
    failures = 0
    for step, error, checkpointed in starts:
        last = attempt(0 if checkpointed else 1, step, error, checkpointed)
        if action(last, *history) == "stop":
            return
        failures += last.failed
        history.append(last)
        assert failures <= 8


def test_attempts_are_kept_and_the_end_is_marked(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for last in (attempt(step=1), attempt(step=1)):
        record_attempt(folder, last, decide(last, read_attempts(folder)))
    assert [a["action"] for a in json.loads((tmp_path / "attempts.json").read_text())] == ["requeue", "stop"]
    assert "failed twice at step 1" in (tmp_path / "stopped").read_text()
    assert read_attempts(folder) == [attempt(step=1)] * 2


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = RunDir(str(tmp_path / "run"))
    run.append_metrics({"step": 7, "loss": 1.0})
    return run


def test_the_first_recorded_error_is_the_cause(run: RunDir, tmp_path: Path) -> None:
    logs.record_failure(run.logs_url, 3, 8, ValueError("the cause"))
    logs.record_failure(run.logs_url, 1, 8, RuntimeError("connection closed by peer"))
    seen = read_attempt(run, str(tmp_path), "5", 1, False)
    assert (seen.step, seen.error, seen.restart, seen.failed) == (8, "ValueError: the cause", 1, True)


def test_a_killed_rank_is_named_before_what_its_peers_saw(run: RunDir, tmp_path: Path) -> None:
    logs.record_failure(run.logs_url, 1, 8, RuntimeError("connection closed by peer"))
    seen = read_attempt(run, str(tmp_path), "5", 137, False)
    assert seen.error == "a rank was killed by signal 9; rank 1 then saw: RuntimeError: connection closed by peer"


def test_errors_of_earlier_starts_do_not_count(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    logs.record_failure(run.logs_url, 0, 3, ValueError("old"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    seen = read_attempt(run, str(tmp_path), "5", 137, False)
    assert (seen.step, seen.error) == (7, "a rank was killed by signal 9")


def test_a_crash_is_no_checkpoint_even_after_a_mark(run: RunDir, tmp_path: Path) -> None:
    """One rank reported a checkpoint, another crashed: srun's code says that something failed."""
    (tmp_path / "checkpointed").touch()
    assert read_attempt(run, str(tmp_path), "5", 0, True).checkpointed
    assert read_attempt(run, str(tmp_path), "5", 1, True).failed
    assert read_attempt(run, str(tmp_path), "5", REQUEUE, False).failed
    assert not read_attempt(run, str(tmp_path), "5", 138, True).failed
