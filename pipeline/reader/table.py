"""The index of one or several shard sets as flat numpy columns: what the reader needs per sample, and nothing else.

Legend: N samples after the filters · D dates of one modality over all samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet
from pipeline.config import DataConfig
from pipeline.reader.views import SiteFacts

SCENE = "label_scene"
EXTENSIONS = ("npy", "b2nd", "zarr.zip")


@dataclasses.dataclass
class Members:
    """Places of one kind of member. offset_N: of its data in the tar, -1 = absent. kind_N: index into EXTENSIONS."""

    offset_N: np.ndarray
    length_N: np.ndarray
    crc_N: np.ndarray
    kind_N: np.ndarray


@dataclasses.dataclass
class Dates:
    """Dates of one modality: of sample n the entries first_N[n] up to first_N[n + 1]. doy 0 = unknown.

    whole_N: every pixel of every date of sample n is clear. Plain lists are read one by one, several times per sample.
    """

    first_N: list[int]
    whole_N: list[bool]
    clear_D: np.ndarray
    doy_D: np.ndarray

    def of(self, row: int) -> slice:
        return slice(self.first_N[row], self.first_N[row + 1])


@dataclasses.dataclass
class Table:
    """Samples that passed the filters, in storage order, over all shard sets.

    Attributes:
        sets: the opened shard sets.
        sizes: per set, samples of each shard.
        shard_urls, shard_hashes, shard_N: URL and sha256 of each shard, and which one a sample lies in.
        members: by stem (`s2`, `s2.mask`, `label.landcover`).
        width_m_N, height_m_N: extent of the footprint.
        lonlat_N2: centre in WGS84 degrees. scene_N: scalar label "scene", -1 = none.
        label: name of the raster label that becomes `View.classes_BHW`; None if no sample has one.
        fingerprints: per set 16 hex digits of its content and of the rows taken.
    """

    sets: list[ShardSet]
    sizes: list[np.ndarray]
    keys: list[str]
    shard_urls: list[str]
    shard_hashes: list[str]
    shard_N: np.ndarray
    members: dict[str, Members]
    dates: dict[str, Dates]
    width_m_N: list[float]
    height_m_N: list[float]
    lonlat_N2: np.ndarray
    scene_N: np.ndarray
    label: str | None
    fingerprints: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def facts(self, row: int, modalities: Sequence[str]) -> SiteFacts:
        """What `views.plan` needs of a sample; absent modalities are left out."""
        clear = {
            m: self.dates[m].clear_D[self.dates[m].of(row)] for m in modalities if self.members[m].offset_N[row] >= 0
        }
        return SiteFacts(self.width_m_N[row], self.height_m_N[row], clear)

    def stems(self, modalities: Sequence[str]) -> list[str]:
        """Members to read for these modalities, in tar order."""
        stems = [stem for m in modalities for stem in (m, f"{m}.mask")]
        return stems if self.label is None else [*stems, f"label.{self.label}"]

    def spans(self, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(start_N, stop_N): bytes of the tar from the first to the last needed member. stop = start where none exists."""
        start, stop = np.full(len(self), np.iinfo(np.int64).max), np.zeros(len(self), np.int64)
        for stem in self.stems(modalities):
            place = self.members[stem]
            there = place.offset_N >= 0
            start = np.where(there, np.minimum(start, place.offset_N), start)
            stop = np.where(there, np.maximum(stop, place.offset_N + place.length_N), stop)
        return np.minimum(start, stop), stop


