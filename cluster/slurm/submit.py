"""From a resolved config to jobs in the queue: freeze, render, sbatch. What fails half-way leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cluster import storage
from cluster.errors import RunFailure, UsageError
from cluster.rundir import RunDir
from cluster.slurm import freeze, script
from cluster.slurm.commands import call, job_records

ALIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
    "SIGNALING",
}
"""States of a job that may still write, or start."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """One `cluster submit`. job: how each job looks (its folders are filled in here); run_dir: URL of the run or shards;
    chain: how many jobs follow one another; tasks: array size of a build; dependency: sbatch's own notation; follow: start when
    the jobs that work on run_dir have ended, instead of refusing."""

    kind: Literal["train", "build"]
    job: script.Job
    run_dir: str
    resolved: dict[str, Any]
    fingerprint: str
    chain: int = 1
    tasks: int = 1
    max_requeues: int | None = None
    dependency: str | None = None
    follow: bool = False


def jobs_dir(run_dir: str, kind: str) -> str:
    """Where submissions are kept: `RUN/jobs`; beside a shard directory (which holds shards only); under `runs_out` in the
    working directory if the run lies on an object store, because every node must execute the script from a file system."""
    if storage.is_local(run_dir):
        path = os.path.abspath(storage.local_path(run_dir))
        return os.path.join(path, "jobs") if kind == "train" else f"{path}.jobs"
    return os.path.abspath(os.path.join("runs_out", f"{script.job_name(storage.name(run_dir))}.jobs"))


def preview(submission: Submission) -> dict[str, str]:
    """The scripts that `submit` would send, by file name. Writes nothing."""
    return _scripts(submission, freeze.next_folder(jobs_dir(submission.run_dir, submission.kind)))


def submit(submission: Submission) -> dict[str, Any]:
    """Writes the job folder, sends it to SLURM and returns {"jobs": [id, …], "job_dir", "run_dir"}.

    Raises:
        UsageError: jobs of an earlier submission are working on the run directory, or will: two would throw each other out.
        RunFailure: SLURM refuses or cannot be reached; then no job is left in the queue and no folder on disk.
    """
    parent = jobs_dir(submission.run_dir, submission.kind)
    new_parents = missing_parents(parent)
    with one_at_a_time(parent):
        found = owners(submission.run_dir, parent) if submission.kind == "train" else []
        after = after_owners(submission.run_dir, found, submission.follow, submission.dependency)
        return _submit(dataclasses.replace(submission, dependency=after), parent, new_parents)


def _submit(submission: Submission, parent: str, new_parents: list[str]) -> dict[str, Any]:
    folder = freeze.new_folder(parent)
    with taken_back(folder, new_parents) as sent:
        scripts = _scripts(submission, str(folder))
        for name, text in scripts.items():
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        freeze.write_config(folder, submission.resolved, submission.fingerprint)
        record = {
            "kind": submission.kind, "run_dir": submission.run_dir, "logs_dir": _logs_dir(submission, str(folder)),
            "command": submission.job.command, "fingerprint": submission.fingerprint, "code": freeze.freeze_code(folder),
            "max_requeues": submission.max_requeues, "submitted": time.time(), "jobs": sent,
        }  # fmt: skip
        write_record(folder, record)
        _send(submission, folder, list(scripts), sent)
        write_record(folder, record)
    return {"jobs": sent, "job_dir": str(folder), "run_dir": submission.run_dir}


@contextlib.contextmanager
def taken_back(folder: Path, new_parents: list[str]) -> Iterator[list[str]]:
    """A submission under way: yields the list for the numbers of its jobs. If it fails, they leave the queue and its folder goes."""
    sent: list[str] = []
    try:
        yield sent
    except BaseException:
        for job in sent:
            _cancel(job)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(new_parents)
        raise


def owners(run_dir: str, parent: str) -> list[tuple[str, str]]:
    """(job, state) of the jobs in the queue that work on a run directory or will: those of earlier submissions, and the one
    that wrote to it last."""
    jobs = [job for folder in storage.list_names(parent) for job in _record(parent, folder).get("jobs", ())]
    with contextlib.suppress(OSError, RunFailure):  # an object store may be out of a login node's reach
        writer = (RunDir(run_dir).read_writer() or {}).get("job")
        jobs += [writer] if writer else []
    found = []
    for job in dict.fromkeys(jobs):
        try:
            states = {fields.get("JobState", "") for fields in job_records(job)} & ALIVE
        except RunFailure:  # sbatch, right after, says better what is wrong with SLURM
            continue
        if states:
            found.append((job, ", ".join(sorted(states))))
    return found


def after_owners(run_dir: str, found: list[tuple[str, str]], follow: bool, dependency: str | None) -> str | None:
    """The dependency, with which a submission waits for those who work on its run directory (`owners`).

    Raises:
        UsageError: somebody does, and `follow` is not asked for.
    """
    if not found:
        return dependency
    if not follow:
        named = ", ".join(f"{job} ({state})" for job, state in found)
        raise UsageError(
            f"{run_dir}: job {named} works on this run already; add --follow to go on when it has ended, "
            f"scancel {' '.join(job for job, _ in found)}, or choose another run.dir"
        )
    return ",".join([*([dependency] if dependency else []), *(f"afterany:{job}" for job, _ in found)])


def _record(parent: str, folder: str) -> dict[str, Any]:
    try:
        return json.loads((Path(parent) / folder / "job.json").read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def one_at_a_time(parent: str) -> Iterator[None]:
    """Two submissions for one run at the same moment (on one login node) look one after the other. The kernel lets go of the
    lock of a process that died."""
    name = f"geoloom-submit-{os.getuid()}-{hashlib.sha256(parent.encode()).hexdigest()[:16]}"
    with open(os.path.join(tempfile.gettempdir(), name), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_empty(folders: list[str]) -> None:
    """Removes those of the folders that are empty."""
    for path in folders:
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)


def _scripts(submission: Submission, folder: str) -> dict[str, str]:
    job = dataclasses.replace(submission.job, job_dir=folder, logs_dir=_logs_dir(submission, folder))
    if submission.kind == "train":
        return {"job.sbatch": script.train_script(dataclasses.replace(job, chained=False))} | (
            {"link.sbatch": script.train_script(dataclasses.replace(job, chained=True))} if submission.chain > 1 else {}
        )
    return {
        "job.sbatch": script.build_script(job, submission.tasks),
        "merge.sbatch": script.merge_script(job),
    }


def _send(submission: Submission, folder: Path, names: list[str], sent: list[str]) -> None:
    """Sends the jobs in order and appends their ids to `sent`. Links of a chain hand over, the last requeues itself."""
    first = [f"--dependency={submission.dependency}"] if submission.dependency else []
    if submission.kind == "build":
        sent.append(send_script(folder / "job.sbatch", first))
        sent.append(send_script(folder / "merge.sbatch", [f"--dependency=afterok:{sent[0]}"]))
        return
    for link in range(submission.chain):
        name = "job.sbatch" if link == submission.chain - 1 else "link.sbatch"
        sent.append(send_script(folder / name, [f"--dependency=afterany:{sent[-1]}"] if sent else first))


def send_script(path: Path, options: list[str]) -> str:
    """Hands a script to sbatch; returns the job's number. Raises RunFailure."""
    answer = call(["sbatch", "--parsable", *options, str(path)])
    job = answer.strip().split(";")[0]
    if not job.isdigit():
        raise RunFailure(f"sbatch answered {answer.strip()!r} instead of a job number")
    return job


