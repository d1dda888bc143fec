"""The columns of an index once per node: files on local disk that every rank maps into its memory.

Why: 65 dates of s2 and 50 of s1 make about 0.9 kB per sample. 21.5 million samples are 19 GB, which 8 ranks would each read
for minutes and hold: 150 GB. Mapped, they are 19 GB of the node's page cache, made by whichever rank is first, and a restart
finds them. A set of fewer than SHARED_FROM samples (90 MB) is held by each process alone and leaves no file.

An entry is a folder of `.npy` files and `facts.json`, under `data.cache_dir`/index, or a folder of the user's own in the
system's temporary directory. Its name is a hash of all that decides its content (`_about`), so nothing in it can be stale. It
appears whole (temporary name, fsync, rename) and is used only if all its checksums are right, else made again. One process
builds and the others wait at a lock file, which the kernel opens when a builder dies; where a file system has no locks, several
build, to the same bytes, and one of them wins. If the disk fails or is full, each process holds its own columns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from cluster import storage
from data_prep.shards import ShardSet
from pipeline.reader.filters import Filters
from pipeline.reader.scan import Columns, Memory, Part, scan

SHARED_FROM = 100_000  # samples in the sets
FORMAT = 1  # of the columns: count up when `scan` writes others
FACTS = "facts.json"
UNUSED_S = 14 * 86_400.0  # an entry that nobody opened for so long is removed
ABANDONED_S = 86_400.0  # and what a killed builder left, after so long
BLOCK_BYTES = 64 << 20

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Held:
    """What `scan` found. columns: arrays that may not be written to."""

    columns: Columns
    parts: list[Part]
    label: str | None


def hold(sets: Sequence[ShardSet], filters: Filters, label: str | None, cache_dir: str | None) -> Held:
    """The columns of the sets, shared with the other processes of this node where that pays. Raises what `scan` raises."""
    if sum(shardset.num_samples for shardset in sets) >= SHARED_FROM:
        try:
            return _shared(_folder(cache_dir), sets, filters, label)
        except OSError as error:
            log.warning(
                "this process holds its own copy of the index (data.cache_dir on local disk saves it): %s", error
            )
    memory = Memory()
    parts, label = scan(sets, filters, label, memory)
    return Held(memory.columns(), parts, label)


def _folder(cache_dir: str | None) -> Path:
    """Where entries are. Raises OSError, also where somebody else could have put files there."""
    if cache_dir is not None:
        folder = Path(cache_dir) / "index"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    own = Path(tempfile.gettempdir()) / f"geoloom-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    facts = os.lstat(own)
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{own} is not a folder that only this user writes to")
    (own / "index").mkdir(exist_ok=True)
    return own / "index"


def _about(sets: Sequence[ShardSet], filters: Filters, label: str | None) -> dict[str, Any]:
    """All that decides the columns, as JSON has it; a manifest holds the hash of its index."""
    about = {
        "format": FORMAT, "byteorder": sys.byteorder, "sets": [shardset.manifest_sha256 for shardset in sets],
        "filters": dataclasses.asdict(filters), "label": label,
    }  # fmt: skip
    return json.loads(json.dumps(about))


def _shared(folder: Path, sets: Sequence[ShardSet], filters: Filters, label: str | None) -> Held:
    about = _about(sets, filters, label)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    held = _open(folder / name, about)
    if held is None:
        with open(folder / f"{name}.lock", "w") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            held = _open(folder / name, about)
            if held is None:
                began = time.monotonic()
                _build(folder / name, about, sets, filters, label)
                held = _open(folder / name, about)
                log.info("index columns made in %.0f s: %s", time.monotonic() - began, folder / name)
                _sweep(folder)
    if held is None:
        raise OSError(f"{folder / name} cannot be read back")
    return held


def _build(place: Path, about: dict[str, Any], sets: Sequence[ShardSet], filters: Filters, label: str | None) -> None:
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with _Files(temporary) as files:
            parts, label = scan(sets, filters, label, files)
        facts = {
            "about": about,
            "columns": files.finished,
            "label": label,
            "parts": [dataclasses.asdict(p) for p in parts],
        }
        text = json.dumps(facts, sort_keys=True)
        with open(temporary / FACTS, "w") as file:
            file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            file.flush()
            os.fsync(file.fileno())
        storage.fsync_folder(temporary)
        if place.exists() and _open(place, about) is None:
            place.rename(f"{temporary}.old.tmp")
            shutil.rmtree(f"{temporary}.old.tmp", ignore_errors=True)
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # else, without locks, another process was faster, with the same bytes
                raise
        storage.fsync_folder(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(place: Path, about: dict[str, Any]) -> Held | None:
    """The entry, mapped; None if there is none, or not every byte of it is as its builder wrote it."""
    try:
        digest, _, text = (place / FACTS).read_text().partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        facts = json.loads(text)
        if facts["about"] != about:
            return None
        columns = {name: _map(place / f"{name}.npy", *entry) for name, entry in facts["columns"].items()}
        os.utime(place)
        return Held(columns, [Part(**part) for part in facts["parts"]], facts["label"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _map(path: Path, dtype: str, count: int, crc: int) -> np.ndarray:
    """A column, read-only. Raises ValueError if it is another one, OSError."""
    array = np.asarray(np.load(path, mmap_mode="r" if count else None, allow_pickle=False))
    if array.dtype.str != dtype or array.shape != (count,):
        raise ValueError(f"{path} holds other values")
    array.flags.writeable = False
    found, data = 0, array.view(np.uint8)
    for start in range(0, len(data), BLOCK_BYTES):
        found = google_crc32c.extend(found, data[start : start + BLOCK_BYTES])
    if found != crc:
        raise ValueError(f"{path} does not match its checksum")
    return array


class _Files:
    """A sink (`scan.Sink`) into one `.npy` file per column; `finished` afterwards: per column type, count and CRC-32C."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self.finished: dict[str, tuple[str, int, int]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            file = (self._folder / f"{name}.npy").open("wb", buffering=1 << 20)
            self._files[name] = self._open.enter_context(file)
            self.finished[name] = (values.dtype.str, 0, 0)
            self._header(name)
        dtype, count, crc = self.finished[name]
        data = np.array(values, dtype, ndmin=1).view(np.uint8)  # a copy: the checksum takes read-only arrays only
        data.flags.writeable = False
        self._files[name].write(data.data)
        self.finished[name] = (dtype, count + len(values), google_crc32c.extend(crc, data))

    def _header(self, name: str) -> None:
        """numpy leaves room in a header for a longer array, so the one with the final count fits in the same place."""
        dtype, count, _ = self.finished[name]
        np.lib.format.write_array_header_1_0(
            self._files[name], {"descr": dtype, "fortran_order": False, "shape": (count,)}
        )

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._open:
            for name, file in self._files.items() if kind is None else ():
                file.seek(0)
                self._header(name)
                file.flush()
                os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    """Removes entries that nobody uses any more; a process that still maps one keeps it."""
    now = time.time()
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            limit = ABANDONED_S if entry.name.endswith(".tmp") else UNUSED_S
            if entry.is_dir() and now - entry.stat().st_mtime > limit:
                shutil.rmtree(entry, ignore_errors=True)
