"""Whether the process that writes a run is still there: it may have been killed without a last word."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Literal

import psutil

from cluster import storage
from cluster.errors import RunFailure
from cluster.slurm.commands import job_fields

Fate = Literal["unknown", "alive", "queued", "gone"]


def fate(writer: Mapping[str, Any]) -> Fate:
    """Of the `writer.json` of a run directory. unknown: on another host, and no job that SLURM could tell about;
    queued: gone, but its job waits for another start."""
    if writer.get("host") == socket.gethostname():
        alive = lives(writer.get("pid"), writer.get("time"))
        if alive or not writer.get("job"):
            return "alive" if alive else "gone"
    elif not writer.get("job"):
        return "unknown"
    try:
        job = job_fields(str(writer["job"]))
    except RunFailure:  # no SLURM here
        return "gone" if writer.get("host") == socket.gethostname() else "unknown"
    if job.get("JobState") in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
        return "queued"
    if job.get("JobState") in ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "SIGNALING", "STAGE_OUT"):
        return "unknown"  # perhaps this start of it, perhaps one that has not claimed the directory yet
    return "gone"


def runs(job: str) -> bool:
    """Whether SLURM says that a job is running now; not where nobody can be asked."""
    try:
        return job_fields(job).get("JobState") == "RUNNING"
    except RunFailure:
        return False


def lives(pid: Any, since: Any = None) -> bool:
    """Whether process `pid` of this host runs, and is not another one that got the number after `since` (epoch seconds)."""
    try:
        process = psutil.Process(int(pid))
        reused = since is not None and process.create_time() > float(since) + 1
        # a stopped one may be anything's past: whoever starts the run anew takes it over, and it learns so when it goes on
        return not reused and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def is_our_place(url: str, host: str) -> bool:
    """Whether a run directory that a run on `host` calls `url` is the one this host calls so: the same path on another host
    may be another folder."""
    return not storage.is_local(url) or host == socket.gethostname()
