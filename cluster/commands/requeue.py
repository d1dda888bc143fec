"""Called by the batch script when its ranks have ended: done, back into the queue, or no use to try again.

example:
  python -m cluster requeue runs_out/first/jobs/001 --code 1
"""

from __future__ import annotations

import argparse
import json
import os

from cluster import logs, storage
from cluster.exit_codes import REQUEUE
from cluster.rundir import RunDir
from cluster.slurm.commands import call, job_fields
from cluster.slurm.requeue import Attempt, decide, is_ended_by_slurm, read_attempts, record_attempt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_dir", help="folder of the submission: RUN/jobs/NNN")
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--asked-to-stop", action="store_true", help="a preemption or time-limit signal came")
    parser.add_argument("--chained", action="store_true", help="a next job of the chain waits: do not requeue this one")


def main(args: argparse.Namespace) -> int:
    record = json.loads(storage.read_bytes(storage.join(args.job_dir, "job.json")))
    run = RunDir(record["run_dir"])
    job = os.environ.get("SLURM_JOB_ID", "")
    attempt = read_attempt(run, args.job_dir, job, args.code, args.asked_to_stop)
    fields = job_fields(job) if job else {}
    ended = is_ended_by_slurm(fields)
    decision = decide(attempt, read_attempts(args.job_dir), ended, record.get("max_requeues"))
    record_attempt(args.job_dir, attempt, decision)
    print(f"{decision.action}: {decision.why}", flush=True)
    _upload_logs(record, run)
    if decision.action == "done":
        return 0
    if decision.action in ("stop", "leave"):
        return attempt.code or 1
    if args.chained:
        print("the next job of the chain continues", flush=True)
    else:
        call(["scontrol", "requeue", job])
    return REQUEUE


def read_attempt(run: RunDir, job_dir: str, job: str, code: int, asked_to_stop: bool) -> Attempt:
    """How the start that just ended looks from outside: last step logged, first error recorded by a rank."""
    marked = storage.exists(storage.join(job_dir, "checkpointed"))
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
    return Attempt(job, restart, code, step or 0, error, (marked and code == 0) or signalled, asked_to_stop)


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