def _cancel(job: str) -> None:
    """Takes a job out of the queue; a failure is only said."""
    try:
        call(["scancel", job])
    except RunFailure as failure:
        print(f"job {job} could not be cancelled: {failure}")


def _logs_dir(submission: Submission, folder: str) -> str:
    return logs_dir(submission.run_dir, folder) if submission.kind == "train" else os.path.join(folder, "logs")


def logs_dir(run_dir: str, folder: str) -> str:
    """Where a training job's ranks log: in the run directory, or beside the job if that lies on an object store."""
    local = storage.is_local(run_dir)
    return os.path.join(os.path.abspath(storage.local_path(run_dir)) if local else folder, "logs")


def missing_parents(path: str) -> list[str]:
    """Folders that making `path` will create, innermost first."""
    missing = []
    while path and not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes `job.json`."""
    storage.write_atomic(str(folder / "job.json"), (json.dumps(record, indent=1) + "\n").encode())


def absolute_url(run_dir: str) -> str:
    """The run directory as the job will see it. Raises UsageError for one that no other process can see."""
    if run_dir.startswith("memory://"):
        raise UsageError(f"run.dir={run_dir} lives in the memory of one process; a job needs a folder or s3://…")
    return os.path.abspath(storage.local_path(run_dir)) if storage.is_local(run_dir) else run_dir
