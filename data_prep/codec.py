"""Arrays to member bytes and back, with partial decode: only the asked dates and tiles are decompressed.

Every array member is [T, C, H, W] (masks and label rasters have C = 1). A chunk is one date of one tile, `[1, C, h, w]`,
and its decoded bytes are one C-order block, so a date of a series lands in the caller's buffer without a further copy.

Containers: `npy` (raw), `b2nd` (Blosc2 NDArray frame, LZ4 + bit shuffle or Zstandard + byte shuffle), `zarr.zip` (Zarr
format 2, consolidated, for tools that know only Zarr). Nothing here pickles, and object dtypes are refused.
"""

from __future__ import annotations

import abc
import functools
import io
import json
import math
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import blosc2
import numpy as np
from numcodecs import blosc as blosc1

Buffer = bytes | bytearray | memoryview

EXTENSIONS = {"npy": "npy", "b2nd-lz4": "b2nd", "b2nd-zstd": "b2nd", "zarr.zip": "zarr.zip"}

_B2ND_PARAMETERS = {
    "b2nd-lz4": {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE]},
    "b2nd-zstd": {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE]},
}
_SMALL_CHUNK_BYTES = 16 << 10
_BLOCK_BYTES = 256 << 10  # a block is what one core decodes in its L2 cache

# one thread per decode: the reader runs many members side by side, and encoding with several threads would order the
# blocks of a chunk by who finishes first, which is not deterministic. The variable too: blosc2 4.14 starts and ends four
# threads for every chunk it compresses, whatever its arguments say, which costs up to twenty times the compression itself.
os.environ["BLOSC_NTHREADS"] = "1"
blosc2.set_nthreads(1)
blosc2.set_releasegil(True)
blosc1.use_threads = False


class MemberError(ValueError):
    """A member's bytes are not what its name says: cut short, corrupt, or of a kind that is refused."""


class Member(Protocol):
    """One stored array. Safe to read from several threads. Windows and dates outside it raise IndexError.

    is_tiled: a date is several chunks, so that a window is cheaper than the whole.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    is_tiled: bool

    def read_date(self, t: int, out: np.ndarray | None = None) -> np.ndarray:
        """[C, H, W] of date `t`, into `out` if given (its dtype and shape must match)."""

    def read_window(self, t: int, y0: int, y1: int, x0: int, x1: int, out: np.ndarray | None = None) -> np.ndarray:
        """[C, y1-y0, x1-x0] of date `t`; decodes only the chunks that the window touches."""

    def read_dates(self, dates: Sequence[int], out: np.ndarray) -> None:
        """Several dates whole, into a C-contiguous [n, C, H, W]."""

    def read_all(self) -> np.ndarray:
        """The whole [T, C, H, W]."""


def extension(codec: str) -> str:
    """File extension of a codec, e.g. `b2nd-lz4` → `b2nd`. Raises KeyError for an unknown codec."""
    return EXTENSIONS[codec]


def encode(array_TCHW: np.ndarray, codec: str, tile_px: int = 256) -> bytes:
    """Member bytes of a [T, C, H, W] array; the same array always gives the same bytes.

    Raises ValueError for another rank, an empty array or an object dtype.
    """
    if array_TCHW.ndim != 4 or 0 in array_TCHW.shape:
        raise ValueError(f"a member is a non-empty [T, C, H, W] array, found shape {array_TCHW.shape}")
    if array_TCHW.dtype.hasobject:
        raise ValueError("object arrays are refused: they would need pickles")
    array_TCHW = np.ascontiguousarray(array_TCHW)
    if codec == "npy":
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array_TCHW, version=(1, 0), allow_pickle=False)
        return stream.getvalue()
    chunk = chunk_shape(array_TCHW.shape, tile_px)
    if codec == "zarr.zip":
        return _encode_zarr(array_TCHW, chunk)
    itemsize = array_TCHW.dtype.itemsize
    bands = max(1, min(chunk[1], _BLOCK_BYTES // (chunk[2] * chunk[3] * itemsize)))
    parameters = {**_B2ND_PARAMETERS[codec], "typesize": itemsize, "nthreads": 1}
    frame = blosc2.asarray(
        array_TCHW, chunks=chunk, blocks=(1, _divisor(chunk[1], bands), *chunk[2:]), cparams=parameters, contiguous=True
    )
    return frame.to_cframe()


def chunk_shape(shape: tuple[int, ...], tile_px: int) -> tuple[int, int, int, int]:
    """[1, C, h, w]: tiles of at most `tile_px`, of even size (304 px in two tiles of 152, not 256 + 48)."""
    _, bands, height, width = shape
    return 1, bands, math.ceil(height / math.ceil(height / tile_px)), math.ceil(width / math.ceil(width / tile_px))


def open_member(data: Buffer, extension: str) -> Member:
    """Opens member bytes for partial decode; nothing is decompressed yet.

    Args:
        data: the member's bytes; kept, not copied, so a memory-mapped file must stay open.
        extension: `npy`, `b2nd` or `zarr.zip`.

    Raises:
        MemberError: unknown extension, cut or corrupt bytes, an object dtype.
    """
    openers: dict[str, Callable[[Buffer], Member]] = {"npy": NpyMember, "b2nd": B2ndMember, "zarr.zip": ZarrMember}
    opener = openers.get(extension)
    if opener is None:
        raise MemberError(f"no reader for members named *.{extension}; known: npy, b2nd, zarr.zip")
    try:
        return opener(data)
    except MemberError:
        raise
    except (
        Exception
    ) as error:  # numpy, blosc2, zarr and zipfile raise whatever their parsers do (SyntaxError, TokenError, …)
        raise MemberError(f"not a readable {extension} member: {error}") from None


_HEADERS = (
    threading.Lock()
)  # numpy parses headers with `ast`, which CPython 3.11 cannot do in two threads at once (gh-106905)


@functools.lru_cache(maxsize=1024)
def _npy_header(head: bytes) -> tuple[tuple[int, int, int, int], np.dtype, int]:
    """(shape, dtype, start of the data). Cached: members of a set share few headers, and parsing one takes 20 µs."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise MemberError(f"npy version {version} is not read")
    with _HEADERS:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran:
        raise MemberError("npy in Fortran order is not read")
    return _checked(shape, dtype), dtype, stream.tell()


