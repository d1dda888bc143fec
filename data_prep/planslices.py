"""A slice of a plan: which shards it holds, where its sites lie, and how a worker reads them.

    _build/plan/FINGERPRINT/NNNNNN.parquet   a catalog's sites of slice N, in the order of its shards
    _build/plan/FINGERPRINT/NNNNNN.txt       which sites of prepared slice N an addition takes; the sites lie in the prepared plan

A slice is the unit of work of an array task or a cluster's worker: some shards of one split, next to each other in the set.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from data_prep.config import BuildConfig
from data_prep.parts import PARTS
from data_prep.plan import PlannedShard, modality_bytes, scattered
from data_prep.schema import MODALITIES
from data_prep.shards import shard_name
from data_prep.sources.records import SiteRecord

FOLDER = "plan"  # of all plans' sites, below _build
_RECORDS = pa.schema([("shard", pa.int32()), ("record", pa.string())])


@dataclass(frozen=True)
class Slice:
    """Shards `first` … of a split. source: number of the file (or prepared slice) that holds its sites; sites: of every shard."""

    split: str
    first: int
    source: int
    sites: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return [shard_name(self.split, self.first + i) for i in range(len(self.sites))]


@dataclass(frozen=True)
class ShardRef:
    """Shard `index` of a slice, small enough to send anywhere; `load` reads its sites from `folder`, a prepared plan or a plan's own.

    chosen: folder that says which of the prepared sites an addition takes; "": all.
    """

    folder: str
    prepared: bool
    piece: Slice
    index: int
    chosen: str = ""

    @property
    def name(self) -> str:
        return self.piece.names[self.index]

    @property
    def split(self) -> str:
        return self.piece.split

    @property
    def num_sites(self) -> int:
        return self.piece.sites[self.index]

    def load(self, config: BuildConfig) -> PlannedShard:
        return open_slice(self, config).shard(self.index)


def write_records(folder: str, number: int, shards: Sequence[PlannedShard]) -> None:
    """A slice's sites, as `NNNNNN.parquet`."""
    rows = [
        (i, json.dumps(record.to_dict(), separators=(",", ":")))
        for i, shard in enumerate(shards)
        for record in shard.records
    ]
    table = pa.table({"shard": [i for i, _ in rows], "record": [text for _, text in rows]}, _RECORDS)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.write_atomic(records_url(folder, number), stream.getvalue())


def records_url(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.parquet")


def records_folder(url: str, fingerprint: str) -> str:
    """Where the sites of a plan lie: under its own name, so that a builder with another plan can spoil nothing."""
    return storage.join(url, PARTS, FOLDER, fingerprint)


class Sites(Protocol):
    """An opened slice."""

    def shard(self, index: int) -> PlannedShard:
        """A shard with its sites."""


_LAST: dict[tuple[str, str, Slice], Sites] = {}  # a worker makes the shards of a slice one after the other


def open_slice(ref: ShardRef, config: BuildConfig) -> Sites:
    """The slice of a shard, read. Raises UsageError or RunFailure if it cannot be."""
    key = (ref.folder, ref.chosen, ref.piece)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = (
            PreparedSites(ref.folder, ref.piece, config, ref.chosen)
            if ref.prepared
            else CatalogSites(ref.folder, ref.piece)
        )
    return _LAST[key]


class CatalogSites:
    """A slice of a catalog's plan: records as JSON."""

    def __init__(self, folder: str, piece: Slice) -> None:
        place = records_url(folder, piece.source)
        try:
            self._table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(place))).read(use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(
                f"{place} cannot be read ({error}); remove plan.json two folders above, the plan is then made again"
            ) from None
        self._piece = piece

    def shard(self, index: int) -> PlannedShard:
        own = self._table.filter(pc.equal(self._table["shard"], index))
        records = tuple(SiteRecord.from_dict(json.loads(text)) for text in own["record"].to_pylist())
        return PlannedShard(self._piece.names[index], self._piece.split, records)


class PreparedSites:
    """A slice of a prepared plan: its sites and their items; a site's record is made when its shard is asked for."""

    def __init__(self, url: str, piece: Slice, config: BuildConfig, chosen: str = "") -> None:
        from data_prep.prepare.slices import SliceItems, read_places, read_prepared

        self._sensors = read_prepared_sensors(url) or read_prepared(url)["sensors"]
        places = read_places(url, piece.source)
        if chosen:
            places = places.filter(pc.is_in(places["key"], pa.array(read_chosen(chosen, piece.source), pa.string())))
        self._places = places.filter(pc.equal(places["split"], piece.split))
        self._groups = packed_places(self._places, self._sensors, config)
        if tuple(map(len, self._groups)) != piece.sites:
            raise UsageError(f"{url} is not the plan this set was begun with; choose another output.url")
        self._items = SliceItems(url, piece.source, self._sensors)
        self._piece = piece

    def shard(self, index: int) -> PlannedShard:
        from data_prep.prepare.slices import site_of

        rows = self._places.take(pa.array(self._groups[index], pa.int64())).to_pylist()
        sites = [site_of(row, self._items, self._sensors) for row in rows]
        spares = {record.key: more for record, more in sites if more}
        return PlannedShard(self._piece.names[index], self._piece.split, tuple(record for record, _ in sites), spares)


def read_prepared_sensors(url: str) -> list[str]:
    """The sensors of a prepared plan, from its small plan.json; empty if that is gone."""
    from data_prep.prepare.slices import PLAN

    try:
        names = json.loads(storage.read_bytes(storage.join(url, PLAN)))["prepare"]["sensors"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in MODALITIES if name in names]


def packed_places(places: pa.Table, sensors: Sequence[str], config: BuildConfig) -> list[list[int]]:
    """Rows of prepared sites of one slice and split, in shards of about equal bytes, none past the limits of `shards`.

    places: columns key, footprint and SENSOR_dates.
    """
    order = np.array(scattered(places["key"].to_pylist(), config), np.int64)
    if not len(order):
        return []
    sizes = np.full(len(order), 4096, np.int64)
    footprint = tuple(places["footprint"][0].as_py())  # squares of one side
    for name in sensors:
        gsd = (config.grid.series_gsd_m if MODALITIES[name].is_series else config.grid.hr_gsd_m) or MODALITIES[
            name
        ].gsd_m
        dates = places[f"{name}_dates"].to_numpy()
        cost = np.array(
            [modality_bytes(name, footprint, n, gsd, config.grid) if n else 0 for n in range(int(dates.max()) + 1)],
            np.int64,
        )
        sizes += cost[dates]
    sizes = sizes[order]
    before, total, limits = np.cumsum(sizes) - sizes, int(sizes.sum()), config.shards
    for number in range(max(-(-total // limits.max_bytes), -(-len(order) // limits.max_samples), 1), len(order) + 1):
        bounds = np.searchsorted(before * number // total, np.arange(number + 1)).tolist()
        pairs = [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
        if all(
            end - start <= limits.max_samples and (end - start == 1 or sizes[start:end].sum() <= limits.max_bytes)
            for start, end in pairs
        ):
            return [order[start:end].tolist() for start, end in pairs]
    return [[int(row)] for row in order]


def write_chosen(folder: str, number: int, keys: Sequence[str]) -> None:
    """Which sites of prepared slice `number` an addition takes."""
    storage.write_atomic(storage.join(folder, f"{number:06d}.txt"), "".join(f"{key}\n" for key in keys).encode())


def read_chosen(folder: str, number: int) -> list[str]:
    return storage.read_bytes(storage.join(folder, f"{number:06d}.txt")).decode().split()
