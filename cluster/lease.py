"""One writer per run directory: a lease whose number only grows, and writes that an outdated holder cannot bring to an end.

```
lease/00000003.json      who took the directory third: {"epoch", "token", "host", "pid", "job", "restart", "time"}
lease/00000003.staging/  local file systems: where its files are written before they get their names
```

A node that was cut from the network, or a process that was stopped and goes on, does not know that another start has taken
over. Each start therefore creates the next number, which of several callers exactly one can do (a hard link; on object stores
`If-None-Match`), and every shared write goes through `Lease.write`. What that guarantees once `acquire` has returned:

- local: nothing of an earlier holder gets a name any more. Taking over removes the earlier staging folders, and a rename out of
  a folder that is gone fails, however late it comes.
- object stores: the holder looks at the object's version, then at the lease, then replaces that version only (`If-Match`). A
  write that was under way during the takeover can still land, but only until the new holder has written the same object
  itself; then it fails. A store that ignores such conditions is noticed and said; there only the look at the lease holds.
- anything else (a call to a tracking server): the lease is checked right before; one call under way cannot be taken back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from cluster import storage
from cluster.errors import Fenced, RunFailure

FOLDER = "lease"
_RECORD = re.compile(r"(\d{8})\.json$")
CONDITIONAL_BYTES = 64 << 20  # larger ones go up in parts, which take no condition
WATCH_LOCAL_S, WATCH_REMOTE_S = 2.0, 10.0
ATTEMPTS = 100  # of a write that others keep overtaking, of a number that others keep taking
log = logging.getLogger(__name__)


class Lease:
    """The right to write to one run directory, as number `epoch`. Made by `acquire`, or by `of` on the other ranks of a start."""

    def __init__(self, url: str, record: Mapping[str, Any]) -> None:
        self.url, self.record, self.epoch = url, dict(record), int(record["epoch"])
        self._lost = False

    @staticmethod
    def acquire(url: str) -> Lease:
        """Takes the directory over from whoever has it. From now on an earlier holder's `check` and `write` raise."""
        number = 0
        for _ in range(ATTEMPTS):
            number = max(newest_epoch(url), number) + 1  # a listing may lag behind: not the same number twice
            record = {**identity(), "epoch": number, "token": uuid.uuid4().hex, "time": time.time()}
            name = _record_url(url, record["epoch"])
            data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
            if storage.create(name, data):
                break
        else:
            raise RunFailure(f"{url}: other starts of this run keep taking it over; leave one of them running")
        lease = Lease(url, record)
        if storage.is_local(url):
            os.makedirs(lease._staging)
            lease._revoke_earlier()
        elif not url.startswith("memory://") and storage.create(name, data):
            log.warning(
                "%s: this store ignores If-None-Match; two starts in the same second may both believe to be first", url
            )
        return lease

    @staticmethod
    def of(url: str, record: Mapping[str, Any] | None) -> Lease | None:
        """The lease that another rank of this start has acquired, from its `record`."""
        return Lease(url, record) if record else None

    @property
    def is_lost(self) -> bool:
        """Whether a `check` has failed so far; asks nobody."""
        return self._lost

    def check(self) -> None:
        """Raises Fenced if a later start has taken over. One `stat` locally, one listing on an object store."""
        if not self._lost:
            if storage.is_local(self.url):
                self._lost = os.path.exists(storage.local_path(_record_url(self.url, self.epoch + 1)))
            else:
                self._lost = newest_epoch(self.url) > self.epoch
        if self._lost:
            raise Fenced(self.why())

    def watch(self) -> None:
        """Looks again and again from a thread, so that `is_lost` is never far behind; a store that is away tells nothing."""
        every_s = WATCH_LOCAL_S if storage.is_local(self.url) else WATCH_REMOTE_S

        def look() -> None:
            while not self._lost:
                time.sleep(every_s)
                with contextlib.suppress(Exception):
                    self.check()

        threading.Thread(target=look, name="lease", daemon=True).start()

    def write(self, url: str, data: bytes) -> None:
        """Replaces a file of the directory whole, which an outdated holder cannot (see the head of this file).

        Raises:
            Fenced: a later start has taken over; nothing was written.
        """
        if storage.is_local(self.url):
            self._write_local(storage.local_path(url), data)
        elif url.startswith(("s3://", "s3a://")) and len(data) <= CONDITIONAL_BYTES:
            self._write_object(url, data)
        else:  # no conditions there: the look at the lease is what holds
            self.check()
            storage.write_atomic(url, data)

    def remove(self, url: str) -> None:
        """Removes a file of the directory; absent is fine. Raises Fenced."""
        self.check()
        storage.remove(url)

    # --- how

    @property
    def _staging(self) -> str:
        return storage.local_path(storage.join(self.url, FOLDER, f"{self.epoch:08d}.staging"))

    def _write_local(self, path: str, data: bytes) -> None:
        self.check()
        temporary = os.path.join(self._staging, uuid.uuid4().hex)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except FileNotFoundError:
            self._lost = not os.path.isdir(self._staging)
            if self._lost:
                raise Fenced(self.why()) from None
            raise
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if error.errno != errno.EXDEV:
                raise
            storage.write_atomic(path, data)  # a linked folder on another file system: there only the check above holds
            return
        storage.fsync_folder(os.path.dirname(path))

    def _write_object(self, url: str, data: bytes) -> None:
        for _ in range(ATTEMPTS):
            version = storage.version(url)
            self.check()  # after the look: what a later holder writes changes the version
            if storage.replace(url, data, version):
                return
        raise RunFailure(f"{url}: somebody else keeps writing this object")

    def _revoke_earlier(self) -> None:
        folder = os.path.dirname(self._staging)
        for name in os.listdir(folder):
            number, _, kind = name.partition(".")
            if kind == "staging" and int(number) < self.epoch:
                away = os.path.join(folder, f"{name}.{uuid.uuid4().hex[:8]}.tmp")
                with contextlib.suppress(FileNotFoundError):
                    os.rename(os.path.join(folder, name), away)  # at once; removing takes its time
                    shutil.rmtree(away, ignore_errors=True)

    def why(self) -> str:
        """One line that names who has the directory now."""
        newest = (history(self.url) or [{}])[-1]
        job = f", job {newest['job']}" if newest.get("job") else ""
        where = f"{newest.get('host')} (process {newest.get('pid')}{job}, start {newest.get('epoch')})"
        return f"{self.url}: a later start of this run on {where} writes here now; this one stops and leaves it alone"


