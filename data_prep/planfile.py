"""The plan of a build as files: made once, then every task reads the slices it works on and nothing else.

    _build/plan.json             fingerprint, report, slices; claimed by the first builder, another plan is refused
    _build/plan/NNNNNN.parquet   a catalog's sites of slice N, in the order of its shards (prepared plans have slices of their own)

A slice is the unit of work of an array task or a cluster's worker: some shards of one split, next to each other in the set. Who has
the same config and catalog files (or the same prepared plan) takes the stored plan; only what has changed is planned again, and must
come out the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import to_dict
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
class StoredPlan:
    """A plan without its sites.

    Attributes:
        slices: in the order of the finished set.
        fingerprint: of everything that decides the bytes.
        faults, report: as in `plan.Plan`.
        prepared: URL of the prepared plan that holds the sites; "": they lie beside plan.json.
        inputs: digest of config and catalog files; "" where they cannot be told apart cheaply.
    """

    slices: tuple[Slice, ...]
    fingerprint: str
    faults: tuple[dict[str, str], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    prepared: str = ""
    inputs: str = ""

    @property
    def names(self) -> list[str]:
        return [name for its in self.slices for name in its.names]

    @property
    def num_sites(self) -> int:
        return sum(sum(its.sites) for its in self.slices)

    def ref(self, url: str, number: int, index: int) -> ShardRef:
        """Shard `index` of slice `number` of a set at `url`."""
        folder = self.prepared or records_folder(url, self.fingerprint)
        return ShardRef(folder, bool(self.prepared), self.slices[number], index)


@dataclass(frozen=True)
class ShardRef:
    """Shard `index` of a slice, small enough to send anywhere; `load` reads its sites from `folder`, a prepared plan or a plan's own."""

    folder: str
    prepared: bool
    piece: Slice
    index: int

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
        return load_slice(self.folder, self.prepared, self.piece, config)[self.index]