def load(data: DataConfig, modalities: Sequence[str], label: str | None = None) -> Table:
    """Opens the shard sets of `data.url` and applies its filters.

    Raises UsageError: no set there, no index, or no sample left (naming the filter that removed the last ones).
    """
    if not any(data.urls):
        raise UsageError("data.url is empty; pass data.url=FOLDER of a shard set made by python -m data_prep build")
    sets = [ShardSet.open(url) for url in data.urls]
    parts = [_select(shardset, data, modalities) for shardset in sets]
    if label is None:
        label = next((name for index in parts for names in index["rasters"].to_pylist() for name in names or ()), None)
    shard_urls: list[str] = []
    shard_hashes: list[str] = []
    shards, sizes, fingerprints = [], [], []
    for shardset, index in zip(sets, parts):
        names = index["shard"].combine_chunks().dictionary_encode()
        shards.append(np.asarray(names.indices, np.int32) + len(shard_urls))
        sizes.append(np.bincount(np.asarray(names.indices), minlength=len(names.dictionary)).astype(np.int64))
        hashes = {shard["name"]: shard["sha256"] for shard in shardset.manifest["shards"]}
        shard_hashes += [hashes[name] for name in names.dictionary.to_pylist()]
        shard_urls += [shardset.shard_url(name) for name in names.dictionary.to_pylist()]
        fingerprints.append(_fingerprint(shardset, index))
    index = pa.concat_tables(parts, promote_options="default").combine_chunks()
    width_m_N, height_m_N = _extent(index, modalities)
    return Table(
        sets, sizes, index["key"].to_pylist(), shard_urls, shard_hashes, np.concatenate(shards), _members(index, modalities, label),
        {m: _dates(index, m) for m in modalities}, width_m_N.tolist(), height_m_N.tolist(), _centres(index), _scene(index), label, fingerprints,
    )  # fmt: skip


def _columns(shardset: ShardSet, modalities: Sequence[str]) -> list[str]:
    wanted = ["key", "shard", "row", "offset", "members", "split", "modalities", "cloud", "bbox", "rasters"]
    wanted += ["datetime_start", "datetime_end", SCENE]
    sensors = list(dict.fromkeys([*modalities, *MODALITIES]))
    wanted += [f"{m}_{what}" for m in sensors for what in ("shape", "gsd_m")]
    wanted += [f"{m}_{what}" for m in modalities for what in ("clear", "datetimes")]
    return wanted


def _select(shardset: ShardSet, data: DataConfig, modalities: Sequence[str]) -> pa.Table:
    index = shardset.read_index()
    index = index.select([name for name in _columns(shardset, modalities) if name in index.column_names])
    keep = np.ones(index.num_rows, bool)
    for name, mask in _filters(index, data, modalities):
        before = int(keep.sum())
        keep &= mask
        if not keep.any():
            raise UsageError(f"{shardset.url}: no sample left after {name} ({before} before it)")
    index = index.filter(pa.array(keep))
    return index if (np.diff(np.asarray(index["row"])) > 0).all() else index.sort_by("row")