def identity() -> dict[str, Any]:
    """Who this process is to other starts of the run: {"host", "pid", "job", "restart"}."""
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "restart": restart}


def newest_epoch(url: str) -> int:
    """Number of the latest start that has taken the directory; 0 before the first."""
    return max((int(m[1]) for m in map(_RECORD.match, storage.list_names(storage.join(url, FOLDER))) if m), default=0)


def history(url: str) -> list[dict[str, Any]]:
    """The records of all starts, oldest first; one that cannot be read is left out."""
    folder, records = storage.join(url, FOLDER), []
    for name in storage.list_names(folder):
        if _RECORD.match(name):
            with contextlib.suppress(ValueError, FileNotFoundError):
                records.append(json.loads(storage.read_bytes(storage.join(folder, name))))
    return records


def overtaken(url: str, job: str, restart: int) -> dict[str, Any] | None:
    """The record of the start that took the directory from start `restart` of `job`; None if nobody did, or it never had it."""
    records = history(url)
    own = [i for i, record in enumerate(records) if (record.get("job") or "", record.get("restart")) == (job, restart)]
    later = records[own[-1] + 1 :] if own else []
    return later[0] if later else None


def _record_url(url: str, epoch: int) -> str:
    return storage.join(url, FOLDER, f"{epoch:08d}.json")
