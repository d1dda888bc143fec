"""The plan of a build as files: made once, then every task reads the slices it works on and nothing else.

    _build/plan.json             fingerprint, report, slices; claimed by the first builder, another plan is refused
    _build/plan/NNNNNN.parquet   a catalog's sites of slice N, in the order of its shards (prepared plans have slices of their own)

A slice is the unit of work of an array task or a cluster's worker: some shards of one split, next to each other in the set. Who has
the same config and catalog files (or the same prepared plan) takes the stored plan; only what has changed is planned again, and must
come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import from_dict, to_dict
from cluster.errors import UsageError
from data_prep.config import SPLITS, BuildConfig
from data_prep.merge import shaping_config
from data_prep.parts import PARTS, dump
from data_prep.plan import Plan, PlannedShard, modality_bytes, scattered
from data_prep.schema import MODALITIES
from data_prep.shards import shard_name
from data_prep.sources.records import SiteRecord

PLAN, LEASE, FOLDER = "plan.json", "planning.json", "plan"
MOST_SHARDS = 32  # of one slice: enough that parts are few, few enough that a task ends within the hour
SLICES = 1024  # wanted at least, before slices grow
LEASE_S = 60.0
_RECORDS = pa.schema([("shard", pa.int32()), ("record", pa.string())])


class NothingToBuild(UsageError):
    """A prepared plan of which no site is left."""


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
class Addition:
    """What was appended to a plan at one time: its last slices.

    Attributes:
        fingerprint: of its sites and of all that stood before it; its parts carry it.
        slices: how many; faults: how many of the plan's last faults are of its sites.
        prepared, inputs: as in `StoredPlan`.
    """

    fingerprint: str
    slices: int
    prepared: str = ""
    inputs: str = ""
    faults: int = 0


@dataclass(frozen=True)
class StoredPlan:
    """A plan without its sites.

    Attributes:
        slices: the first plan's, then those of every addition; a slice keeps its number.
        fingerprint: of everything that decides the bytes of the first plan.
        faults, report: as in `plan.Plan`; the report's `appended` has one entry per addition.
        prepared: URL of the prepared plan that holds the sites; "": they lie beside plan.json.
        inputs: digest of config and catalog files; "" where they cannot be told apart cheaply.
        added: what was appended later.
    """

    slices: tuple[Slice, ...]
    fingerprint: str
    faults: tuple[dict[str, str], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    prepared: str = ""
    inputs: str = ""
    added: tuple[Addition, ...] = ()

    @property
    def names(self) -> list[str]:
        """Shards in the order of the finished set: by split, then by number."""
        order = sorted(self.slices, key=lambda its: (SPLITS.index(its.split), its.first))
        return [name for its in order for name in its.names]

    @property
    def num_sites(self) -> int:
        return sum(sum(its.sites) for its in self.slices)

    @property
    def origins(self) -> tuple[Addition, ...]:
        """The first plan and every addition."""
        first = len(self.slices) - sum(its.slices for its in self.added)
        return (Addition(self.fingerprint, first, self.prepared, self.inputs), *self.added)

    @property
    def fingerprints(self) -> frozenset[str]:
        """What a part of this plan may carry."""
        return frozenset(its.fingerprint for its in self.origins)

    @property
    def last_fingerprint(self) -> str:
        """Names the plan with all that was appended."""
        return self.origins[-1].fingerprint

    @property
    def marks(self) -> dict[str, str]:
        """The fingerprint that each shard's part carries."""
        found = {number: self.origin_of(number).fingerprint for number in range(len(self.slices))}
        return {name: found[number] for number, its in enumerate(self.slices) for name in its.names}

    def origin_of(self, number: int) -> Addition:
        """Where slice `number` comes from."""
        for its in self.origins:
            if number < its.slices:
                return its
            number -= its.slices
        raise IndexError(number)

    def ref(self, url: str, number: int, index: int) -> ShardRef:
        """Shard `index` of slice `number` of a set at `url`."""
        origin = self.origin_of(number)
        own = records_folder(url, origin.fingerprint)
        chosen = own if origin.prepared and origin in self.added else ""
        return ShardRef(origin.prepared or own, bool(origin.prepared), self.slices[number], index, chosen)


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