class NpyMember:
    """Raw `.npy`: a view of the given bytes, no copy until asked to fill `out`. `array_TCHW` is that view."""

    is_tiled = False

    def __init__(self, data: Buffer) -> None:
        view = memoryview(data)
        header_length = 10 + int.from_bytes(view[8:10], "little")
        self.shape, self.dtype, start = _npy_header(bytes(view[: min(header_length, 4096)]))
        count = math.prod(self.shape)
        if len(memoryview(data)) < start + count * self.dtype.itemsize:
            raise MemberError(f"npy cut short: {len(memoryview(data))} bytes for shape {self.shape}")
        self.array_TCHW = np.frombuffer(data, self.dtype, count, start).reshape(self.shape)

    def read_date(self, t: int, out: np.ndarray | None = None) -> np.ndarray:
        return _fill(self.array_TCHW[t], out)

    def read_window(self, t: int, y0: int, y1: int, x0: int, x1: int, out: np.ndarray | None = None) -> np.ndarray:
        _check_window(self.shape, t, y0, y1, x0, x1)
        return _fill(self.array_TCHW[t, :, y0:y1, x0:x1], out)

    def read_dates(self, dates: Sequence[int], out: np.ndarray) -> None:
        for n, t in enumerate(dates):
            self.read_date(t, out[n])

    def read_all(self) -> np.ndarray:
        return self.array_TCHW.copy()


