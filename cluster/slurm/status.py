"""What a job and its run look like now: the queue's view, the run directory's view, and the log that explains a failure."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from cluster import logs, storage
from cluster.errors import RunFailure, UsageError
from cluster.rundir import RunDir
from cluster.slurm.commands import call, job_fields, job_records
from cluster.slurm.script import task_folder
from cluster.slurm.submit import absolute_url, jobs_dir

PROBES = ("knn", "linear", "segment")
FAILED_STATES = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "BOOT_FAIL", "DEADLINE")


def find_record(job_or_folder: str) -> tuple[str, dict[str, Any]]:
    """(job folder, its `job.json`) of a SLURM job number, a run or shard directory, or a job folder itself.

    Raises:
        UsageError: nothing of ours is known under that name.
    """
    kept_here = [] if storage.is_local(job_or_folder) else _latest(jobs_dir(job_or_folder, "train"))
    for folder in (
        job_or_folder,
        *_latest(storage.join(job_or_folder, "jobs")),
        *_latest(f"{job_or_folder.rstrip('/')}.jobs"),
        *kept_here,
    ):
        record = _read(storage.join(folder, "job.json"))
        if record:
            return folder, record
    if not job_or_folder.split("_")[0].isdigit():
        found = _of_run(job_or_folder)
        if found:
            return found
    if not job_or_folder.split("_")[0].isdigit():
        raise UsageError(
            f"{job_or_folder} is neither a job number, nor a run directory, nor a folder with a submission (jobs/NNN/job.json)"
        )
    fields = job_fields(job_or_folder)
    if not fields:
        raise UsageError(f"SLURM does not know job {job_or_folder} (any more); give its run directory instead")
    folder = os.path.dirname(fields.get("Command", ""))
    record = _read(storage.join(folder, "job.json")) if folder else None
    if not record:
        raise UsageError(f"job {job_or_folder} ({fields.get('JobName')}) was not submitted by `cluster submit`")
    task = job_or_folder.partition("_")[2]
    if record["kind"] == "array" and task.isdigit():
        folder = task_folder(folder, int(task))
        record = _read(storage.join(folder, "job.json"))
    return folder, record


def list_jobs() -> list[str]:
    """Numbers of this user's jobs in the queue whose scripts are ours, oldest first."""
    found = []
    for number in call(["squeue", "--me", "--noheader", "--sort=i", "--format=%F"]).split():
        if number not in found and _is_ours(number):
            found.append(number)
    return found


def runs_below(root: str, depth: int = 3) -> list[str]:
    """Run directories at or below `root`, `depth` folders down at most, in order of their names."""
    names = storage.list_names(root)
    if "resolved.json" in names:
        return [root]
    if depth == 0:
        return []
    inner = [name for name in names if name not in ("jobs", "configs", "logs")]
    return [run for name in sorted(inner) for run in runs_below(storage.join(root, name), depth - 1)]


