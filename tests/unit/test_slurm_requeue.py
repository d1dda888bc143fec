"""Back into the queue or not: as long as there is progress, and never for ever."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import logs
from cluster.commands import requeue as command
from cluster.commands.requeue import read_attempt
from cluster.errors import RunFailure
from cluster.exit_codes import FENCED, REQUEUE, USAGE
from cluster.rundir import RunDir
from cluster.slurm.requeue import (
    LOOP,
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
    """Over any history of starts within 4 steps, however failures and signals mix: so many per new step, no more."""
    history: list[Attempt] = []
    for step, error, checkpointed in starts:
        last = attempt(0 if checkpointed else 1, step, error, checkpointed)
        if action(last, *history) == "stop":
            return
        history.append(last)
        assert len(history) <= 4 * NO_PROGRESS_LIMIT


LOOPS = {
    "the same crash at the same step": lambda i: attempt(step=40, error="boom"),
    "a crash one step further each time": lambda i: attempt(step=i, error="a rank was killed by signal 9"),
    "one step further, nothing saved": lambda i: replace(attempt(step=i, error=f"{'ab'[i % 2]}"), saved=0),
    "another error each time, no progress": lambda i: attempt(step=40, error="".join(chr(97 + int(d)) for d in str(i))),
    "killed before any step": lambda i: attempt(137, 0, "a rank was killed by signal 9"),
    "preempted before any step": lambda i: attempt(0, 0, "", checkpointed=True),
    "crash and preemption in turn, no progress": lambda i: attempt(i % 2, 40, str(i % 7), checkpointed=not i % 2),
    "fenced": lambda i: attempt(FENCED, 40 + i),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_two_hundred_starts_in_a_loop_are_never_made(kind: str) -> None:
    history: list[Attempt] = []
    for i in range(200):
        last = LOOPS[kind](i)
        decision = decide(last, history)
        if decision.action == "stop":
            break
        history.append(last)
    assert decision.action == "stop", kind
    assert len(history) < LOOP
    assert decision.why


def test_failures_are_forgotten_once_the_run_has_come_further() -> None:
    killed = attempt(137, 0, "a rank was killed by signal 9")
    good = [replace(attempt(0, 10 * i, "", checkpointed=True), saved=10 * i) for i in range(1, 30)]
    assert action(replace(killed, saved=290), killed, *good) == "requeue"
    assert action(killed, killed) == "stop"
    # a flaky machine on a long run: the same error a hundred times, each some hundred steps further
    flaky = [replace(attempt(137, 700 * i + 50, "a rank was killed by signal 9"), saved=700 * i) for i in range(1, 101)]
    for i, last in enumerate(flaky):
        assert decide(last, flaky[:i], total_steps=600_000).action == "requeue"


def test_a_checkpoint_is_progress_though_the_failure_comes_at_the_same_step() -> None:
    first, second = replace(attempt(step=50), saved=20), replace(attempt(step=50), saved=40)
    assert action(second, first) == "requeue"
    assert action(second, first, second) == "stop"


def test_being_fenced_is_final_and_says_by_whom() -> None:
    decision = decide(attempt(code=137), [], fenced_by="job 8 (process 1 on node2)")
    assert (decision.action, decision.why.split(" has ")[0]) == ("stop", "job 8 (process 1 on node2)")
    assert action(attempt(code=FENCED)) == "stop"
    # who had come to the end of the run before the other took over has lost nothing
    assert decide(attempt(code=0), [], fenced_by="job 8").action == "done"


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
    (tmp_path / "checkpointed-4").touch()  # of another job
    assert not read_attempt(run, str(tmp_path), "5", 0, False).checkpointed
    (tmp_path / "checkpointed-5").touch()
    assert read_attempt(run, str(tmp_path), "5", 0, True).checkpointed
    assert read_attempt(run, str(tmp_path), "5", 1, True).failed
    assert read_attempt(run, str(tmp_path), "5", REQUEUE, False).failed
    assert not read_attempt(run, str(tmp_path), "5", 138, True).failed


@pytest.fixture
def job_dir(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submission of `run`; `scontrol` on PATH does what tmp_path/answer says and writes down how it was called."""
    (tmp_path / "job.json").write_text(json.dumps({"run_dir": run.url, "logs_dir": run.logs_url}))
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n. {tmp_path}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr("time.sleep", lambda s: None)
    return tmp_path