class _ChunkedMember(abc.ABC):
    """Partial decode over `[1, C, h, w]` chunks; subclasses say how chunk number n is decoded into a buffer."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    is_tiled: bool
    _chunk: tuple[int, int, int, int]

    @abc.abstractmethod
    def _decode(self, number: int, out: np.ndarray) -> None:
        """Chunk `number` into `out`, [C, h, w] in C order. Raises MemberError."""

    def _set_grid(self) -> None:
        if self._chunk[0] != 1 or self._chunk[1] != self.shape[1]:
            raise MemberError(f"chunks must hold one date and all bands, found {self._chunk} for {self.shape}")
        self._rows = math.ceil(self.shape[2] / self._chunk[2])
        self._columns = math.ceil(self.shape[3] / self._chunk[3])
        self.is_tiled = self._rows * self._columns > 1

    def read_date(self, t: int, out: np.ndarray | None = None) -> np.ndarray:
        return self.read_window(t, 0, self.shape[2], 0, self.shape[3], out)

    def read_dates(self, dates: Sequence[int], out: np.ndarray) -> None:
        """See `Member`; the quick way for small images, one chunk each."""
        if self.is_tiled or not out.flags.c_contiguous or out.shape != (len(dates), *self.shape[1:]):
            for n, t in enumerate(dates):
                self.read_date(t, out[n])
            return
        for n, t in enumerate(dates):
            if not 0 <= t < self.shape[0]:
                raise IndexError(f"date {t} lies outside shape {self.shape}")
            self._decode(t, out[n])

    def read_window(self, t: int, y0: int, y1: int, x0: int, x1: int, out: np.ndarray | None = None) -> np.ndarray:
        _check_window(self.shape, t, y0, y1, x0, x1)
        bands, (height, width) = self.shape[1], self._chunk[2:]
        wanted = (bands, y1 - y0, x1 - x0)
        if out is None:
            out = np.empty(wanted, self.dtype)
        elif out.shape != wanted or out.dtype != self.dtype:
            raise ValueError(f"out is {out.dtype} {out.shape}, the window is {self.dtype} {wanted}")
        scratch: np.ndarray | None = None
        for number, top, left in self._touched(t, y0, y1, x0, x1):
            if (top, left, *wanted[1:]) == (y0, x0, height, width) and out.flags.c_contiguous:
                self._decode(number, out)
                break
            if scratch is None:
                scratch = np.empty((bands, height, width), self.dtype)
            self._decode(number, scratch)
            ya, yb, xa, xb = max(top, y0), min(top + height, y1), max(left, x0), min(left + width, x1)
            out[:, ya - y0 : yb - y0, xa - x0 : xb - x0] = scratch[:, ya - top : yb - top, xa - left : xb - left]
        return out

    def read_all(self) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        for t in range(self.shape[0]):
            self.read_date(t, array[t])
        return array

    def _touched(self, t: int, y0: int, y1: int, x0: int, x1: int) -> Iterator[tuple[int, int, int]]:
        """(chunk number, top, left) of the chunks under a window."""
        height, width = self._chunk[2:]
        for row in range(y0 // height, -(-y1 // height)):
            for column in range(x0 // width, -(-x1 // width)):
                yield (t * self._rows + row) * self._columns + column, row * height, column * width


class B2ndMember(_ChunkedMember):
    """Blosc2 NDArray frame.

    `decompress2` on the chunk's own bytes is used because it lets go of the GIL; for small chunks, where handing the GIL
    over costs more than decoding, the frame's own call is, which is twice as quick and keeps it.
    """

    def __init__(self, data: Buffer) -> None:
        self._schunk = blosc2.schunk_from_cframe(data, copy=False)
        _, _, shape, chunk, _, _, dtype = self._schunk.meta["b2nd"]
        self.dtype = np.dtype(dtype)
        self.shape, self._chunk = _checked(shape, self.dtype), tuple(chunk)
        self._set_grid()
        if self._schunk.nchunks != self.shape[0] * self._rows * self._columns:
            raise MemberError(f"{self._schunk.nchunks} chunks do not make shape {self.shape}")

    def _decode(self, number: int, out: np.ndarray) -> None:
        try:
            chunk = self._schunk.get_chunk(number)
            # the library trusts this header field when it writes: check it against our buffer first
            if int.from_bytes(chunk[4:8], "little") != out.nbytes:
                raise MemberError(f"chunk {number} does not decode to {out.nbytes} bytes")
            if out.nbytes <= _SMALL_CHUNK_BYTES:
                self._schunk.decompress_chunk(number, out)
            else:
                blosc2.decompress2(chunk, out, nthreads=1)
        except (RuntimeError, ValueError) as error:
            raise MemberError(f"chunk {number} does not decode: {error}") from None


class ZarrMember(_ChunkedMember):
    """Zarr format 2 in an uncompressed zip, one array `data`, Blosc chunks."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        with zipfile.ZipFile(io.BytesIO(self._data)) as archive:
            meta = json.loads(archive.read("data/.zarray"))
            self._places = {info.filename: (info.header_offset, info.file_size) for info in archive.infolist()}
        compressor, self._fill_value = meta["compressor"] or {}, meta["fill_value"] or 0
        if meta["order"] != "C" or meta["filters"] or compressor.get("id") != "blosc":
            raise MemberError("only C-order Blosc chunks without filters are read")
        self.dtype = np.dtype(meta["dtype"])
        self.shape, self._chunk = _checked(meta["shape"], self.dtype), tuple(meta["chunks"])
        self._set_grid()

    def _decode(self, number: int, out: np.ndarray) -> None:
        t, rest = divmod(number, self._rows * self._columns)
        row, column = divmod(rest, self._columns)
        place = self._places.get(f"data/{t}.0.{row}.{column}")
        if place is None:  # an absent chunk is all fill value
            out[...] = self._fill_value
            return
        header, size = place
        name_length, extra_length = struct.unpack("<HH", self._data[header + 26 : header + 30])
        start = header + 30 + name_length + extra_length
        chunk = bytes(self._data[start : start + size])
        if len(chunk) < 16 or int.from_bytes(chunk[4:8], "little") != out.nbytes:
            raise MemberError(f"chunk {number} does not decode to {out.nbytes} bytes")
        try:
            blosc1.decompress(chunk, out)
        except (RuntimeError, ValueError) as error:
            raise MemberError(f"chunk {number} does not decode: {error}") from None


