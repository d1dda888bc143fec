"""From the index of one or several shard sets to flat columns, in one pass over batches of rows.

Columns, for N samples that passed the filters, each of the smallest type that holds every value exactly
(legend: M members of one kind · D dates of one modality over all samples):

    key.bytes uint8, key.first int64 [N + 1]     key n is the bytes first[n] to first[n + 1]
    shard int32 [N]                              number of its shard over all sets
    start, stop place [N]                        bytes of the shard from the first to the last needed member; equal: none
    STEM.offset, STEM.length place [N]           per kind of member (`s2`, `s2.mask`, `label.NAME`); place = uint32 where no
                                                 shard has 4 GiB or more, else int64
    STEM.crc uint32 [N], STEM.kind int8 [N]      kind: -1 absent, else index into EXTENSIONS, + UNCHECKED without a checksum
    M.first int64 [N + 1]                        dates of modality M of sample n are the entries first[n] to first[n + 1]
    M.whole bool [N]                             every pixel of every date is clear
    M.clear float32 [D], M.doy int16 [D]         share of clear pixels, as the index has it; day of year, 0 = unknown
    width_m, height_m float64 [N], lonlat float64 [2 N], scene int32 [N] (-1 = none)

That is about 175 bytes + the key + 6 per date for each sample with three modalities and a label raster; see
`pipeline.reader.shared` for what a node with several ranks makes of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet
from pipeline.reader.filters import Filters, sides

SCENE = "label_scene"
EXTENSIONS = ("npy", "b2nd", "zarr.zip")
UNCHECKED = 4
UNKNOWN_CLEAR = 0.999  # of a date whose share the index does not know: it may have a cloud, but is as good as clear

Columns = dict[str, np.ndarray]


class Sink(Protocol):
    """Where columns grow."""

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds 1-d values at the end of a column; always of the same type for the same name."""


class Memory:
    """Columns in this process's memory. They grow in place: joined from pieces they would need their size twice."""

    def __init__(self) -> None:
        self._types: dict[str, np.dtype[Any]] = {}
        self._data: dict[str, bytearray] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        self._types[name] = values.dtype
        self._data.setdefault(name, bytearray()).extend(values.tobytes())

    def columns(self) -> Columns:
        """To be read only; nothing may be appended any more."""
        columns = {name: np.frombuffer(data, self._types[name]) for name, data in self._data.items()}
        for column in columns.values():
            column.flags.writeable = False
        return columns


@dataclasses.dataclass(frozen=True)
class Part:
    """One shard set of a table. shards: names of those with a sample in it, in order; sizes: their samples.

    fingerprint: 16 hex digits of the set's content and of the rows taken.
    """

    shards: list[str]
    sizes: list[int]
    fingerprint: str


def scan(sets: Sequence[ShardSet], filters: Filters, label: str | None, sink: Sink) -> tuple[list[Part], str | None]:
    """Writes the columns of all sets to `sink`; returns what else is known of each set, and the label raster.

    label: the raster that is read; None = the first one that a sample has.

    Raises UsageError: no index, one that contradicts itself, or no sample left (naming the filter that removed the last).
    """
    task = _Scan(sets, filters, label, sink)
    parts = [task.add(shardset) for shardset in sets]
    pa.default_memory_pool().release_unused()
    return parts, task.label


def place_type(sets: Sequence[ShardSet]) -> np.dtype[Any]:
    """Type of offsets and lengths in shards."""
    largest = max((shard["bytes"] for shardset in sets for shard in shardset.manifest["shards"]), default=0)
    return np.dtype(np.uint32 if largest < 1 << 32 else np.int64)


