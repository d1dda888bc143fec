"""The index in the form a reader maps: flat columns of exact small types, made in one pass over batches of rows.

Columns of a set of N samples, all rows, whatever a run takes of them
(legend: M members of one kind · D dates of one modality over all samples · a STEM is `s2`, `s2.mask`, `label.NAME`):

    key.bytes uint8, key.first int64 [N + 1]     key n is the bytes first[n] to first[n + 1]
    shard int32 [N]                              number of its shard in the manifest
    STEM.offset, STEM.length place [N]           of its data in the tar, inside the shard's bytes; place = uint32 where no shard
                                                 has 4 GiB or more, else int64
    STEM.crc uint32 [N], STEM.kind int8 [N]      kind: -1 absent, else index into EXTENSIONS, + UNCHECKED without a checksum
    M.first int64 [N + 1]                        dates of modality M of sample n are the entries first[n] to first[n + 1]
    M.whole bool [N]                             every pixel of every date is clear
    M.clear float32 [D], M.doy int16 [D]         share of clear pixels, as the index has it; day of year, 0 = unknown
    width_m, height_m float64 [N], scene int32 [N] (-1 = none), west, south, east, north float64 [N] (degrees)
    flagged bool [N]                             the pixels contradicted the metadata of a date; sets from before the index said so have
                                                 no such column
    split int8 [N] (into SPLITS), modalities uint8 [N] (bit i: has the i-th of MODALITIES), cloud float32 [N] (NaN = unknown)
    day_first, day_last int32 [N]                days since 1970; UNKNOWN_DAY where a sample has no date

A stem or modality that no sample has has no columns. About 215 bytes + the key + 6 per date for each sample with three
modalities and a label raster. The file they lie in: `data_prep.column_file`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.config import SPLITS
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet

FORMAT = 1  # count up when a column changes its meaning
SCENE = "label_scene"
EXTENSIONS = ("npy", "b2nd", "zarr.zip")
UNCHECKED = 4
UNKNOWN_CLEAR = 0.999  # of a date whose share the index does not know: it may have a cloud, but is as good as clear
UNKNOWN_DAY = np.iinfo(np.int32).min

Columns = dict[str, np.ndarray]
_SENSORS = sorted(MODALITIES, key=lambda m: -MODALITIES[m].gsd_m)  # coarse series before hr
_SIDES = {"west": "xmin", "south": "ymin", "east": "xmax", "north": "ymax"}


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


def scan(shardset: ShardSet, sink: Sink) -> None:
    """Writes the columns of a set to `sink`, from its index.parquet.

    Raises ValueError for an index that contradicts itself or the manifest, UsageError for one that cannot be read.
    """
    task = _Scan(shardset, sink)
    for batch in shardset.index_batches(_wanted()):
        task.add(batch)
    task.finish()
    pa.default_memory_pool().release_unused()


def place_type(shards: Sequence[dict[str, Any]]) -> np.dtype[Any]:
    """Type of offsets and lengths in these shards (entries of a manifest)."""
    largest = max((shard["bytes"] for shard in shards), default=0)
    return np.dtype(np.uint32 if largest < 1 << 32 else np.int64)


class _Scan:
    """What is carried from one batch to the next."""

    def __init__(self, shardset: ShardSet, sink: Sink) -> None:
        shards = shardset.manifest["shards"]
        self._sink, self._place, self._rows = sink, place_type(shards), 0
        self._expected = shardset.num_samples
        self._numbers = {shard["name"]: number for number, shard in enumerate(shards)}
        self._bytes_S = np.array([shard["bytes"] for shard in shards], np.int64)
        self._ends = {"key": 0}
        self._stems: list[str] = []
        sink.append("key.first", np.zeros(1, np.int64))

    def add(self, index: pa.RecordBatch) -> None:
        count = index.num_rows
        if (index["row"].to_numpy() != np.arange(self._rows, self._rows + count)).any():
            raise ValueError("its rows are not in order")
        keys = index["key"]
        shard_N = _coded(index["shard"], self._numbers, "its shard {} is not in the manifest")
        self._put("shard", shard_N, np.int32)
        self._put_first("key", pc.binary_length(keys).to_numpy())
        self._sink.append("key.bytes", _text_bytes(keys))
        self._add_members(index, shard_N)
        for modality in MODALITIES:
            self._add_dates(index, modality)
        width_N, height_N = _extent(index)
        self._sink.append("width_m", width_N)
        self._sink.append("height_m", height_N)
        for name, side in _SIDES.items():
            self._sink.append(name, np.asarray(pc.struct_field(index["bbox"], side), np.float64))
        scene = pc.fill_null(index[SCENE], -1).to_numpy() if SCENE in index.schema.names else np.full(count, -1)
        self._put("scene", scene, np.int32)
        codes = {name: number for number, name in enumerate(SPLITS)}
        self._put("split", _coded(index["split"], codes, "its split {} is unknown"), np.int8)
        self._sink.append("modalities", _held(index["modalities"]))
        cloud = index["cloud"].cast(pa.float32()).to_numpy(zero_copy_only=False)
        self._sink.append("cloud", cloud.astype(np.float32))
        if "flagged_dates" in index.schema.names:
            self._sink.append("flagged", pc.fill_null(index["flagged_dates"], 0).to_numpy() > 0)
        for end, column in (("first", "datetime_start"), ("last", "datetime_end")):
            self._sink.append(f"day_{end}", days(index[column]))
        self._rows += count

    def finish(self) -> None:
        if self._rows != self._expected:
            raise ValueError(f"it has {self._rows} rows, the manifest says {self._expected}")

    def _put(self, name: str, values: np.ndarray, dtype: Any) -> None:
        """Appends values as `dtype`. Raises ValueError if it does not hold them."""
        bounds = np.iinfo(dtype)
        if len(values) and (values.min() < bounds.min or values.max() > bounds.max):
            raise ValueError(f"{name} {values.max()} is beyond its bound")
        self._sink.append(name, values.astype(dtype))

    def _put_first(self, name: str, lengths: np.ndarray) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        self._ends[name] = int(ends[-1]) if len(ends) else self._ends[name]
        self._sink.append(f"{name}.first", ends)

    def _add_members(self, index: pa.RecordBatch, shard_N: np.ndarray) -> None:
        n, lists = index.num_rows, index["members"]
        flat = lists.flatten()
        row_M = np.repeat(np.arange(n), pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False))
        stem_M, kind_M, stems = _kinds(flat.field("name"))
        offset_M, length_M = (flat.field(name).to_numpy() for name in ("offset", "length"))
        self._check_bounds(index, row_M, offset_M, length_M, shard_N)
        has_crc = "crc32c" in [field.name for field in flat.type]
        crc_M = (
            pc.fill_null(flat.field("crc32c").cast(pa.int64()), -1).to_numpy() if has_crc else np.full(len(flat), -1)
        )
        numbers = {stem: number for number, stem in enumerate(stems)}
        for stem in stems:
            if stem not in self._stems:  # no row before this batch had one
                self._stems.append(stem)
                self._put_member(stem, np.zeros((3, self._rows), np.int64), np.full(self._rows, -1))
        for stem in self._stems:
            found = np.flatnonzero(stem_M == numbers[stem]) if stem in numbers else np.empty(0, np.int64)
            rows, crc = row_M[found], crc_M[found]
            values, kind = np.zeros((3, n), np.int64), np.full(n, -1)
            values[:, rows] = offset_M[found], length_M[found], np.maximum(crc, 0)
            kind[rows] = kind_M[found] + np.where(crc < 0, UNCHECKED, 0)
            self._put_member(stem, values, kind)

    def _put_member(self, stem: str, values: np.ndarray, kind: np.ndarray) -> None:
        """values: offset, length, crc: [3, rows]."""
        for name, column, dtype in zip(("offset", "length", "crc"), values, (self._place, self._place, np.uint32)):
            self._put(f"{stem}.{name}", column, dtype)
        self._put(f"{stem}.kind", kind, np.int8)

    def _check_bounds(
        self, index: pa.RecordBatch, row_M: np.ndarray, offset_M: np.ndarray, length_M: np.ndarray, shard_N: np.ndarray
    ) -> None:
        """Memory is taken for what an index says: it may not say more than its shard holds. Raises ValueError."""
        limit_M = self._bytes_S[shard_N[row_M]]
        beyond = (offset_M < 0) | (length_M < 0) | (offset_M > limit_M) | (length_M > limit_M - offset_M)
        if beyond.any():
            at = int(row_M[np.flatnonzero(beyond)[0]])
            raise ValueError(f"{index['key'][at]} lies beyond its bound, the bytes of {index['shard'][at]}")

    def _add_dates(self, index: pa.RecordBatch, modality: str) -> None:
        if f"{modality}_clear" not in index.schema.names:  # a set from before the modality
            return
        clear, texts = index[f"{modality}_clear"], index[f"{modality}_datetimes"]
        length_N = pc.fill_null(clear.value_lengths(), 0).to_numpy(zero_copy_only=False)
        if (length_N != pc.fill_null(texts.value_lengths(), 0).to_numpy(zero_copy_only=False)).any():
            raise ValueError(f"{modality}_clear and {modality}_datetimes differ in length")
        if modality not in self._ends:
            if not length_N.any():
                return
            self._ends[modality] = 0
            self._sink.append(f"{modality}.first", np.zeros(self._rows + 1, np.int64))
            self._sink.append(f"{modality}.whole", np.ones(self._rows, bool))
        clear_D = np.nan_to_num(clear.flatten().to_numpy(zero_copy_only=False).astype(np.float32), nan=UNKNOWN_CLEAR)
        cloudy_D = np.concatenate([[0], np.cumsum(clear_D < 1)])
        first_N = np.concatenate([[0], np.cumsum(length_N)])
        self._put_first(modality, length_N)
        self._sink.append(f"{modality}.whole", np.diff(cloudy_D[first_N]) == 0)
        self._sink.append(f"{modality}.clear", clear_D)
        self._sink.append(f"{modality}.doy", _days_of_year(texts.flatten()))


def _wanted() -> list[str]:
    """The columns of index.parquet that are read."""
    wanted = ["key", "shard", "row", "split", "modalities", "cloud", "bbox", "datetime_start", "datetime_end", SCENE]
    wanted.append("flagged_dates")
    wanted += [f"members.{what}" for what in ("name", "offset", "length", "crc32c")]
    return wanted + [f"{m}_{what}" for m in MODALITIES for what in ("shape", "gsd_m", "clear", "datetimes")]


def _coded(names: pa.StringArray, numbers: dict[str, int], unknown: str) -> np.ndarray:
    """The number of each name. Raises ValueError for a name without one."""
    coded = names.dictionary_encode()
    found = coded.dictionary.to_pylist()
    for name in found:
        if name not in numbers:
            raise ValueError(unknown.format(name))
    return np.array([numbers[name] for name in found], np.int64)[coded.indices.to_numpy()]


def _held(lists: pa.ListArray) -> np.ndarray:
    """Which modalities each row lists, as bits: uint8 [rows]."""
    row_M = np.repeat(np.arange(len(lists)), pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False))
    flat, bits_N = lists.flatten(), np.zeros(len(lists), np.uint8)
    for number, name in enumerate(MODALITIES):
        rows = row_M[pc.fill_null(pc.equal(flat, name), False).to_numpy(zero_copy_only=False)]
        bits_N[rows] |= np.uint8(1 << number)
    return bits_N


def _text_bytes(texts: pa.StringArray) -> np.ndarray:
    """All texts, one after another, as UTF-8: uint8."""
    _, offsets, data = texts.buffers()
    first, last = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(data, np.uint8)[first:last] if last > first else np.empty(0, np.uint8)


def _kinds(names: pa.StringArray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Per member the number of its stem (-1: none a reader reads) and of its extension; the stems, in order of names."""
    coded = names.dictionary_encode()
    stems: dict[str, int] = {}
    codes = [_kind(name, stems) for name in coded.dictionary.to_pylist()]
    stem_M, kind_M = np.array(codes, np.int64).reshape(-1, 2)[coded.indices.to_numpy()].T
    return stem_M, kind_M, list(stems)


