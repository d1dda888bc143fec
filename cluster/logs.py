"""Rank logs and failure records in the run directory's `logs/`, so that a dead job explains itself.

Under `cluster submit` the batch script sends each rank's stdout and stderr to `rank-00000.log` (and says so in
GEOLOOM_RANK_LOG); in every other launch `start_logging` adds that file. A rank that fails writes
`failure-00003.json`, which requeueing compares: the same error at the same step twice is not tried a third time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from typing import Any

from cluster import storage
from cluster.errors import Fenced
from cluster.lease import Lease
from cluster.secrets import redacted

FORMAT = "%(asctime)s %(levelname).1s rank %(rank)05d %(name)s: %(message)s"


class Redacting(logging.Formatter):
    """Takes secrets out of a finished line, wherever they came from (tracebacks too)."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def rank_log_name(rank: int) -> str:
    return f"rank-{rank:05d}.log"


def start_logging(logs_url: str | None, rank: int, level: int = logging.INFO, lease: Lease | None = None) -> None:
    """Sets up `logging` for this rank: stderr (rank 0: from `level`, others: warnings) and the rank's file.

    logs_url: `RunDir.logs_url`; on an object store the file is left out (the batch script uploads its own at the end).
    lease: of the run directory; once a later start has it, nothing more goes into its file.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(level)
    captured = "GEOLOOM_RANK_LOG" in os.environ
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level if rank == 0 or captured else logging.WARNING)
    handlers: list[logging.Handler] = [terminal]
    if logs_url and not captured and storage.is_local(logs_url):
        folder = storage.local_path(logs_url)
        os.makedirs(folder, exist_ok=True)
        file = logging.FileHandler(os.path.join(folder, rank_log_name(rank)))
        file.addFilter(lambda record: lease is None or _holds(lease))
        handlers.append(file)
    for handler in handlers:
        handler.setFormatter(Redacting(FORMAT, defaults={"rank": rank}))
        root.addHandler(handler)


def _holds(lease: Lease) -> bool:
    try:
        lease.check()
    except Fenced:
        return False
    return True


def record_failure(logs_url: str, rank: int, step: int, error: BaseException, lease: Lease | None = None) -> None:
    """Writes why this rank ends, unless the directory is a later start's (then this end is of no concern to it). Never raises:
    it is called while something worse is under way."""
    record = {
        "rank": rank, "step": step, "error": redacted(f"{type(error).__name__}: {error}"), "time": time.time(),
        "job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "traceback": redacted("".join(traceback.format_exception(error))[-20_000:]),
    }  # fmt: skip
    write = storage.write_atomic if lease is None else lease.write
    try:
        write(storage.join(logs_url, f"failure-{rank:05d}.json"), json.dumps(record, indent=2).encode())
    except Fenced:
        return
    except Exception as problem:  # the disk may be what failed
        logging.getLogger(__name__).warning("cannot record the failure under %s: %s", logs_url, problem)


def read_failures(logs_url: str) -> list[dict[str, Any]]:
    """Failure records that stand in `logs/`, first in time first: the first is the cause, later ones are its echoes."""
    failures = []
    for name in storage.list_names(logs_url):
        if name.startswith("failure-") and name.endswith(".json"):
            try:
                failures.append(json.loads(storage.read_bytes(storage.join(logs_url, name))))
            except (ValueError, FileNotFoundError):
                continue
    return sorted(failures, key=lambda failure: failure.get("time", 0.0))


def clear_failures(logs_url: str) -> None:
    """Removes the records of an earlier start; rank 0 does so when a run starts."""
    for name in storage.list_names(logs_url):
        if name.startswith("failure-"):
            storage.remove(storage.join(logs_url, name))


def tail(url: str, lines: int = 20, size_bytes: int = 65_536) -> list[str]:
    """Last lines of a log, reading only its end; empty if it does not exist."""
    try:
        start = max(storage.size(url) - size_bytes, 0)
        data = storage.read_bytes(url, start)
    except FileNotFoundError:
        return []
    return data.decode(errors="replace").splitlines()[-lines:]