def _filters(index: pa.Table, data: DataConfig, modalities: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """(what is asked, which rows have it) of every filter that is set."""
    held = [set(names) for names in index["modalities"].to_pylist()]
    filters = [(f"modalities {', '.join(modalities)}", np.array([bool(set(modalities) & m) for m in held], bool))]
    if data.split:
        filters.append((f"data.split={data.split}", np.asarray(pc.equal(index["split"], data.split))))
    if data.require:
        filters.append((f"data.require={list(data.require)}", np.array([set(data.require) <= m for m in held], bool)))
    if data.max_cloud is not None:
        clear = pc.less_equal(pc.fill_null(index["cloud"], 0.0), data.max_cloud)
        filters.append((f"data.max_cloud={data.max_cloud}", np.asarray(clear)))
    if data.date_range is not None:
        first, last = (
            pc.utf8_slice_codeunits(pc.fill_null(index[f"datetime_{end}"], ""), 0, 10) for end in ("start", "end")
        )
        inside = pc.and_(pc.less_equal(first, data.date_range[1]), pc.greater_equal(last, data.date_range[0]))
        filters.append((f"data.date_range={list(data.date_range)}", np.asarray(inside)))
    if data.bbox is not None:
        filters.append((f"data.bbox={list(data.bbox)}", _meets(index, data.bbox)))
    return filters


def _meets(index: pa.Table, bbox: tuple[float, float, float, float]) -> np.ndarray:
    """Whether a sample's bbox meets `bbox`; either may cross the antimeridian (west > east)."""
    west, south, east, north = (_side(index, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    east = np.where(east < west, east + 360, east)
    box_east = bbox[2] + 360 if bbox[2] < bbox[0] else bbox[2]
    meets = np.zeros(len(west), bool)
    for shift in (-360, 0, 360):
        meets |= (west + shift <= box_east) & (east + shift >= bbox[0])
    return meets & (south <= bbox[3]) & (north >= bbox[1])


def _side(index: pa.Table, side: str) -> np.ndarray:
    return np.asarray(pc.struct_field(index["bbox"], side), np.float64)


def _centres(index: pa.Table) -> np.ndarray:
    west, south, east, north = (_side(index, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    lon = (west + np.where(east < west, east + 360, east)) / 2
    return np.stack([np.where(lon > 180, lon - 360, lon), (south + north) / 2], axis=1)


def _scene(index: pa.Table) -> np.ndarray:
    if SCENE not in index.column_names:
        return np.full(index.num_rows, -1, np.int64)
    return np.asarray(pc.fill_null(index[SCENE], -1), np.int64)


def _members(index: pa.Table, modalities: Sequence[str], label: str | None) -> dict[str, Members]:
    lists = index["members"].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], lists.type)
    flat = lists.flatten()
    row_M = np.repeat(np.arange(index.num_rows), np.asarray(lists.value_lengths()))
    name_M = flat.field("name").to_numpy(zero_copy_only=False)
    offset_M, length_M = (flat.field(name).to_numpy(zero_copy_only=False) for name in ("offset", "length"))
    has_crc = "crc32c" in [field.name for field in flat.type]
    crc_M = flat.field("crc32c").to_numpy(zero_copy_only=False) if has_crc else np.full(len(flat), -1)
    stems = [stem for m in modalities for stem in (m, f"{m}.mask")] + ([f"label.{label}"] if label else [])
    members = {}
    for stem in stems:
        n = index.num_rows
        places = Members(
            np.full(n, -1, np.int64), np.zeros(n, np.int64), np.full(n, -1, np.int64), np.zeros(n, np.int8)
        )
        for kind, extension in enumerate(EXTENSIONS):
            found = np.flatnonzero(name_M == f"{stem}.{extension}")
            rows = row_M[found]
            places.offset_N[rows], places.length_N[rows] = offset_M[found], length_M[found]
            places.crc_N[rows], places.kind_N[rows] = crc_M[found], kind
        members[stem] = places
    return members


def _dates(index: pa.Table, modality: str) -> Dates:
    clear = _list(index, f"{modality}_clear")
    clear_D = clear.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    first_N = np.concatenate([[0], np.cumsum(pc.fill_null(clear.value_lengths(), 0).to_numpy(zero_copy_only=False))])
    texts = _list(index, f"{modality}_datetimes").flatten()
    day = pc.utf8_slice_codeunits(pc.fill_null(texts, ""), 0, 10).to_numpy(zero_copy_only=False)
    known = np.array([len(text) == 10 for text in day], bool)
    doy_D = np.zeros(len(day), np.int16)
    if known.any():
        date = day[known].astype(str).astype("datetime64[D]")
        doy_D[known] = (date - date.astype("datetime64[Y]")).astype(int) + 1
    clear_D = np.nan_to_num(clear_D, nan=0.999)
    cloudy = np.concatenate([[0], np.cumsum(clear_D < 1)])[first_N.astype(np.int64)]
    return Dates(first_N.astype(np.int64).tolist(), (np.diff(cloudy) == 0).tolist(), clear_D, doy_D)


def _list(index: pa.Table, name: str) -> pa.ListArray:
    column = index[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _extent(index: pa.Table, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ground extent in metres: shape × gsd of the first modality a sample has, coarse series before hr."""
    width, height = np.zeros(index.num_rows), np.zeros(index.num_rows)
    sensors = sorted(dict.fromkeys([*modalities, *MODALITIES]), key=lambda m: -MODALITIES[m].gsd_m)
    for modality in sensors:
        if f"{modality}_shape" not in index.column_names:
            continue
        gsd = np.asarray(pc.fill_null(index[f"{modality}_gsd_m"], 0.0), np.float64)
        shapes = index[f"{modality}_shape"].to_pylist()
        rows_px = np.array([s[2] if s else 0 for s in shapes], np.float64)
        columns_px = np.array([s[3] if s else 0 for s in shapes], np.float64)
        width = np.where(width > 0, width, columns_px * gsd)
        height = np.where(height > 0, height, rows_px * gsd)
    return width, height


def _fingerprint(shardset: ShardSet, index: pa.Table) -> str:
    digest = hashlib.sha256(str(shardset.manifest.get("content_sha256") or shardset.manifest_sha256).encode())
    digest.update(np.asarray(index["row"], np.int64).tobytes())
    return digest.hexdigest()[:16]