def slices_of(plan: Plan, taken: Mapping[str, int] | None = None) -> tuple[list[Slice], list[tuple[PlannedShard, ...]]]:
    """A plan in memory cut into slices, and their shards. taken: numbers that each split's shards have used up already."""
    size = min(max(len(plan.shards) // SLICES, 1), MOST_SHARDS)
    slices: list[Slice] = []
    shards: list[tuple[PlannedShard, ...]] = []
    for split in SPLITS:
        own = [shard for shard in plan.shards if shard.split == split]
        for start in range(0, len(own), size):
            group = tuple(own[start : start + size])
            first = start + (taken or {}).get(split, 0)
            slices.append(Slice(split, first, len(slices), tuple(len(shard.records) for shard in group)))
            shards.append(group)
    return slices, shards


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


def plan_prepared(
    config: BuildConfig, inputs: str, choose: Callable[[int, pa.Table], pa.Table] = lambda number, places: places,
    taken: Mapping[str, int] | None = None,
) -> StoredPlan:  # fmt: skip
    """The plan of a build from `prepare.url`: every prepared slice gives one slice of shards per split.

    Args:
        choose: which of a prepared slice's sites are built (columns key, cell, split, footprint, SENSOR_dates).
        taken: as in `slices_of`.

    Raises UsageError: no prepared plan, an unfinished one, no site.
    """
    from data_prep.prepare.slices import read_places, read_prepared

    prepared = read_prepared(config.prepare.url)
    sensors, columns = prepared["sensors"], {}

    def sizes(number: int) -> dict[str, tuple[int, ...]]:
        wanted = ["key", "cell", "split", "footprint", *(f"{name}_dates" for name in sensors)]
        places = choose(number, read_places(config.prepare.url, number, wanted))
        own = {split: places.filter(pc.equal(places["split"], split)) for split in SPLITS}
        return {
            split: tuple(map(len, packed_places(its, sensors, config))) for split, its in own.items() if its.num_rows
        }

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(sizes, range(len(prepared["slices"])))):
            columns[number] = found
    slices: list[Slice] = []
    for split in SPLITS:
        first = (taken or {}).get(split, 0)
        for number, found in columns.items():
            if split in found:
                slices.append(Slice(split, first, number, found[split]))
                first += len(found[split])
    if not slices:
        raise NothingToBuild(f"{config.prepare.url} holds no site to build")
    digest = hashlib.sha256(json.dumps(shaping_config(config), sort_keys=True).encode())
    for entry in prepared["slices"]:
        digest.update(json.dumps(entry["sha256"], sort_keys=True).encode())
    left = sum(sum(entry["left_out"].values()) for entry in prepared["slices"])
    planned = sum(sum(its.sites) for its in slices)
    report = {
        "sites": {"listed": planned + left, "not_chosen": left, "duplicates": 0, "planned": planned},
        "splits": {"buffer_m": config.split.buffer_m, "rule": "place", "left_out": dict.fromkeys(SPLITS, 0)},
        "prepared": prepared["fingerprint"],
    }  # fmt: skip
    return StoredPlan(tuple(slices), digest.hexdigest()[:16], (), report, config.prepare.url, inputs)


def inputs_of(config: BuildConfig) -> str:
    """A digest of config and inputs that opens no catalog: sizes and times (or ETags) of its files. "" if there are none."""
    digest = hashlib.sha256(json.dumps(shaping_config(config), sort_keys=True).encode())
    sources = config.source.catalog or (
        (storage.join(config.prepare.url, "prepared.json"),) if config.prepare.url else ()
    )
    if not sources:
        return ""
    for url in sources:
        fs, path = storage.filesystem(url)
        try:
            entries = fs.find(path, detail=True) or {path: fs.info(path)}
        except OSError:
            return ""
        digest.update(url.encode())
        for name, info in sorted(entries.items()):
            version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created")
            if version is None:
                return ""
            digest.update(f"{name} {info.get('size')} {version}\n".encode())
    return digest.hexdigest()[:32]


def read_plan(url: str) -> StoredPlan | None:
    """The plan that an output holds; None if there is none, or one of an earlier version (without slices)."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(url, PARTS, PLAN)))
        slices = tuple(Slice(split, first, source, tuple(sites)) for split, first, source, sites in tree["slices"])
        added = tuple(Addition(**its) for its in tree.get("added", ()))
        return StoredPlan(
            slices, tree["plan"], tuple(tree["faults"]), tree["report"], tree["prepared"], tree["inputs"], added
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def recorded_config(url: str) -> BuildConfig | None:
    """The config that an output's plan was last made with; None if there is no plan. Raises UsageError for one of another version."""
    try:
        tree = json.loads(storage.read_bytes(storage.join(url, PARTS, PLAN)))["config"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return from_dict(BuildConfig, tree, "recorded config")


def plan_json(plan: StoredPlan, config: BuildConfig) -> bytes:
    return dump(
        {
            "plan": plan.fingerprint, "shards": plan.names, "report": plan.report, "faults": list(plan.faults), "config": to_dict(config),
            "prepared": plan.prepared, "inputs": plan.inputs, "slices": [[s.split, s.first, s.source, list(s.sites)] for s in plan.slices],
            **({"added": [dataclasses.asdict(its) for its in plan.added]} if plan.added else {}),
        }
    )  # fmt: skip


@contextlib.contextmanager
def lease(url: str, done: threading.Event | None = None, stands: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Yields True to the one task that is to plan, False to the others, once the plan stands. Of a planner that died, another
    takes over: its lease no longer changes. stands: whether it does; None: there is a plan.json."""
    place, token = storage.join(url, PARTS, LEASE), uuid.uuid4().hex
    seen, since = b"", time.monotonic()
    while not storage.create(place, f"{token} 0".encode()):
        if stands() if stands is not None else storage.exists(storage.join(url, PARTS, PLAN)):
            yield False
            return
        with contextlib.suppress(FileNotFoundError):
            now = storage.read_bytes(place)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > LEASE_S:
                storage.remove(place)
        time.sleep(0.5)
    ended = done or threading.Event()

    def renew() -> None:
        count = 0
        while not ended.wait(LEASE_S / 6):
            count += 1
            storage.write_atomic(place, f"{token} {count}".encode())

    keeper = threading.Thread(target=renew, daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        ended.set()
        keeper.join()
        storage.remove(place)