def slices_of(plan: Plan) -> tuple[list[Slice], list[tuple[PlannedShard, ...]]]:
    """A plan in memory cut into slices, and their shards."""
    size = min(max(len(plan.shards) // SLICES, 1), MOST_SHARDS)
    slices: list[Slice] = []
    shards: list[tuple[PlannedShard, ...]] = []
    for split in SPLITS:
        own = [shard for shard in plan.shards if shard.split == split]
        for start in range(0, len(own), size):
            group = tuple(own[start : start + size])
            slices.append(Slice(split, start, len(slices), tuple(len(shard.records) for shard in group)))
            shards.append(group)
    return slices, shards


def write_records(folder: str, number: int, shards: Sequence[PlannedShard]) -> None:
    """A slice's sites, as `NNNNNN.parquet`."""
    rows = [(i, json.dumps(record.to_dict(), separators=(",", ":"))) for i, shard in enumerate(shards) for record in shard.records]
    table = pa.table({"shard": [i for i, _ in rows], "record": [text for _, text in rows]}, _RECORDS)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.write_atomic(records_url(folder, number), stream.getvalue())


def records_url(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.parquet")


def records_folder(url: str, fingerprint: str) -> str:
    """Where the sites of a plan lie: under its own name, so that a builder with another plan can spoil nothing."""
    return storage.join(url, PARTS, FOLDER, fingerprint)


_LAST: dict[tuple[str, Slice], tuple[PlannedShard, ...]] = {}  # a worker makes the shards of a slice one after the other


def load_slice(folder: str, prepared: bool, piece: Slice, config: BuildConfig) -> tuple[PlannedShard, ...]:
    """The shards of a slice with their sites. Raises UsageError or RunFailure if it cannot be read."""
    key = (folder, piece)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = _load_prepared(folder, piece, config) if prepared else _load_records(folder, piece)
    return _LAST[key]


def _load_records(folder: str, piece: Slice) -> tuple[PlannedShard, ...]:
    place = records_url(folder, piece.source)
    try:
        table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(place))).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{place} cannot be read ({error}); remove plan.json two folders above, the plan is then made again") from None
    groups: list[list[SiteRecord]] = [[] for _ in piece.sites]
    for shard, text in zip(table["shard"].to_pylist(), table["record"].to_pylist()):
        groups[shard].append(SiteRecord.from_dict(json.loads(text)))
    return tuple(PlannedShard(name, piece.split, tuple(group)) for name, group in zip(piece.names, groups))


def _load_prepared(url: str, piece: Slice, config: BuildConfig) -> tuple[PlannedShard, ...]:
    from data_prep.prepare.slices import SliceItems, read_places, read_prepared, site_of

    sensors = read_prepared_sensors(url) or read_prepared(url)["sensors"]
    rows = read_places(url, piece.source).to_pylist()
    groups = packed_places([row for row in rows if row["split"] == piece.split], sensors, config)
    items = SliceItems(url, piece.source, sensors)
    shards = []
    for name, group in zip(piece.names, groups, strict=True):
        sites = [site_of(row, items, sensors) for row in group]
        shards.append(PlannedShard(name, piece.split, tuple(r for r, _ in sites), {r.key: more for r, more in sites if more}))
    return tuple(shards)


def read_prepared_sensors(url: str) -> list[str]:
    """The sensors of a prepared plan, from its small plan.json; empty if that is gone."""
    try:
        names = json.loads(storage.read_bytes(storage.join(url, PLAN)))["prepare"]["sensors"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in MODALITIES if name in names]


def packed_places(rows: list[dict[str, Any]], sensors: Sequence[str], config: BuildConfig) -> list[list[dict[str, Any]]]:
    """Prepared sites of one slice and split in shards of about equal bytes, none past the limits of `shards`."""
    rows = [rows[i] for i in scattered([row["key"] for row in rows], config)]
    sizes = np.array([_estimate(row, sensors, config) for row in rows], np.int64)
    before, total = np.cumsum(sizes) - sizes, int(sizes.sum())
    limits = config.shards
    for number in range(max(-(-total // limits.max_bytes), -(-len(rows) // limits.max_samples), 1), len(rows) + 1):
        bounds = np.searchsorted(before * number // total, np.arange(number + 1))
        groups = [rows[start:end] for start, end in itertools.pairwise(bounds.tolist()) if end > start]
        heavy = any(sizes[start:end].sum() > limits.max_bytes and end - start > 1 for start, end in itertools.pairwise(bounds))
        if not heavy and all(len(group) <= limits.max_samples for group in groups):
            return groups
    return [[row] for row in rows]


def _estimate(row: dict[str, Any], sensors: Sequence[str], config: BuildConfig) -> int:
    total = 4096
    for name in sensors:
        if dates := len(row[f"{name}_images"]):
            gsd = config.grid.series_gsd_m if MODALITIES[name].is_series else config.grid.hr_gsd_m
            total += modality_bytes(name, tuple(row["footprint"]), dates, gsd or MODALITIES[name].gsd_m, config.grid)
    return total


def plan_prepared(config: BuildConfig, inputs: str) -> StoredPlan:
    """The plan of a build from `prepare.url`: every prepared slice gives one slice of shards per split."""
    from data_prep.prepare.slices import read_places, read_prepared

    prepared = read_prepared(config.prepare.url)
    sensors, columns = prepared["sensors"], {}

    def sizes(number: int) -> dict[str, tuple[int, ...]]:
        rows = read_places(config.prepare.url, number).to_pylist()
        own = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
        return {split: tuple(len(g) for g in packed_places(its, sensors, config)) for split, its in own.items() if its}

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(sizes, range(len(prepared["slices"])))):
            columns[number] = found
    slices: list[Slice] = []
    for split in SPLITS:
        first = 0
        for number, found in columns.items():
            if split in found:
                slices.append(Slice(split, first, number, found[split]))
                first += len(found[split])
    if not slices:
        raise UsageError(f"{config.prepare.url} holds no site to build")
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
    sources = config.source.catalog or ((storage.join(config.prepare.url, "prepared.json"),) if config.prepare.url else ())
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
        return StoredPlan(slices, tree["plan"], tuple(tree["faults"]), tree["report"], tree["prepared"], tree["inputs"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def plan_json(plan: StoredPlan, config: BuildConfig) -> bytes:
    return dump(
        {
            "plan": plan.fingerprint, "shards": plan.names, "report": plan.report, "faults": list(plan.faults), "config": to_dict(config),
            "prepared": plan.prepared, "inputs": plan.inputs, "slices": [[s.split, s.first, s.source, list(s.sites)] for s in plan.slices],
        }
    )  # fmt: skip


@contextlib.contextmanager
def lease(url: str, done: threading.Event | None = None) -> Iterator[bool]:
    """Yields True to the one task that is to plan, False to the others, once the plan stands. Of a planner that died, another
    takes over: its lease no longer changes."""
    place, token = storage.join(url, PARTS, LEASE), uuid.uuid4().hex
    seen, since = b"", time.monotonic()
    while not storage.create(place, f"{token} 0".encode()):
        if storage.exists(storage.join(url, PARTS, PLAN)):
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
