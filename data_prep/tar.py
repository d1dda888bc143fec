"""Plain tar (ustar) with deterministic bytes: fixed time, owner and mode, order as given, offsets known while writing."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import google_crc32c
import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)


class Readable(Protocol):
    """Anything that reads forward."""

    def read(self, size: int, /) -> bytes: ...


class Writable(Protocol):
    """Anything that takes bytes."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class Entry:
    """One file in a tar. header: offset of its header; offset, length: its data; sha256: of its data ("" if not computed).

    crc32c: of its data. sha256 names content for good; crc32c is what training checks on every read, at 1/20 of the time.
    """

    name: str
    header: int
    offset: int
    length: int
    sha256: str
    crc32c: int = 0


class TarWriter:
    """Appends files to a stream. position: bytes written so far."""

    def __init__(self, stream: Writable) -> None:
        self._stream, self._digest, self._crc32c, self.position = stream, hashlib.sha256(), 0, 0

    def add(self, name: str, data: bytes) -> Entry:
        """Appends one file. Raises ValueError for a name that a plain ustar header cannot hold."""
        info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, mode 0644 unless set
        info.size = len(data)
        start = self.position
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        entry = Entry(
            name, start, self.position, len(data), hashlib.sha256(data).hexdigest(), google_crc32c.value(data)
        )
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return entry

    def close(self) -> tuple[str, int]:
        """Writes the end marker; returns sha256 and CRC-32C of the whole tar."""
        self._write(END)
        return self._digest.hexdigest(), self._crc32c

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self.position += len(data)


def extend_crc32c(crc32c: int, view: memoryview) -> int:
    """CRC-32C of what `crc32c` covers and `view` after it. (The library takes read-only arrays uncopied, but no memoryview.)"""
    return google_crc32c.extend(crc32c, np.frombuffer(view.toreadonly(), np.uint8))


def walk(stream: Readable) -> Iterator[tuple[Entry, bytes]]:
    """(entry, data) of every file of a tar that we wrote, in order, with sha256 computed.

    Raises ValueError for a tar that is cut short, has no end marker, or holds anything but plain files.
    """
    position = 0
    while True:
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            if stream.read(BLOCK) != bytes(BLOCK):
                raise ValueError("the end marker is cut short")
            return
        if len(header) < BLOCK:
            raise ValueError(f"cut short at byte {position + len(header)}: no end marker")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(f"bad tar header at byte {position}: {error}") from None
        if not info.isreg() or info.size < 0:
            raise ValueError(f"{info.name!r} at byte {position} is not a plain file")
        padded = info.size + -info.size % BLOCK
        data = stream.read(padded)
        if len(data) < padded:
            raise ValueError(f"cut short in {info.name!r} at byte {position + BLOCK + len(data)}")
        data = data[: info.size]
        digest, check = hashlib.sha256(data).hexdigest(), google_crc32c.value(data)
        yield Entry(info.name, position, position + BLOCK, info.size, digest, check), data
        position += BLOCK + padded


def samples(stream: Readable) -> Iterator[tuple[str, list[Entry], dict[str, bytes]]]:
    """(key, entries, data by suffix) of every sample of a shard: adjacent files that share the name up to the first dot."""
    key: str = ""
    entries: list[Entry] = []
    data: dict[str, bytes] = {}
    for entry, content in walk(stream):
        stem, _, suffix = entry.name.partition(".")
        if entries and stem != key:
            yield key, entries, data
            entries, data = [], {}
        key = stem
        entries.append(entry)
        data[suffix] = content
    if entries:
        yield key, entries, data