def _encode_zarr(array_TCHW: np.ndarray, chunk: tuple[int, int, int, int]) -> bytes:
    compressor = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0}
    meta = {
        "zarr_format": 2, "shape": list(array_TCHW.shape), "chunks": list(chunk), "dtype": array_TCHW.dtype.str,
        "compressor": compressor, "fill_value": 0, "order": "C", "filters": None, "dimension_separator": ".",
    }  # fmt: skip
    members: dict[str, Any] = {
        ".zgroup": {"zarr_format": 2},
        "data/.zarray": meta,
        "data/.zattrs": {"_ARRAY_DIMENSIONS": ["time", "band", "y", "x"]},
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, value in {**members, ".zmetadata": {"zarr_consolidated_format": 1, "metadata": members}}.items():
            archive.writestr(zipfile.ZipInfo(name), json.dumps(value, sort_keys=True))  # ZipInfo: a fixed date of 1980
        grid = np.ndindex(*(math.ceil(s / c) for s, c in zip(array_TCHW.shape, chunk)))
        for place in grid:
            window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk))
            full = np.zeros(chunk, array_TCHW.dtype)
            part = array_TCHW[window]
            full[tuple(slice(0, s) for s in part.shape)] = part
            compressed = blosc1.compress(full, b"zstd", 1, 1, 0)
            archive.writestr(zipfile.ZipInfo("data/" + ".".join(map(str, place))), compressed)
    return stream.getvalue()


def _checked(shape: Any, dtype: np.dtype) -> tuple[int, int, int, int]:
    if dtype.hasobject or dtype.kind not in "uifb":
        raise MemberError(f"dtype {dtype} is refused; members hold plain numbers")
    if len(shape) != 4:
        raise MemberError(f"a member is [T, C, H, W], found shape {tuple(shape)}")
    return tuple(int(n) for n in shape)  # type: ignore[return-value]


def _check_window(shape: tuple[int, ...], t: int, y0: int, y1: int, x0: int, x1: int) -> None:
    if not (0 <= t < shape[0] and 0 <= y0 < y1 <= shape[2] and 0 <= x0 < x1 <= shape[3]):
        raise IndexError(f"date {t}, rows {y0}:{y1}, columns {x0}:{x1} lie outside shape {tuple(shape)}")


def _fill(view: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return view.copy()
    if out.shape != view.shape or out.dtype != view.dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}, the window is {view.dtype} {view.shape}")
    out[...] = view
    return out


def _divisor(number: int, at_most: int) -> int:
    """Largest divisor of `number` that is not above `at_most`: blocks must tile a chunk's bands evenly to stay C-order."""
    return next(d for d in range(at_most, 0, -1) if number % d == 0)
