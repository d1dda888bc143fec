"""A bounded cache of sample bytes on local disk, shared by the ranks of a node and kept over crashes.

One file per sample span, named by the shard's content hash and the byte range, so nothing in it can be stale. Files appear
whole (temporary name, rename); what a crash of the machine tears is found by the reader's checksums and dropped. Nothing is
locked for reading and no shared memory is used; one rank at a time, whoever gets the lock file, removes the least recently
used files. Any error of the cache's disk is counted and the sample is read from its origin.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from pathlib import Path

from pipeline.reader.faults import FaultLog

SCAN_SHARE = 0.02  # a rank looks at the total after writing this share of the bound
KEEP_SHARE = 0.8  # and clears down to this share: with up to ten ranks between scans the bound holds
STALE_TEMPORARY_S = 3600.0


class DiskCache:
    """Sample spans under `folder`, at most `limit_bytes` of them. Thread-safe and safe among processes."""

    def __init__(self, folder: str, limit_bytes: int, faults: FaultLog) -> None:
        self._folder, self._limit, self._faults = Path(folder), limit_bytes, faults
        self._lock, self._written = threading.Lock(), 0
        self.hits = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self.trim()

    def path(self, shard_sha256: str, start: int, stop: int) -> Path:
        return self._folder / shard_sha256[:20] / f"{start}-{stop}"

    def read_into(self, path: Path, view: memoryview) -> bool:
        """Fills `view` from a cached span; false if it is not there, or not whole (then it is removed)."""
        try:
            with open(path, "rb", buffering=0) as file:
                if file.readinto(view) == len(view) and not file.read(1):
                    os.utime(path)  # least recently *used*; atime is often off
                    self.hits += 1
                    return True
            self.drop(path)
        except FileNotFoundError:
            return False
        except OSError:
            self._faults.count("cache")
        return False

    def put(self, path: Path, view: memoryview) -> None:
        """Adds a span. Failing to is a counted fault, not an error."""
        if len(view) > self._limit * SCAN_SHARE:
            return  # a cache this small cannot hold such samples within its bound
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            temporary.parent.mkdir(exist_ok=True)
            with open(temporary, "wb", buffering=0) as file:
                file.write(view)
            os.replace(temporary, path)
        except OSError:
            self._faults.count("cache")
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        with self._lock:
            self._written += len(view)
            full = self._written >= self._limit * SCAN_SHARE
            if full:
                self._written = 0
        if full:
            self.trim()

    def drop(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    def trim(self) -> None:
        """Removes the least recently used files until KEEP_SHARE of the bound is left, if more than that is there, and
        temporary files that a dead process left. Skipped while another process does it."""
        with contextlib.suppress(OSError), open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found, total, now = [], 0, time.time()
            for entry in _files(self._folder):
                with contextlib.suppress(OSError):
                    facts = entry.stat()
                    if entry.name.endswith(".tmp"):
                        if now - facts.st_mtime > STALE_TEMPORARY_S:
                            os.unlink(entry.path)
                        continue
                    found.append((facts.st_mtime, facts.st_size, entry.path))
                    total += facts.st_size
            for _, size, path in sorted(found):
                if total <= self._limit * KEEP_SHARE:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size


def _files(folder: Path) -> list[os.DirEntry[str]]:
    found = []
    for shard in os.scandir(folder):
        if shard.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                found += [entry for entry in os.scandir(shard.path) if entry.is_file(follow_symlinks=False)]
    return found
