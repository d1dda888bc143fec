"""Zarr groups from folders, zips, members of tars and object stores, with every chunk's claim checked before it is decoded.

A compressed chunk says how large it will be, and a decoder believes it. Here the stored bytes of a chunk pass by a check first:
Blosc, Zstandard and LZ4 frames must decode to what the array's metadata says, gzip and the like are unpacked up to that and no
further, Blosc frames that are cut short (the decoder would make pixels up) are noticed. Pickled objects are refused by zarr itself.
"""

from __future__ import annotations

import bz2
import io
import itertools
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import numpy as np
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from cluster.storage import is_local, local_path
from data_prep.sources.guard import Hostile, check_blosc, check_chunk, check_zip, check_zstd
from data_prep.sources.raster import first_line
from data_prep.sources.records import ReadFault, SourceFault
from data_prep.sources.remote import read_source, retrying, source_filesystem

COORDINATE_BYTES = 64 << 20
PAGE = 64 << 10
METADATA = (".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json")


class CheckedStore(WrapperStore[Any]):
    """A store that looks at the chunks of the arrays it was told of (`watch`) as they pass, and reads again what may pass."""

    def __init__(self, store: Any, href: str = "") -> None:
        super().__init__(store)
        self._href = href
        self._watched: dict[str, _Chunks] = {}

    def _with_store(self, store: Any) -> CheckedStore:
        made = CheckedStore(store, self._href)
        made._watched = self._watched
        return made

    def watch(self, array: Any) -> None:
        """Checks what an array claims, and from now on its chunks. Raises Hostile."""
        chunks = _Chunks.of(array)
        check_chunk(f"array {array.path or array.name}", array.chunks, array.dtype.itemsize)
        self._watched[array.path] = chunks

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await self._store.get(key, prototype, byte_range)
        if found is None or not self._watched or key.rsplit("/", 1)[-1] in METADATA:
            return found
        chunks = next((held for path, held in self._watched.items() if not path or key.startswith(f"{path}/")), None)
        if chunks is not None:
            chunks.check(found.to_bytes(), byte_range)
        return found


