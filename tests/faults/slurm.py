"""Faults of SLURM itself: real daemons on two nodes, a stand-in trainer that counts (`tests/standin_trainer.py`)."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from cluster.errors import UsageError
from cluster.exit_codes import FENCED
from cluster.slurm.requeue import LOOP, NO_PROGRESS_LIMIT
from tests.faults.campaign import Case, Kind, Result
from tests.slurm_jobs import STEPS, Sent

LIMIT_S = 420  # SLURM notices a dead node after 10 s, and holds a requeued job back for 5
HELD = "launch_failed_requeued_held"
LOOPS: dict[str, tuple[dict[str, Any], int, str]] = {
    "the same error at the same step": ({"fail_at": 15}, 2, "failed twice at step 15"),
    "killed before anything is saved": ({"fail_at": 3, "how": "kill"}, 2, "killed by signal 9"),
    "another error in each start": ({"fail_at": 15, "how": "other"}, NO_PROGRESS_LIMIT, "came no further than step 10"),
    "asked to stop before the first step": ({"fail_at": 1, "how": "stop"}, NO_PROGRESS_LIMIT, "may be too short"),
    "one step further in each start": ({"fail_after": 2, "every": 1}, LOOP, f"{LOOP} failures in a row"),
}
"""Settings of the stand-in under which no start comes through, how many starts are made, and why it is told to end."""


def begun(case: Case, first: int = 3, last: int = 15, **test: Any) -> Sent:
    """A run that has come to some step."""
    return Sent(case.shared.slurm, case.folder / "run", **{"step_s": 0.1, **test}).at_step(
        case.rng.randint(first, last)
    )


def verdict(sent: Sent, seen: str, steps: int = STEPS) -> Result:
    """Each step once, with its value; and as many decisions as starts that ended in order, none twice."""
    lines = [json.loads(line) for line in Path(sent.run.metrics_url).read_text().splitlines()]
    numbers = [line["step"] for line in lines]
    starts = [(one["job"], one["restart"]) for one in sent.attempts]
    wrong = sum(line["loss"] != 1 / line["step"] for line in lines) + len(starts) - len(set(starts))
    return Result(len(set(range(1, steps + 1)) - set(numbers)), len(numbers) - len(set(numbers)), wrong, seen)


def batch_log(sent: Sent) -> str:
    return Path(sent.run.logs_url, "batch.log").read_text()


def node_dies(case: Case) -> Result:
    """A power cut on the node of the first rank and the batch script, or on the other; it comes back later."""
    slurm, sent = case.shared.slurm, begun(case)
    node = case.rng.choice(slurm.names)
    slurm.crash_node(node)
    try:
        slurm.wait(lambda: slurm.job(sent.job).get("JobState") != "RUNNING", f"loss of {node} noticed")
    finally:
        slurm.start_node(node)
    restarts = sent.ends(timeout=120).slurm.job(sent.job)["Restarts"]
    assert int(restarts) >= 1
    return verdict(sent, f"`cluster status`: restarts {restarts}; it goes on from the last checkpoint")


def controller_dies(case: Case) -> Result:
    """kill -9 of slurmctld under a run; it comes back some seconds later."""
    sent = begun(case, steps=60)
    saved_as_running(sent)
    without_controller(case, 0.5, 6.0)
    return verdict(sent.ends(timeout=120), "nothing: the ranks go on meanwhile", 60)


def start_ends_without_controller(case: Case) -> Result:
    """A rank dies while slurmctld is away: the decision has to wait for it, and the start to go back into the queue."""
    slurm, sent = case.shared.slurm, begun(case, steps=60)
    saved_as_running(sent)
    slurm.crash_controller()
    try:
        victim = next(p for p in slurm.task_processes("node2", sent.job) if b"standin" in command_line(p))
        os.kill(victim, signal.SIGKILL)
        slurm.wait(lambda: "asking again" in batch_log(sent), "the controller asked in vain")
    finally:
        slurm.start_controller()
    sent.ends(timeout=120)
    seen = next(line for line in batch_log(sent).splitlines() if "asking again" in line)
    assert [one["action"] for one in sent.attempts] == ["requeue", "done"], sent.attempts
    return verdict(sent, seen, 60)


def controller_dies_in_a_preemption(case: Case) -> Result:
    """A more urgent job takes the nodes; at some moment of that slurmctld dies and comes back. Both jobs end well."""
    slurm, sent = case.shared.slurm, begun(case, 3, 6, steps=60)
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                       f"--comment=urgent beside {sent.job}", "--wrap=true", cwd=case.folder).strip()  # fmt: skip
    slurm.wait(lambda: slurm.has_saved(f"urgent beside {sent.job}"), "the urgent job is on the controller's disk")
    time.sleep(case.rng.random() * 3)
    without_controller(case, 0.5, 4.0)
    released: set[str] = set()

    def ended() -> bool:
        for job in (urgent, sent.job):
            if slurm.job(job).get("Reason") == HELD:
                released.add(job)
                release(case, job)
        return all(slurm.job(job).get("JobState") == "COMPLETED" for job in (urgent, sent.job))

    slurm.wait(ended, f"jobs {urgent} and {sent.job} completed", timeout=180)
    seen = next(iter(lines_with(sent, "requeue: ")), "nothing: it came before the preemption")
    if released:
        seen = f"{HELD} (SLURM's own, of a start that it forgot with the controller): scontrol release; {seen}"
    return verdict(sent, seen, 60)


def submitted_twice(case: Case) -> Result:
    """A second submission while the first works on the run: refused by name; with --follow it waits its turn."""
    sent = begun(case)
    try:
        Sent(sent.slurm, case.folder / "run")
        return Result(doubled=1, seen="a second job was let in")
    except UsageError as error:
        seen = str(error)
    after = Sent(sent.slurm, case.folder / "run", follow=True)
    state = sent.slurm.job(after.job)["JobState"]
    sent.ends()
    after.ends()
    assert f"job {sent.job} (RUNNING)" in seen
    assert state == "PENDING"
    return verdict(sent, seen)


def script_sent_twice(case: Case) -> Result:
    """The same script into the queue past `cluster submit`: the later start takes the run over, the earlier ends for good, and the
    later is stopped by nothing that the earlier left behind when it comes back from a preemption."""
    slurm, sent = case.shared.slurm, begun(case, steps=300)
    first, sent.job = sent.job, slurm.run("sbatch", "--parsable", str(sent.folder / "job.sbatch")).strip()
    slurm.wait(lambda: (sent.run.read_writer() or {}).get("job") == sent.job, "the second job has taken the run over")
    slurm.wait_state(first, "FAILED")
    slurm.run("scancel", "--signal=USR1", "--batch", sent.job)
    sent.ends()
    told = [(one["job"], one["action"], one["code"]) for one in sent.attempts]
    assert told == [(first, "stop", FENCED), (sent.job, "requeue", 0), (sent.job, "done", 0)], told
    assert slurm.job(first)["Restarts"] == "0"
    return verdict(sent, next(iter(lines_with(sent, "has taken over")), ""), 300)


def crash_loops(case: Case) -> Result:
    """Every loop of LOOPS side by side, each to its end: bounded, and the reason is told."""
    slurm = case.shared.slurm
    sent = {name: Sent(slurm, case.folder / f"{i}" / "run", steps=100_000, **test)
            for i, (name, (test, _, _)) in enumerate(LOOPS.items()) if not (case.folder / f"{i}").mkdir()}  # fmt: skip
    for name, (_, starts, why) in LOOPS.items():
        attempts = sent[name].ends("FAILED", timeout=LIMIT_S).attempts
        assert (len(attempts), attempts[-1]["action"]) == (starts, "stop"), f"{name}: {attempts}"
        assert why in attempts[-1]["why"], f"{name}: {attempts[-1]['why']}"
    last = max(sent.values(), key=lambda one: len(one.attempts)).attempts[-1]
    return Result(seen=f"stop: {last['why']}")


def saved_as_running(sent: Sent) -> None:
    """Waits until the controller's disk says that the job runs: one that is killed before that starts the job a second time, which
    its node refuses, and SLURM then holds the job."""
    mark = f"running {sent.job} {uuid.uuid4().hex}"
    sent.slurm.run("scontrol", "update", f"JobId={sent.job}", f"Comment={mark}")
    sent.slurm.wait(lambda: sent.slurm.has_saved(mark), "the running job is on the controller's disk")


def release(case: Case, job: str) -> None:
    """What an operator does with a job that SLURM holds after a start that a node has refused."""
    for node in case.shared.slurm.names:
        case.shared.slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    case.shared.slurm.run("scontrol", "release", job)


def without_controller(case: Case, least_s: float, most_s: float) -> None:
    case.shared.slurm.crash_controller()
    try:
        time.sleep(case.rng.uniform(least_s, most_s))
    finally:
        case.shared.slurm.start_controller()


def lines_with(sent: Sent, text: str) -> list[str]:
    return [line for line in batch_log(sent).splitlines() if text in line]


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


KINDS = [
    Kind("SLURM: a node dies", "requeued; each step once", 3, node_dies, LIMIT_S, 50),
    Kind("SLURM: controller killed under a run", "each step once", 2, controller_dies, LIMIT_S, 50),
    Kind("SLURM: a rank killed while the controller is away", "decided and requeued once it is back", 2, start_ends_without_controller, LIMIT_S, 50),
    Kind("SLURM: controller killed during a preemption", "both jobs end; each step once", 4, controller_dies_in_a_preemption, LIMIT_S, 50),
    Kind("SLURM: two submissions on one directory", "the second refused by name, or follows", 2, submitted_twice, LIMIT_S, 50),
    Kind("SLURM: one script sent twice", "one goes on, also after a preemption; the other ends for good", 2, script_sent_twice, LIMIT_S, 50),
    Kind("SLURM: crash loops of five kinds, to their end", "bounded, and it says why", 1, crash_loops, LIMIT_S, 300),
]  # fmt: skip
