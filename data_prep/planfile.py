"""The plan of a build as a file: made once, then every task reads the slices it works on and nothing else.

    _build/plan.json    fingerprint, report, slices; claimed by the first builder, another plan is refused
    _build/plan/        the slices' sites (data_prep.planslices)

Who has the same config and catalog files (or the same prepared plan) takes the stored plan; only what has changed is planned again,
and must come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.config import from_dict, to_dict
from cluster.errors import UsageError
from data_prep.config import SPLITS, BuildConfig
from data_prep.merge import shaping_config
from data_prep.parts import PARTS, dump
from data_prep.plan import Plan, PlannedShard
from data_prep.planslices import ShardRef, Slice, packed_places, records_folder

PLAN, LEASE = "plan.json", "planning.json"
MOST_SHARDS = 32  # of one slice: enough that parts are few, few enough that a task ends within the hour
SLICES = 1024  # wanted at least, before slices grow
LEASE_S = 60.0


class NothingToBuild(UsageError):
    """A prepared plan of which no site is left."""


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