def requeue(job_dir: Path, code: int) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(job_dir), "--code", str(code)]))


AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_a_controller_that_is_away_for_a_while_costs_nothing(job_dir: Path) -> None:
    """Away for the first three questions and then for the first two requests to requeue."""
    (job_dir / "answer").write_text(
        f'n=$(grep -c "^$1" {job_dir}/calls)\n[ "$1" = show ] && [ "$n" -le 3 ] && {{ {AWAY}; }}\n'
        f'[ "$1" = requeue ] && [ "$n" -le 2 ] && {{ {AWAY}; }}\necho "JobId=5 JobState=RUNNING Reason=None"\n'
    )
    assert requeue(job_dir, 137) == REQUEUE
    calls = (job_dir / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["show"] * 4 + ["requeue"] * 3
    assert [one["action"] for one in json.loads((job_dir / "attempts.json").read_text())] == ["requeue"]


def test_a_controller_that_stays_away_leaves_a_record_and_the_command(
    job_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_dir / "answer").write_text(AWAY + "\n")
    monkeypatch.setattr(command, "PATIENCE_S", 0.0)
    with pytest.raises(RunFailure, match="by hand: sbatch "):
        requeue(job_dir, 137)
    [kept] = json.loads((job_dir / "attempts.json").read_text())
    assert (kept["action"], kept["code"], kept["step"]) == ("leave", 137, 7)
    assert "controller cannot be reached" in kept["why"]


def test_the_attempt_is_recorded_before_the_controller_is_asked(job_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ask", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        requeue(job_dir, 137)
    assert [one["action"] for one in json.loads((job_dir / "attempts.json").read_text())] == ["undecided"]


def test_a_start_that_was_taken_over_is_not_requeued(
    job_dir: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_dir / "answer").write_text('echo "JobId=5 JobState=RUNNING Reason=None"\n')
    run.claim()
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    RunDir(run.url).claim()
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert requeue(job_dir, 137) == 137  # srun tells of the killed peers, not of the rank that noticed
    assert "requeue" not in (job_dir / "calls").read_text()
    assert "job 6 (process" in (job_dir / "stopped").read_text()
    assert (job_dir / "successor").read_text() == "6\n"  # whom the mark is not meant for: it may be of the same folder


def test_the_same_script_sent_twice_ends_only_the_one_that_is_refused(
    job_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job 6 met job 5 at work and ended with a usage error; job 5 then is preempted and must come back."""
    (job_dir / "answer").write_text('echo "JobId=5 JobState=RUNNING Reason=None"\n')
    first = attempt(step=1)
    record_attempt(str(job_dir), first, None)
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert requeue(job_dir, USAGE) == USAGE
    record_attempt(str(job_dir), first, decide(first, []), again=True)
    kept = json.loads((job_dir / "attempts.json").read_text())
    assert [(one["job"], one["action"]) for one in kept] == [("6", "stop"), ("1", "requeue")]
    assert sorted(path.name for path in job_dir.glob("stopped*")) == ["stopped-6"]


def test_a_storage_that_is_away_when_the_ranks_have_ended_costs_nothing(
    job_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outage that ended the ranks is not over when the batch script asks what is to be done."""
    (job_dir / "answer").write_text('echo "JobId=5 JobState=RUNNING Reason=None"\n')
    looks: list[int] = []
    last_step = RunDir.last_step

    def away(run: RunDir) -> int | None:
        looks.append(1)
        if len(looks) == 1:
            raise RunFailure("s3://bucket/run: Could not connect to the endpoint URL")
        if len(looks) == 2:
            raise OSError(16, "Service Unavailable")
        return last_step(run)

    monkeypatch.setattr(RunDir, "last_step", away)
    assert requeue(job_dir, 137) == REQUEUE
    assert "run directory cannot be read (s3://bucket/run: Could not connect" in capsys.readouterr().out
    assert [(one["action"], one["step"]) for one in json.loads((job_dir / "attempts.json").read_text())] == [
        ("requeue", 7)
    ]
    monkeypatch.setattr(command, "PATIENCE_S", 0.0)
    looks.clear()
    with pytest.raises(RunFailure, match="Could not connect"):
        requeue(job_dir, 137)
