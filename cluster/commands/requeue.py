"""Called by the batch script when its ranks have ended: done, back into the queue, or no use to try again.

example:
  python -m cluster requeue runs_out/first/jobs/001 --code 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster import logs, storage
from cluster.cli import private_files
from cluster.errors import RunFailure
from cluster.exit_codes import FAILED, FENCED, REQUEUE
from cluster.lease import overtaken
from cluster.rundir import RunDir
from cluster.slurm.commands import call_patiently, job_fields
from cluster.slurm.requeue import Attempt, Decision, decide, is_ended_by_slurm, read_attempts, record_attempt

PATIENCE_S = float(os.environ.get("GEOLOOM_SLURM_PATIENCE_S", "1800"))
"""How long a controller, or the run directory's storage, that is away is waited for before a start that should go back into the
queue is given up."""
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_dir", help="folder of the submission: RUN/jobs/NNN")
    parser.add_argument(
        "--job", metavar="ID", help="what SLURM calls it (default: SLURM_JOB_ID); an array's task: JOB_TASK"
    )
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--asked-to-stop", action="store_true", help="a preemption or time-limit signal came")
    parser.add_argument("--chained", action="store_true", help="a next job of the chain waits: do not requeue this one")


def main(args: argparse.Namespace) -> int:
    private_files()
    record = json.loads(storage.read_bytes(storage.join(args.job_dir, "job.json")))
    run = RunDir(record["run_dir"])
    job = os.environ.get("SLURM_JOB_ID", "")  # the same in every start; under it the lease and failures are recorded
    called = args.job or job
    attempt = patiently(lambda: read_attempt(run, args.job_dir, job, args.code, args.asked_to_stop))
    earlier = read_attempts(args.job_dir)
    record_attempt(args.job_dir, attempt, None)  # before the controller is asked: it may be away
    successor = overtaker(run, attempt)
    decision = decide(
        attempt,
        earlier,
        is_ended_by_slurm(ask(called)),
        record.get("max_requeues"),
        patiently(lambda: total_steps(run)),
        in_words(successor),
    )
    record_attempt(args.job_dir, attempt, decision, (successor or {}).get("job"), again=True)
    print(f"{decision.action}: {decision.why}", flush=True)
    if attempt.code != FENCED:
        _upload_logs(record, run)
    if decision.action == "done":
        return 0
    if decision.action in ("stop", "leave"):
        return attempt.code or 1
    if args.chained:
        print("the next job of the chain continues", flush=True)
    else:
        try:
            call_patiently(["scontrol", "requeue", called], PATIENCE_S, say)
        except RunFailure as failure:
            again = f"sbatch {shlex.quote(os.path.join(args.job_dir, 'job.sbatch'))}"
            again = (
                f"scontrol requeue {called}" if "_" in called else again
            )  # a task of an array has no script of its own
            lost = Decision("leave", f"should go back into the queue, but {failure}; by hand: {again}")
            record_attempt(args.job_dir, dataclasses.replace(attempt, code=attempt.code or FAILED), lost, again=True)
            raise RunFailure(lost.why) from None
    return REQUEUE


def ask(job: str) -> dict[str, str]:
    """What SLURM says of this job; nothing if it does not answer for PATIENCE_S (then it is not SLURM that ends the job)."""
    if not job:
        return {}
    try:
        return job_fields(job, PATIENCE_S)
    except RunFailure as failure:
        say(str(failure))
        return {}


def patiently(look: Callable[[], T]) -> T:
    """What `look` finds in the run directory: again and again while its storage is away, for up to PATIENCE_S. What ended the
    ranks may be that very outage, and a start that is given up here does not come back.

    Raises:
        OSError, RunFailure: still away then.
    """
    until, wait_s = time.monotonic() + PATIENCE_S, 1.0
    while True:
        try:
            return look()
        except (OSError, RunFailure) as away:
            if isinstance(away, PermissionError) or time.monotonic() + wait_s > until:
                raise
            say(f"the run directory cannot be read ({' '.join(str(away).split())}); asking again in {wait_s:.0f} s")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 30.0)


def say(text: str) -> None:
    print(text, flush=True)


def overtaker(run: RunDir, attempt: Attempt) -> dict[str, Any] | None:
    """The lease's record of who took the run directory over from this start; None if nobody did, or nobody can say."""
    try:
        return patiently(lambda: overtaken(run.url, attempt.job, attempt.restart))
    except (OSError, RunFailure) as problem:
        say(f"who holds {run.url} cannot be read: {problem}")
        return None


def in_words(other: dict[str, Any] | None) -> str | None:
    return f"job {other.get('job') or '-'} (process {other.get('pid')} on {other.get('host')})" if other else None


def total_steps(run: RunDir) -> int | None:
    """Length of the run in steps, if it is written down."""
    steps = ((run.read_resolved() or {}).get("config", {}).get("train") or {}).get("steps")
    return steps if isinstance(steps, int) else None


def read_attempt(run: RunDir, job_dir: str, job: str, code: int, asked_to_stop: bool) -> Attempt:
    """How the start that just ended looks from outside: last step logged, first error recorded by a rank."""
    marked = storage.exists(storage.join(job_dir, f"checkpointed-{job}"))
    signalled = asked_to_stop and code in (
        REQUEUE,
        128 + 10,
        128 + 15,
    )  # srun itself may die of a signal before its tasks run
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    failures = [f for f in logs.read_failures(run.logs_url) if (f.get("job") or "", f.get("restart")) == (job, restart)]
    step = failures[0].get("step") if failures else None
    if step is None or step < 0:  # it failed outside a step
        step = run.last_step()
    error = failures[0].get("error", "") if failures else _describe(code)
    if failures and code > 128:  # who was killed recorded nothing; what the others saw is its echo
        error = f"{_describe(code)}; rank {failures[0].get('rank')} then saw: {error}"
    checkpointed = (marked and code == 0) or signalled
    return Attempt(job, restart, code, step or 0, error, checkpointed, asked_to_stop, newest_checkpoint(run))


def newest_checkpoint(run: RunDir) -> int | None:
    """Step of the checkpoint that LATEST names; None without one."""
    try:
        found = re.search(rb"(\d+)\s*$", storage.read_bytes(storage.join(run.checkpoints_url, "LATEST")))
    except FileNotFoundError:
        return None
    return int(found[1]) if found else None


def _describe(code: int) -> str:
    if code > 128:
        return f"a rank was killed by signal {code - 128}"
    return f"a rank ended with exit code {code} and recorded no error"


def _upload_logs(record: dict[str, str], run: RunDir) -> None:
    """With a run directory on an object store, rank logs are written beside the job and copied when a start has ended."""
    if storage.is_local(run.url):
        return
    for name in storage.list_names(record["logs_dir"]):
        try:
            storage.upload(storage.join(record["logs_dir"], name), storage.join(run.logs_url, name))
        except Exception as problem:  # the run goes on without them
            print(f"cannot copy {name} to {run.logs_url}: {problem}", flush=True)