class _Chunks:
    """How the chunks of one array are stored: the outermost codec, the size they decode to, and whether files hold several."""

    def __init__(self, codec: str, expected: int, inner: int, index_at_end: bool) -> None:
        self.codec, self.expected, self.inner, self.index_at_end = codec, expected, inner, index_at_end

    @staticmethod
    def of(array: Any) -> _Chunks:
        metadata, inner, at_end = array.metadata, 0, True
        codecs = [*(getattr(metadata, "codecs", None) or ()), getattr(metadata, "compressor", None)]
        sharding = next((codec for codec in codecs if hasattr(codec, "index_codecs")), None)
        if sharding is not None:
            codecs, inner = list(sharding.codecs), math.prod(s // c for s, c in zip(array.shards, array.chunks))
            at_end = "start" not in str(sharding.index_location).lower()
        names = [type(codec).__name__.lower().removesuffix("codec") for codec in codecs if codec is not None]
        known = next((name for name in reversed(names) if name in _CHECKS), "")
        return _Chunks(known, math.prod(array.chunks) * array.dtype.itemsize, inner, at_end)

    def check(self, data: bytes, byte_range: Any) -> None:
        check = _CHECKS.get(self.codec)
        if check is None:
            return
        if not self.inner:
            if byte_range is None:
                check(data, self.expected)
            return
        if byte_range is not None:
            if "suffix" not in type(byte_range).__name__.lower() and len(data) >= 16:
                check(data, self.expected)
            return
        size = 16 * self.inner
        index = data[-size - 4 : -4] if self.index_at_end else data[:size]
        entries = np.frombuffer(index, "<u8").reshape(-1, 2) if len(index) == size else np.empty((0, 2), "<u8")
        for start, length in entries.tolist():
            if length not in (0, 2**64 - 1):
                check(data[start : start + length], self.expected)


def _check_unpacked(decoder: Any, data: bytes, expected: int) -> None:
    if len(decoder.decompress(data, expected + 1)) > expected:
        raise Hostile(f"chunk decodes to more than the {expected} bytes its array's chunks have")


def _check_lz4(data: bytes, expected: int) -> None:
    if int.from_bytes(data[:4], "little") > expected:
        raise Hostile(f"chunk claims {int.from_bytes(data[:4], 'little')} bytes, its array's chunks have {expected}")


_CHECKS: dict[str, Any] = {
    "blosc": check_blosc,
    "zstd": check_zstd,
    "lz4": _check_lz4,
    "gzip": lambda data, expected: _check_unpacked(zlib.decompressobj(47), data, expected),
    "zlib": lambda data, expected: _check_unpacked(zlib.decompressobj(47), data, expected),
    "bz2": lambda data, expected: _check_unpacked(bz2.BZ2Decompressor(), data, expected),
    "lzma": lambda data, expected: _check_unpacked(lzma.LZMADecompressor(), data, expected),
}


class ZipEntries(MutableMapping[str, Any]):
    """Members of a zip as a mapping that unpacks what is asked for, and nothing before."""

    def __init__(self, file: Any, packed_bytes: int) -> None:
        self._archive = zipfile.ZipFile(file)
        check_zip(self._archive, packed_bytes)
        self._names = {name for name in self._archive.namelist() if not name.endswith("/")}

    def __getitem__(self, key: str) -> Any:
        if key not in self._names:
            raise KeyError(key)
        return default_buffer_prototype().buffer.from_bytes(self._archive.read(key))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __setitem__(self, key: str, value: Any) -> None:
        raise PermissionError("read only")

    def __delitem__(self, key: str) -> None:
        raise PermissionError("read only")


class Slice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file, read in pages as they are asked for."""

    def __init__(self, href: str, start: int, length: int) -> None:
        self._href, self._start, self._length, self._at = href, start, length, 0
        self._pages: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._length)
        if end <= self._at:
            return 0
        first, last = self._at // PAGE, (end - 1) // PAGE
        missing = [page for page in range(first, last + 1) if page not in self._pages]
        for _, group in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
            pages = [page for _, page in group]
            begin, stop = pages[0] * PAGE, min((pages[-1] + 1) * PAGE, self._length)
            data = read_source(self._href, self._start + begin, self._start + stop)
            for page in pages:
                self._pages[page] = data[page * PAGE - begin : (page + 1) * PAGE - begin]
        joined = b"".join(self._pages[page] for page in range(first, last + 1))
        data = joined[self._at - first * PAGE : end - first * PAGE]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_group(href: str, name: str, place: str = "", zarr_format: int | None = None) -> tuple[Any, CheckedStore]:
    """(group, its store) of a folder, a zip, a zip inside a tar ("offset:length"), or any fsspec URL; read only.

    Raises ReadFault, SourceFault for what claims too much.
    """
    href = href.rstrip("/")
    try:
        store = CheckedStore(_store(href, place), href)
        return retrying(lambda: zarr.open_group(store, mode="r", zarr_format=zarr_format), href), store  # type: ignore[arg-type]
    except Hostile as error:
        raise SourceFault(name, f"{href}: {error}") from None
    except (FileNotFoundError, KeyError) as error:
        missing = (
            "does not exist" if isinstance(error, FileNotFoundError) else f"is not a Zarr group: {first_line(error)}"
        )
        raise ReadFault(name, f"{href} {missing}") from None
    except Exception as error:  # damaged metadata and zips: JSON, key and type errors of every sort
        raise ReadFault(
            name, f"{href} {place} cannot be opened as Zarr: {first_line(error)}".replace("  ", " ")
        ) from None


def _store(href: str, place: str) -> Any:
    if place:
        start, length = (int(number) for number in place.split(":"))
        return MemoryStore(ZipEntries(io.BufferedReader(Slice(href, start, length), PAGE), length))
    if href.endswith(".zip"):
        if is_local(href):
            path = local_path(href)
            with zipfile.ZipFile(path) as archive:
                check_zip(archive, os.path.getsize(path))
            return ZipStore(path, mode="r")
        fs, path = source_filesystem(href)
        size = int(fs.info(path)["size"])
        return MemoryStore(ZipEntries(io.BufferedReader(Slice(href, 0, size), PAGE), size))
    if is_local(href):
        return LocalStore(local_path(href), read_only=True)
    fs, path = source_filesystem(href)
    # the one (synchronous) client of this process, so that its connections are pooled and closed in one place
    return FsspecStore(AsyncFileSystemWrapper(fs, asynchronous=True), read_only=True, path=path)


def arrays_of(group: Any, store: CheckedStore, href: str, name: str) -> dict[str, Any]:
    """The arrays of a group, checked and watched. Raises ReadFault, SourceFault."""
    try:
        arrays = dict(group.arrays())
        for array in arrays.values():
            store.watch(array)
        return arrays
    except Hostile as error:
        raise SourceFault(name, f"{href}: {error}") from None
    except Exception as error:  # damaged array metadata
        raise ReadFault(name, f"{href} cannot be opened as Zarr: {first_line(error)}") from None


def small(array: Any) -> np.ndarray:
    """A coordinate, whole. Raises Hostile for one that claims more than COORDINATE_BYTES."""
    if math.prod(array.shape) * array.dtype.itemsize > COORDINATE_BYTES:
        raise Hostile(f"coordinate {array.path} claims shape {array.shape}")
    return np.asarray(array[...])
