"""The columns of an index as this node holds them: mapped where they lie, once for all its ranks.

A set carries its columns in the form they are mapped (`data_prep.column_file`): on a mounted file system they are mapped there
and nothing is made. From object storage they are fetched once per node; of a set without them (an older build) and of several
sets together they are made once per node. With 65 dates of s2 and 50 of s1 a sample has about 0.9 kB: 21.5 million samples are
19 GB of the node's page cache, where 8 ranks with their own copies would need 150 GB. Sets of fewer than SHARED_FROM samples
(90 MB) are held by each process alone, wherever they lie: they leave no file, and nobody can write into what is read.

An entry is a folder with the file and `facts.json`, under `data.cache_dir`/index, or a folder of the user's own in the system's
temporary directory. Its name is a hash of all that decides its content, so nothing in it can be stale. It appears whole
(temporary name, fsync, rename) and is used only if all its checksums are right, else made again. One process makes it and the
others wait at a lock file, which the kernel opens when a maker dies; where a file system has no locks, several make it, the same
bytes, and one of them wins. If the disk fails or is full, each process holds its own columns.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import column_file
from data_prep.column_file import COLUMNS, WrongColumns
from data_prep.columns import FORMAT, Columns, Memory, scan, segments
from data_prep.shards import ShardSet

SHARED_FROM = 100_000  # samples in the sets
FACTS = "facts.json"
UNUSED_S = 14 * 86_400.0  # an entry that nobody opened for so long is removed
ABANDONED_S = 86_400.0  # and what a killed maker left, after so long
ALWAYS = ("key.", "shard", "label.", "width_m", "height_m", "west", "south", "east", "north", "scene", "split", "modalities",
          "cloud", "flagged", "day_")  # fmt: skip

log = logging.getLogger(__name__)
Make = Callable[[BinaryIO], dict[str, Any]]


def hold(sets: Sequence[ShardSet], modalities: Sequence[str], cache_dir: str | None) -> Columns:
    """All rows of all sets, one behind the other, with the columns of some modalities; read-only.

    Raises UsageError for an index that is missing, damaged or not the one its manifest lists.
    """
    wanted = [*ALWAYS, *(f"{m}." for m in modalities)]
    if len(sets) == 1:
        return _of_set(sets[0], wanted, cache_dir)

    def pieces() -> Any:
        return segments([(_of_set(s, None, cache_dir), len(s.manifest["shards"])) for s in sets])

    about = _about("joined", [shardset.manifest_sha256 for shardset in sets])
    held = None
    if sum(shardset.num_samples for shardset in sets) >= SHARED_FROM:
        held = _on_node(cache_dir, about, lambda stream: column_file.assemble(stream, pieces()), wanted)
    return held or {name: np.concatenate(parts) for name, parts in pieces()}


def _of_set(shardset: ShardSet, wanted: Sequence[str] | None, cache_dir: str | None) -> Columns:
    """The columns of one set, from the nearest place that has them."""
    entry = shardset.manifest.get("columns")
    if entry is not None:
        place = storage.join(shardset.url, COLUMNS)
        try:
            held = _carried(place, entry, shardset.num_samples >= SHARED_FROM, wanted, cache_dir)
        except (WrongColumns, FileNotFoundError) as error:
            raise UsageError(
                f"{place} is not the index that the manifest lists ({error}); mend it with python -m data_prep verify "
                f"{shardset.url} --repair"
            ) from None
        if held is not None:
            return held
        log.info("%s was written by another version of geoloom: its columns are made from index.parquet", place)
    return _made(shardset, wanted, cache_dir)


def _carried(
    place: str, entry: dict[str, Any], large: bool, wanted: Sequence[str] | None, cache_dir: str | None
) -> Columns | None:
    """The file that travels with the set; None: in another form. Raises WrongColumns."""
    if storage.is_local(place) and large:
        return column_file.map_file(storage.local_path(place), entry, wanted)

    def fetch(stream: BinaryIO) -> dict[str, Any]:
        with storage.open_read(place) as source:
            shutil.copyfileobj(source, stream, 16 << 20)
        return entry

    if large:
        held = _on_node(cache_dir, _about("fetched", entry["header_sha256"]), fetch, wanted, entry)
        if held is not None:
            return held
    return column_file.parse(np.frombuffer(storage.read_bytes(place), np.uint8), entry, wanted)


def _made(shardset: ShardSet, wanted: Sequence[str] | None, cache_dir: str | None) -> Columns:
    """Columns made from index.parquet: of a set that carries none. Raises UsageError."""

    def make(stream: BinaryIO) -> dict[str, Any]:
        with column_file.spooled(shardset, Path(stream.name).parent) as found:
            return column_file.assemble(stream, found)

    try:
        if shardset.num_samples >= SHARED_FROM:
            held = _on_node(cache_dir, _about("made", shardset.manifest_sha256), make, wanted)
            if held is not None:
                return held
        memory = Memory()
        scan(shardset, memory)
    except RunFailure as error:
        raise UsageError(str(error)) from None
    except ValueError as error:
        raise UsageError(column_file.damaged(shardset.url, error)) from None
    return memory.columns()


# --- entries of this node


def _about(what: str, of: Any) -> dict[str, Any]:
    """All that decides the content of an entry, as JSON has it; a manifest holds the hash of its index."""
    return {"format": FORMAT, "byteorder": sys.byteorder, what: of}


def _on_node(
    cache_dir: str | None, about: dict[str, Any], make: Make, wanted: Sequence[str] | None,
    listed: dict[str, Any] | None = None,
) -> Columns | None:  # fmt: skip
    """The node's entry, made by `make` if there is none; None where the disk does not do.

    listed: what the manifest says of the file, where it does; a file that differs raises WrongColumns.
    """
    try:
        folder = _folder(cache_dir)
        place = folder / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        held = _open(place, about, wanted)
        if held is None:
            with open(f"{place}.lock", "w") as lock:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                held = _open(place, about, wanted)
                if held is None:
                    began = time.monotonic()
                    _make(place, about, make, listed)
                    held = _open(place, about, wanted)
                    log.info("index columns on this node in %.0f s: %s", time.monotonic() - began, place)
                    _sweep(folder)
        if held is None:
            raise OSError(f"{place} cannot be read back")
        return held
    except OSError as error:
        log.warning("this process holds its own copy of the index (data.cache_dir on local disk saves it): %s", error)
        return None


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


def _make(place: Path, about: dict[str, Any], make: Make, listed: dict[str, Any] | None) -> None:
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with open(temporary / COLUMNS, "wb") as file:
            entry = make(file)
            file.flush()
            os.fsync(file.fileno())
        if listed is not None:
            column_file.map_file(temporary / COLUMNS, listed)
        text = json.dumps({"about": about, "entry": entry}, sort_keys=True)
        with open(temporary / FACTS, "w") as facts:
            facts.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            facts.flush()
            os.fsync(facts.fileno())
        storage.fsync_folder(temporary)
        if place.exists() and _open(place, about, None) is None:
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


def _open(place: Path, about: dict[str, Any], wanted: Sequence[str] | None) -> Columns | None:
    """The entry, mapped; None if there is none, or not every byte of it is as its maker wrote it."""
    try:
        digest, _, text = (place / FACTS).read_text().partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        facts = json.loads(text)
        if facts["about"] != about:
            return None
        columns = column_file.map_file(place / COLUMNS, facts["entry"], wanted)
        os.utime(place)
        return columns
    except (OSError, ValueError, KeyError, TypeError, EOFError, WrongColumns):
        return None


def _sweep(folder: Path) -> None:
    """Removes entries that nobody uses any more; a process that still maps one keeps it."""
    now = time.time()
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            limit = ABANDONED_S if entry.name.endswith(".tmp") else UNUSED_S
            if entry.is_dir() and now - entry.stat().st_mtime > limit:
                shutil.rmtree(entry, ignore_errors=True)