def _kind(name: str, stems: dict[str, int]) -> tuple[int, int]:
    for number, extension in enumerate(EXTENSIONS):
        stem = name.removesuffix(f".{extension}")
        if stem != name and (stem.removesuffix(".mask") in MODALITIES or stem.startswith("label.")):
            return stems.setdefault(stem, len(stems)), number
    return -1, -1


def days(texts: pa.StringArray) -> np.ndarray:
    """Days since 1970 of ISO 8601 texts, UNKNOWN_DAY for a text without a date: int32. Each different day is parsed once."""
    coded = pc.utf8_slice_codeunits(pc.fill_null(texts, ""), 0, 10).dictionary_encode()
    found = np.array([day if len(day) == 10 else "NaT" for day in coded.dictionary.to_pylist()], "datetime64[D]")
    numbers = np.where(np.isnat(found), UNKNOWN_DAY, found.astype(np.int64))
    return numbers.astype(np.int32)[coded.indices.to_numpy()]


def _days_of_year(texts: pa.StringArray) -> np.ndarray:
    """int16 of ISO 8601 texts; 0 for a text without a date."""
    day_D = days(texts)
    date_D = day_D.astype("datetime64[D]")
    doy_D = (date_D - date_D.astype("datetime64[Y]")).astype(np.int64) + 1
    return np.where(day_D == UNKNOWN_DAY, 0, doy_D).astype(np.int16)