class _Scan:
    """What is carried from one batch to the next."""

    def __init__(self, sets: Sequence[ShardSet], filters: Filters, label: str | None, sink: Sink) -> None:
        self.label, self._filters, self._sink = label, filters, sink
        self._place, self._shards, self._ends = place_type(sets), 0, {}
        for name in ("key", *filters.modalities):
            self._ends[name] = 0
            sink.append(f"{name}.first", np.zeros(1, np.int64))

    def add(self, shardset: ShardSet) -> Part:
        numbers: dict[str, int] = {}
        sizes: list[int] = []
        left: dict[str, int] = {}
        before = last = -1
        digest = hashlib.sha256(str(shardset.manifest.get("content_sha256") or shardset.manifest_sha256).encode())
        try:
            for index in self._taken(shardset, left):
                row_N = index["row"].to_numpy()
                if row_N[0] <= last or (np.diff(row_N) <= 0).any():
                    raise ValueError("its rows are not in order")
                last = int(row_N[-1])
                digest.update(np.ascontiguousarray(row_N, np.int64).tobytes())
                shard_N = _numbered(index["shard"], numbers)
                sizes += [0] * (len(numbers) - len(sizes))
                for number, count in zip(*np.unique(shard_N, return_counts=True)):
                    sizes[number] += int(count)
                self._put("shard", shard_N + self._shards, np.int32)
                self._add_batch(index)
        except ValueError as error:
            raise UsageError(
                f"{shardset.url}: the index is damaged ({error}); rebuild it with python -m data_prep verify "
                f"{shardset.url} --repair"
            ) from None
        if not sizes:
            before = shardset.num_samples
            for name, count in left.items():
                if count == 0:
                    raise UsageError(f"{shardset.url}: no sample left after {name} ({before} before it)")
                before = count
            raise UsageError(f"{shardset.url}: the index is empty")
        self._shards += len(numbers)
        return Part(list(numbers), sizes, digest.hexdigest()[:16])

    def _taken(self, shardset: ShardSet, left: dict[str, int]) -> Iterator[pa.RecordBatch]:
        """Batches of the rows that pass all filters; `left`: how many pass each filter and those before it."""
        for index in shardset.index_batches(_columns(self._filters.modalities)):
            keep = np.ones(index.num_rows, bool)
            for name, mask in self._filters.masks(index):
                keep &= mask
                left[name] = left.get(name, 0) + int(keep.sum())
            if keep.any():
                yield index if keep.all() else index.filter(pa.array(keep))

    def _put(self, name: str, values: np.ndarray, dtype: Any) -> None:
        """Appends values as `dtype`. Raises ValueError if it does not hold them."""
        bounds = np.iinfo(dtype)
        if len(values) and (values.min() < bounds.min or values.max() > bounds.max):
            raise ValueError(f"{name} {values.max()} is beyond its bound")
        self._sink.append(name, values.astype(dtype))

    def _put_first(self, name: str, lengths: np.ndarray) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        self._ends[name] = int(ends[-1])
        self._sink.append(f"{name}.first", ends)

    def _add_batch(self, index: pa.RecordBatch) -> None:
        keys = index["key"]
        self._put_first("key", pc.binary_length(keys).to_numpy())
        self._sink.append("key.bytes", _text_bytes(keys))
        self._add_members(index)
        for modality in self._filters.modalities:
            self._add_dates(index, modality)
        width_N, height_N = _extent(index, self._filters.modalities)
        self._sink.append("width_m", width_N)
        self._sink.append("height_m", height_N)
        self._sink.append("lonlat", _centres(index).reshape(-1))
        scene = pc.fill_null(index[SCENE], -1).to_numpy() if SCENE in index.schema.names else np.full(len(keys), -1)
        self._put("scene", scene, np.int32)

    def _add_members(self, index: pa.RecordBatch) -> None:
        if self.label is None:
            names = index["rasters"].flatten()
            self.label = names[0].as_py() if len(names) else None
        # until a sample has a raster, the column of the label's members says "absent"
        stems = [stem for m in self._filters.modalities for stem in (m, f"{m}.mask")] + ["label"]
        n, lists = index.num_rows, index["members"]
        flat = lists.flatten()
        row_M = np.repeat(np.arange(n), pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False))
        stem_M, kind_M = _kinds(flat.field("name"), [*stems[:-1], f"label.{self.label}"])
        offset_M, length_M = (flat.field(name).to_numpy() for name in ("offset", "length"))
        has_crc = "crc32c" in [field.name for field in flat.type]
        crc_M = (
            pc.fill_null(flat.field("crc32c").cast(pa.int64()), -1).to_numpy() if has_crc else np.full(len(flat), -1)
        )
        start_N, stop_N = np.full(n, np.iinfo(np.int64).max), np.zeros(n, np.int64)
        for number, stem in enumerate(stems):
            found = np.flatnonzero(stem_M == number)
            rows, first, length, crc = row_M[found], offset_M[found], length_M[found], crc_M[found]
            kind = kind_M[found] + np.where(crc < 0, UNCHECKED, 0)
            for what, values, dtype, absent in (
                ("offset", first, self._place, 0), ("length", length, self._place, 0),
                ("crc", np.maximum(crc, 0), np.uint32, 0), ("kind", kind, np.int8, -1),
            ):  # fmt: skip
                column = np.full(n, absent, np.int64)
                column[rows] = values
                self._put(f"{stem}.{what}", column, dtype)
            start_N[rows] = np.minimum(start_N[rows], first)
            stop_N[rows] = np.maximum(stop_N[rows], first + length)
        self._put("start", np.minimum(start_N, stop_N), self._place)
        self._put("stop", stop_N, self._place)

    def _add_dates(self, index: pa.RecordBatch, modality: str) -> None:
        clear, texts = index[f"{modality}_clear"], index[f"{modality}_datetimes"]
        length_N = pc.fill_null(clear.value_lengths(), 0).to_numpy(zero_copy_only=False)
        if (length_N != pc.fill_null(texts.value_lengths(), 0).to_numpy(zero_copy_only=False)).any():
            raise ValueError(f"{modality}_clear and {modality}_datetimes differ in length")
        clear_D = np.nan_to_num(clear.flatten().to_numpy(zero_copy_only=False).astype(np.float32), nan=UNKNOWN_CLEAR)
        cloudy_D = np.concatenate([[0], np.cumsum(clear_D < 1)])
        first_N = np.concatenate([[0], np.cumsum(length_N)])
        self._put_first(modality, length_N)
        self._sink.append(f"{modality}.whole", np.diff(cloudy_D[first_N]) == 0)
        self._sink.append(f"{modality}.clear", clear_D)
        self._sink.append(f"{modality}.doy", _days_of_year(texts.flatten()))