def report_array(folder: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What `cluster status` shows of an array of runs: its jobs in the queue, and every task as `report` has it."""
    tasks = []
    for number, task in enumerate(record["tasks"]):
        place = task_folder(folder, number)
        own = _read(storage.join(place, "job.json"))
        tasks.append({"name": task["name"], **report(place, own)})
    queue = [_queue_row(job) for job in record["jobs"]]
    return {"kind": "array", "run_dir": record["run_dir"], "job_dir": folder, "jobs": queue, "tasks": tasks}


def report_run(url: str) -> dict[str, Any]:
    """`report` of a run directory by itself: what it says, without asking SLURM."""
    run = RunDir(url)
    return {"kind": "train", "run_dir": url, "jobs": [], "last_decision": None, "failure": None, **_run_view(run)}


def report(folder: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything `cluster status` shows, as plain JSON types."""
    run = RunDir(record["run_dir"])
    attempts = _read(storage.join(folder, "attempts.json")) or []
    queue = [_queue_row(job) for job in record.get("jobs", [])]
    return {
        "kind": record["kind"], "run_dir": record["run_dir"], "job_dir": folder, "code": record["code"].get("revision"),
        "jobs": queue, "starts": len(attempts) + any(row["state"] == "RUNNING" or row.get("tasks", {}).get("RUNNING") for row in queue),
        "last_decision": f"{attempts[-1]['action']}: {attempts[-1]['why']}" if attempts else None,
        **(_run_view(run) if record["kind"] == "train" else _build_view(record["run_dir"])),
        "failure": _failure(run, record, attempts),
    }  # fmt: skip


def _run_view(run: RunDir) -> dict[str, Any]:
    lines = run.read_metrics()
    last = lines[-1] if lines else {}
    checkpoints = [name for name in storage.list_names(run.checkpoints_url) if name.startswith("step-")]
    resolved = (run.read_resolved() or {}).get("config", {})
    return {
        "step": last.get("step"), "steps": resolved.get("train", {}).get("steps"), "loss": last.get("loss"),
        "samples_per_s": last.get("samples_per_s"), "eta_s": last.get("eta_s"), "gpu_hours": last.get("gpu_hours"),
        "logged_s_ago": time.time() - last["time"] if last.get("time") else None, "probes": _last_probes(lines),
        "last_checkpoint": _latest_checkpoint(run, checkpoints), "mlflow_run": run.run_id,
    }  # fmt: skip


def _last_probes(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The newest round's headline scores: of the fused features, by classifier."""
    for line in reversed(lines):
        found = {
            key.removeprefix("probe/"): line[key] for key in line if key.startswith("probe/") and key.endswith("/fused")
        }
        scores = {key: value for key, value in found.items() if key.count("/") == 1 and key.split("/")[0] in PROBES}
        if scores:
            return scores
    return {}


def _build_view(url: str) -> dict[str, Any]:
    names = storage.list_names(url)
    return {"shards": sum(name.endswith(".tar") for name in names), "merged": "manifest.json" in names}


def _latest_checkpoint(run: RunDir, names: list[str]) -> str | None:
    """What LATEST points at; it moves only when a checkpoint is complete."""
    try:
        text = storage.read_bytes(storage.join(run.checkpoints_url, "LATEST")).decode().strip()
    except FileNotFoundError:
        return None
    return next((name for name in names if name in text), text)


def _of_run(url: str) -> tuple[str, dict[str, Any]] | None:
    """Of a run directory whose submission lies elsewhere (submitted from another folder) or that has none: what it says itself."""
    run = RunDir(url)
    if run.read_resolved() is None:
        return None
    job = (run.read_writer() or {}).get("job")
    with contextlib.suppress(RunFailure):
        folder = os.path.dirname(job_fields(job).get("Command", "")) if job else ""
        record = _read(storage.join(folder, "job.json")) if folder else None
        if record and record["kind"] == "array":
            runs = [task["run_dir"] for task in record["tasks"]]
            place = task_folder(folder, runs.index(submitted)) if (submitted := absolute_url(url)) in runs else ""
            folder, record = place, _read(storage.join(place, "job.json")) if place else None
        if record:
            return folder, record
    return url, {"kind": "train", "run_dir": url, "logs_dir": run.logs_url, "jobs": [job] if job else [], "code": {}}


def _queue_row(job: str) -> dict[str, Any]:
    try:
        records = job_records(job)
    except RunFailure as failure:
        return {"job": job, "state": "UNKNOWN", "reason": str(failure), "nodes": None, "restarts": None}
    if not records:
        return {"job": job, "state": "GONE", "reason": "no longer in the queue", "nodes": None, "restarts": None}
    if "_" not in job and (len(records) > 1 or "ArrayTaskId" in records[0]):
        return _array_row(job, records)
    fields = records[0]
    reason = fields.get("Reason")
    return {
        "job": job, "state": fields.get("JobState"), "reason": None if reason in ("None", None) else reason,
        "nodes": fields.get("NodeList") or None, "restarts": int(fields.get("Restarts", "0")),
    }  # fmt: skip


def _array_row(job: str, records: list[dict[str, str]]) -> dict[str, Any]:
    """An array as one row: how many tasks are in which state, and which have failed."""
    states: collections.Counter[str] = collections.Counter()
    for fields in records:
        states[fields.get("JobState", "")] += _num_tasks(fields.get("ArrayTaskId", ""))
    bad = [f["ArrayTaskId"] for f in records if f.get("JobState") in FAILED_STATES and "ArrayTaskId" in f]
    nodes = sorted({f.get("NodeList", "") for f in records if f.get("JobState") == "RUNNING"} - {"", "(null)"})
    return {
        "job": job, "state": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        "reason": f"tasks {', '.join(bad)} failed" if bad else None, "nodes": ",".join(nodes) or None,
        "restarts": sum(int(f.get("Restarts", "0")) for f in records), "tasks": dict(states),
    }  # fmt: skip


def _num_tasks(tasks: str) -> int:
    """Of SLURM's notation for waiting tasks: `3`, `4-9`, `4,6-9%2` (at most 2 at a time)."""
    count = 0
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        count += int(last) - int(first) + 1 if first.isdigit() and last.isdigit() else 1
    return count


def _failure(run: RunDir, record: Mapping[str, Any], attempts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rank that failed first in the last start that failed, and the end of its log; None while all is well."""
    recorded = logs.read_failures(run.logs_url) if record["kind"] == "train" else []
    if not recorded and not (attempts and attempts[-1]["action"] == "stop"):
        return None
    rank = recorded[0]["rank"] if recorded else 0
    logs_dir = record["logs_dir"] if os.path.isdir(record["logs_dir"]) else run.logs_url
    error = recorded[0]["error"] if recorded else attempts[-1]["error"]
    return {"rank": rank, "error": error, "tail": logs.tail(storage.join(logs_dir, logs.rank_log_name(rank)))}


def _is_ours(job: str) -> bool:
    try:
        find_record(job)
    except (UsageError, RunFailure):
        return False
    return True


def _latest(jobs_dir: str) -> list[str]:
    """The newest submission folder under `jobs_dir`, as a list of one or none."""
    try:
        numbers = [name for name in storage.list_names(jobs_dir) if name.isdigit()]
    except OSError:
        return []
    return [storage.join(jobs_dir, max(numbers))] if numbers else []


def _read(url: str) -> Any:
    try:
        return json.loads(storage.read_bytes(url))
    except (OSError, ValueError):
        return None
