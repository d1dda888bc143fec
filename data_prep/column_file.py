"""`columns.safetensors`: the columns of an index (`data_prep.columns`) in one file that is mapped as it lies.

The file is written once, at the merge, and travels with the set. Its manifest entry is
`columns {bytes, header_sha256, sha256}`; the header holds the CRC-32C of every column. So a reader checks the header against
the manifest and the columns it maps against the header, at 12 GB/s, and decodes nothing. Columns lie by falling element size,
so each is aligned. Stock `safetensors` reads the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c
import numpy as np

from cluster import storage
from cluster.errors import RunFailure
from data_prep import columns
from data_prep.columns import Columns
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet

COLUMNS = "columns.safetensors"
BLOCK_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20
_DTYPES = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "U32": "<u4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
           "BOOL": "|b1"}  # fmt: skip
_NAMES = {np.dtype(dtype).str: name for name, dtype in _DTYPES.items()}


class Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...


class WrongColumns(Exception):
    """The file is not the one the manifest lists; the message says in what."""


def write(shardset: ShardSet) -> dict[str, Any]:
    """Makes the file of a set from its index.parquet; returns its manifest entry. The same index gives the same bytes.

    Needs room for the columns (about 0.9 kB per sample) in the temporary folder.

    Raises RunFailure: an index that contradicts itself or the shards it was made from, no room.
    """
    place = storage.join(shardset.url, COLUMNS)
    with spooled(shardset) as found, storage.open_atomic(place) as stream:
        return assemble(stream, found)


@contextlib.contextmanager
def spooled(shardset: ShardSet, folder: Path | None = None) -> Iterator[Iterable[tuple[str, list[np.ndarray]]]]:
    """The columns of a set, scanned into files of a temporary folder: gone when the block ends. Raises RunFailure."""
    with tempfile.TemporaryDirectory(prefix="geoloom-columns-", dir=folder) as name:
        try:
            with Spool(Path(name)) as spool:
                columns.scan(shardset, spool)
            yield spool.columns()
        except ValueError as error:
            raise RunFailure(damaged(shardset.url, error)) from None


def damaged(url: str, why: object) -> str:
    """One line for an index that cannot be believed."""
    return f"{url}: the index is damaged ({why}); rebuild it with python -m data_prep verify {url} --repair"


def assemble(stream: Writable, found: Iterable[tuple[str, Sequence[np.ndarray]]]) -> dict[str, Any]:
    """Writes columns, each given as its pieces, as one file; returns {"bytes", "header_sha256", "sha256"}."""
    held = {name: list(pieces) for name, pieces in found}
    order = sorted(held, key=lambda name: (-held[name][0].dtype.itemsize, name))
    entries: dict[str, Any] = {}
    crcs, position = {}, 0
    for name in order:
        pieces = held[name]
        count = sum(len(piece) for piece in pieces)
        end = position + count * pieces[0].dtype.itemsize
        entries[name] = {"dtype": _NAMES[pieces[0].dtype.str], "shape": [count], "data_offsets": [position, end]}
        crcs[name], position = _crc(pieces), end
    header = _header(entries, crcs)
    digest = hashlib.sha256()
    blocks: Iterator[Any] = (block for name in order for piece in held[name] for block in _blocks(piece))
    for block in itertools.chain([header], blocks):
        digest.update(block)
        stream.write(block)
    return {
        "bytes": len(header) + position,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "sha256": digest.hexdigest(),
    }


def _header(entries: Mapping[str, Any], crcs: Mapping[str, int]) -> bytes:
    about = {"format": str(columns.FORMAT), "modalities": ",".join(MODALITIES), "crc32c": json.dumps(crcs)}
    text = json.dumps({"__metadata__": about, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Mapped(Columns):
    """Columns that are views of a mapped file, and change if somebody writes into it; `check` tells.

    The mapped file itself is looked at, not what its path leads to now: a file that another one has replaced (by a rename, as every
    command of ours replaces files) stays as it was for those who have it mapped.
    """

    def __init__(self, columns: Columns, path: str | Path, fd: int, seen: tuple[int, int]) -> None:
        super().__init__(columns)
        self._path, self._fd, self._seen = path, fd, seen
        weakref.finalize(self, os.close, fd)

    def check(self) -> None:
        """Raises WrongColumns if the file was written into since it was opened. One `fstat`."""
        if _state(self._fd) != self._seen:
            raise WrongColumns(f"{self._path} was written over where it lies, while it was mapped")


def _state(fd: int) -> tuple[int, int]:
    """What changes when a file is written to or cut, and not when its name is taken by another."""
    facts = os.fstat(fd)
    return facts.st_size, facts.st_mtime_ns


def map_file(path: str | Path, entry: Mapping[str, Any], wanted: Iterable[str] | None = None) -> Mapped | None:
    """The columns of a local file, read-only views of its map; None if another version of geoloom wrote it in another form.

    entry: what the manifest says of the file. wanted: prefixes of the names to take (all by default); only those are checked.

    Raises WrongColumns for a file that is missing or is not the one of the entry, byte by byte.
    """
    with contextlib.ExitStack() as opened:
        try:
            fd = os.open(path, os.O_RDONLY)
            opened.callback(os.close, fd)
            seen = _state(fd)
            memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise WrongColumns(f"it cannot be read: {error}") from None
        columns = parse(np.frombuffer(memory, np.uint8), entry, wanted)
        if columns is None:
            return None
        opened.pop_all()  # stays open for `check`, as long as the columns live
        return Mapped(columns, path, fd, seen)


def parse(data: np.ndarray, entry: Mapping[str, Any], wanted: Iterable[str] | None = None) -> Columns | None:
    """As `map_file`, of a whole file as uint8."""
    if len(data) != entry["bytes"]:
        raise WrongColumns(f"it has {len(data)} bytes instead of {entry['bytes']}")
    length = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data), MAX_HEADER_BYTES):
        raise WrongColumns("its header is cut")
    header = data[:length].tobytes()
    if hashlib.sha256(header).hexdigest() != entry["header_sha256"]:
        raise WrongColumns("its header is not the manifest's: it belongs to another state of the set, or is damaged")
    entries = json.loads(header[8:])
    about = entries.pop("__metadata__")
    if about["format"] != str(columns.FORMAT) or about["modalities"] != ",".join(MODALITIES):
        return None
    prefixes, crcs = None if wanted is None else tuple(wanted), json.loads(about["crc32c"])
    found = {}
    for name, place in entries.items():
        if prefixes is not None and not name.startswith(prefixes):
            continue
        begin, end = place["data_offsets"]
        column = data[length + begin : length + end].view(_DTYPES[place["dtype"]])
        column.flags.writeable = False
        if _crc([column]) != crcs[name]:
            raise WrongColumns(f"column {name} does not match its checksum")
        found[name] = column
    return found


def _crc(pieces: Iterable[np.ndarray]) -> int:
    crc = 0
    for piece in pieces:
        for block in _blocks(piece):
            crc = google_crc32c.extend(crc, block)
    return crc


def _blocks(piece: np.ndarray) -> Iterator[np.ndarray]:
    """Bytes of a column, read-only (the checksum takes nothing else without a copy), so many at a time."""
    data = piece.view(np.uint8)
    data.flags.writeable = False
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


class Spool:
    """A sink (`columns.Sink`) into one file per column of a local folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, contextlib.ExitStack()
        self._files: dict[str, tuple[np.dtype[Any], BinaryIO]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            file = self._open.enter_context((self._folder / f"{len(self._files)}").open("wb", buffering=1 << 20))
            self._files[name] = (values.dtype, file)
        dtype, file = self._files[name]
        if dtype != values.dtype:
            raise TypeError(f"{name} was {dtype}, now {values.dtype}")
        file.write(np.ascontiguousarray(values).view(np.uint8).data)

    def columns(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Every column, mapped; after the `with` block of writing."""
        for number, (name, (dtype, _)) in enumerate(self._files.items()):
            path = self._folder / str(number)
            empty = path.stat().st_size == 0
            yield name, [np.empty(0, dtype) if empty else np.memmap(path, dtype, "r").view(np.ndarray)]

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