def _columns(modalities: Sequence[str]) -> list[str]:
    wanted = [
        "key",
        "shard",
        "row",
        "split",
        "modalities",
        "cloud",
        "flagged_dates",
        "bbox",
        "rasters",
        "datetime_start",
        "datetime_end",
    ]
    wanted += [SCENE, *(f"members.{what}" for what in ("name", "offset", "length", "crc32c"))]
    wanted += [f"{m}_{what}" for m in _sensors(modalities) for what in ("shape", "gsd_m")]
    return wanted + [f"{m}_{what}" for m in modalities for what in ("clear", "datetimes")]


def _sensors(modalities: Sequence[str]) -> list[str]:
    """All modalities, coarse series before hr."""
    return sorted(dict.fromkeys([*modalities, *MODALITIES]), key=lambda m: -MODALITIES[m].gsd_m)


def _numbered(names: pa.StringArray, numbers: dict[str, int]) -> np.ndarray:
    """The number of each name; new names get the next ones."""
    coded = names.dictionary_encode()
    known = [numbers.setdefault(name, len(numbers)) for name in coded.dictionary.to_pylist()]
    return np.array(known)[coded.indices.to_numpy()]


def _text_bytes(texts: pa.StringArray) -> np.ndarray:
    """All texts, one after another, as UTF-8: uint8."""
    _, offsets, data = texts.buffers()
    first, last = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(data, np.uint8)[first:last] if last > first else np.empty(0, np.uint8)


def _kinds(names: pa.StringArray, stems: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Per member the index of its stem, -1 = not wanted, and of its extension."""
    known = {f"{stem}.{e}": (i, kind) for i, stem in enumerate(stems) for kind, e in enumerate(EXTENSIONS)}
    coded = names.dictionary_encode()
    codes = np.array([known.get(name, (-1, -1)) for name in coded.dictionary.to_pylist()], np.int64).reshape(-1, 2)
    stem_M, kind_M = codes[coded.indices.to_numpy()].T
    return stem_M, kind_M


def _days_of_year(texts: pa.StringArray) -> np.ndarray:
    """int16 of ISO 8601 texts; 0 for a text without a date. A set has few different days, so each is parsed once."""
    coded = pc.utf8_slice_codeunits(pc.fill_null(texts, ""), 0, 10).dictionary_encode()
    days = np.array([day if len(day) == 10 else "NaT" for day in coded.dictionary.to_pylist()], "datetime64[D]")
    doy = np.where(np.isnat(days), 0, (days - days.astype("datetime64[Y]")).astype(np.int64) + 1)
    return doy.astype(np.int16)[coded.indices.to_numpy()]


def _centres(index: pa.RecordBatch) -> np.ndarray:
    west, south, east, north = sides(index)
    lon = (west + np.where(east < west, east + 360, east)) / 2
    return np.stack([np.where(lon > 180, lon - 360, lon), (south + north) / 2], axis=1)


def _extent(index: pa.RecordBatch, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ground extent in metres, float64 [N] each: shape × gsd of the first modality a sample has."""
    width, height = np.zeros(index.num_rows), np.zeros(index.num_rows)
    for modality in _sensors(modalities):
        if f"{modality}_shape" not in index.schema.names:
            continue
        gsd = np.asarray(pc.fill_null(index[f"{modality}_gsd_m"], 0.0), np.float64)
        shapes = index[f"{modality}_shape"]
        length_N = pc.fill_null(shapes.value_lengths(), 0).to_numpy(zero_copy_only=False)
        first_N, sizes = np.cumsum(length_N) - length_N, shapes.flatten().to_numpy(zero_copy_only=False)
        there = np.flatnonzero(length_N == 4)
        rows_px, columns_px = np.zeros(len(gsd)), np.zeros(len(gsd))
        rows_px[there], columns_px[there] = sizes[first_N[there] + 2], sizes[first_N[there] + 3]
        width = np.where(width > 0, width, columns_px * gsd)
        height = np.where(height > 0, height, rows_px * gsd)
    return width, height