def _extent(index: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Ground extent in metres, float64 [N] each: shape × gsd of the first modality a sample has."""
    width, height = np.zeros(index.num_rows), np.zeros(index.num_rows)
    for modality in _SENSORS:
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


def segments(parts: Sequence[tuple[Columns, int]]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The columns of several sets one behind the other: per column its pieces, in order.

    parts: the columns of each set, and how many shards its manifest lists.
    """
    counts = [len(columns["shard"]) for columns, _ in parts]
    shards = np.cumsum([0, *(number for _, number in parts)])
    for name in sorted({name for columns, _ in parts for name in columns}):
        dtype = np.result_type(*(columns[name].dtype for columns, _ in parts if name in columns))
        pieces: list[np.ndarray] = [np.zeros(1, np.int64)] if name.endswith(".first") else []
        end = 0
        for (columns, _), count, shard in zip(parts, counts, shards):
            column = columns.get(name)
            if column is None:
                column = absent(name, count)
            if name.endswith(".first"):
                pieces.append(column[1:] + end)
                end += int(column[-1])
            else:
                pieces.append(column + np.int32(shard) if name == "shard" and shard else column)
        yield name, [np.ascontiguousarray(piece, dtype) for piece in pieces]


def absent(name: str, count: int) -> np.ndarray:
    """What a column of `count` samples would hold if it were there although no sample has what it describes."""
    what = name.rpartition(".")[2]
    if what in ("clear", "doy"):
        return np.empty(0, np.float32 if what == "clear" else np.int16)
    value: Any = {"kind": np.int8(-1), "first": np.int64(0), "whole": np.bool_(True)}.get(what, np.uint32(0))
    return np.broadcast_to(value, count + (what == "first"))
