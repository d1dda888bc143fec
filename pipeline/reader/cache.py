"""A bounded cache of sample bytes on local disk, shared by the ranks of a node and kept over crashes.

One file per sample span, named by the shard's content hash and the byte range, so nothing in it can be stale. Files appear
whole (temporary name, rename); what a crash of the machine tears is found by the reader's checksums and dropped. Nothing is
locked for reading and no shared memory is used. Any error of the cache's disk is counted and the sample is read from its origin.

How full it is stands in one small file that every put adds to under its lock, so nobody has to look at the files: a cache of
20 million of them takes minutes to walk. Past TRIM_SHARE of the bound one rank, whoever gets the lock, removes the least
recently used files of some shards drawn by chance, again and again, until KEEP_SHARE is left: as good as an exact order when
many are drawn, and its cost does not grow with the cache. A cache whose account is missing or a day old is counted once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.reader.faults import FaultLog

TRIM_SHARE, KEEP_SHARE = 0.95, 0.8
LARGEST_SHARE = 0.02  # a cache that holds fewer than 50 samples is none
DRAWN = 32  # shards that a round of trimming looks at
RECOUNT_S = 86_400.0
STALE_TEMPORARY_S = 3600.0
_ACCOUNT = struct.Struct("<qd")  # bytes held, time of the last count


class DiskCache:
    """Sample spans under `folder`, at most `limit_bytes` of them. Thread-safe and safe among processes."""

    def __init__(self, folder: str, limit_bytes: int, faults: FaultLog) -> None:
        self._folder, self._limit, self._faults = Path(folder), limit_bytes, faults
        self._lock = threading.Lock()
        self.hits = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._usage = os.open(self._folder / "usage", os.O_RDWR | os.O_CREAT, 0o644)
        _, counted = self._account(0)
        if time.time() - counted > RECOUNT_S:
            self._recount()
        if self._account(0)[0] > self._limit * TRIM_SHARE:
            self.trim()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._usage)

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
        """Adds a span. Failing to is a counted fault, not an error; without room for it, it is left out."""
        if len(view) > self._limit * LARGEST_SHARE:
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            held, _ = self._account(len(view))
            if held > self._limit:
                self._account(-len(view))
            else:
                temporary.parent.mkdir(exist_ok=True)
                with open(temporary, "wb", buffering=0) as file:
                    file.write(view)
                os.replace(temporary, path)
            if held > self._limit * TRIM_SHARE:
                self.trim()
        except OSError:
            self._faults.count("cache")
            with contextlib.suppress(OSError):
                temporary.unlink()
            with contextlib.suppress(OSError):
                self._account(-len(view))

    def drop(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            self._account(-size)

    def trim(self) -> None:
        """Removes files that were least recently used until KEEP_SHARE of the bound is left. Skipped while another process
        does it."""
        with contextlib.suppress(OSError), open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for _ in range(2):
                shards = self._shards()
                random.shuffle(shards)
                for first in range(0, len(shards), DRAWN):
                    excess = self._account(0)[0] - int(self._limit * KEEP_SHARE)
                    if excess <= 0:
                        return
                    self._remove_oldest(_files(shards[first : first + DRAWN]), excess, first + DRAWN >= len(shards))
            self._recount()  # all shards were looked at twice and it is still too full: the account is wrong

    def _shards(self) -> list[os.DirEntry[str]]:
        """Folders of shards; `index` beside them is `pipeline.reader.shared`'s."""
        return [e for e in os.scandir(self._folder) if e.name != "index" and e.is_dir(follow_symlinks=False)]

    def _remove_oldest(self, files: list[os.DirEntry[str]], excess: int, last: bool) -> None:
        """Of some files the older half, or as much as is too much (of the last ones, all that it takes)."""
        found, now = [], time.time()
        for entry in files:
            with contextlib.suppress(OSError):
                facts = entry.stat()
                if entry.name.endswith(".tmp"):
                    if now - facts.st_mtime > STALE_TEMPORARY_S:
                        os.unlink(entry.path)
                    continue
                found.append((facts.st_mtime, facts.st_size, entry.path))
        freed = 0
        for _, size, path in sorted(found)[: len(found) if last else -(-len(found) // 2)]:
            if freed >= excess:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                freed += size
        self._account(-freed)

    def _account(self, change: int) -> tuple[int, float]:
        """Adds to the bytes held; returns them, and when they were last counted (0: never)."""
        with self._lock:
            fcntl.flock(self._usage, fcntl.LOCK_EX)
            try:
                data = os.pread(self._usage, _ACCOUNT.size, 0)
                held, counted = _ACCOUNT.unpack(data) if len(data) == _ACCOUNT.size else (0, 0.0)
                if change:
                    held = max(held + change, 0)
                    os.pwrite(self._usage, _ACCOUNT.pack(held, counted), 0)
                return held, counted
            finally:
                fcntl.flock(self._usage, fcntl.LOCK_UN)

    def _recount(self) -> None:
        """Looks at every file, once, and removes temporary ones that a dead process left. What others put meanwhile may count
        twice or not: until the next count."""
        total, now = 0, time.time()
        for entry in _files(self._shards()):
            with contextlib.suppress(OSError):
                facts = entry.stat()
                if not entry.name.endswith(".tmp"):
                    total += facts.st_size
                elif now - facts.st_mtime > STALE_TEMPORARY_S:
                    os.unlink(entry.path)
        with self._lock:  # another process adds under the file's lock only: this overwrites, as said
            os.pwrite(self._usage, _ACCOUNT.pack(total, time.time()), 0)


def _files(shards: Iterable[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    for shard in shards:
        with contextlib.suppress(OSError):
            found += [entry for entry in os.scandir(shard.path) if entry.is_file(follow_symlinks=False)]
    return found
