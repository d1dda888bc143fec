"""`build --dry-run`: what a build will read, write, take and cost, before it starts. Nothing is written to the output.

A sample of the plan's sites is really read and encoded, in a process of its own, in the order in which a build would: what opening a file
takes (once per process) is told from what a site takes. Both are then multiplied by how often they happen over the whole plan, which
follows from the plan alone: a process opens a file once, and a block of it that still lies in the block cache is not fetched again.
Of a large plan some slices are counted through and stand for the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing as mp
import tempfile
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RunFailure
from data_prep import planfile
from data_prep.config import BuildConfig
from data_prep.geo import Grid
from data_prep.plan import PlannedShard, make_plan, read_catalogs
from data_prep.planfile import StoredPlan
from data_prep.planslices import ShardRef
from data_prep.resample import Kind, needed_window
from data_prep.schema import MODALITIES
from data_prep.sources.evidence import WHOLE_PIXELS
from data_prep.sources.raster import BLOCK_CACHE_MB, most_open
from data_prep.sources.read import target_grid
from data_prep.sources.records import Asset, SiteRecord
from data_prep.sources.traffic import JUDGED, Cost

COUNTED_SLICES = 4  # of a plan with more of them, so many are counted through
PART_BYTES = 8 << 20  # of an upload
TAR_END = 1024
Files = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Sample:
    """What the sampled sites took.

    Attributes:
        opened: by modality; rest: all that is no opening.
        written: bytes of their samples in a tar; sites: how many were encoded; faults: how many were not.
        seconds: that all of it took. files: as in `traffic.Traffic`.
    """

    opened: dict[str, Cost]
    rest: Cost
    files: Files
    sites: int
    faults: int
    written: int
    seconds: float


@dataclass
class Drivers:
    """How often what costs happens: files opened, by modality; runs of blocks that are fetched, and their bytes before compression."""

    opens: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    runs: float = 0
    loaded: float = 0

    def add(self, other: Drivers, times: float = 1.0) -> None:
        for name, count in other.opens.items():
            self.opens[name] += count * times
        self.runs += other.runs * times
        self.loaded += other.loaded * times


@dataclass(frozen=True)
class Prices:
    """What is paid, in any currency: per GB read and written, per 1000 requests of either kind, per hour of a task."""

    read_gb: float = 0.0
    write_gb: float = 0.0
    get_1000: float = 0.0
    put_1000: float = 0.0
    hour: float = 0.0


def estimate(config: BuildConfig, sites: int, workers: int, tasks: int, prices: Prices) -> dict[str, Any]:
    """The figures of a build by `tasks` tasks of `workers` processes each, from `sites` sites that are really read.

    Raises UsageError as a build does, RunFailure where no sampled site can be read.
    """
    plan, shards = _plan(config)
    chosen = _sampled(config, plan, shards, sites)
    sample = _alone(config, chosen, bool(plan.prepared))
    if not sample.sites:
        raise RunFailure(
            f"none of the {chosen.num_sites} sampled sites can be read: python -m data_prep audit names why"
        )
    in_sample, in_all = _Process(config, sample.files), _over_plan(config, plan, shards, sample.files, workers, tasks)
    for record in chosen.records:
        in_sample.read(record)
    return _figures(plan, sample, in_sample.found, in_all, chosen.num_sites, workers, tasks, prices)


def _plan(config: BuildConfig) -> tuple[StoredPlan, dict[str, PlannedShard]]:
    """The plan of a config, which nothing is written of, and its shards where they are in memory."""
    held = planfile.read_plan(config.output.url) if config.output.url else None
    if held is not None and held.inputs and held.inputs == planfile.inputs_of(config):
        return held, {}
    if config.prepare.url:
        return planfile.plan_prepared(config, ""), {}
    records, unplaced = read_catalogs(config)
    whole = make_plan(records, config, unplaced)
    slices, _ = planfile.slices_of(whole)
    plan = StoredPlan(tuple(slices), whole.fingerprint, whole.faults, whole.report)
    return plan, {shard.name: shard for shard in whole.shards}


def _loaded(
    config: BuildConfig, plan: StoredPlan, shards: dict[str, PlannedShard], number: int
) -> Iterator[PlannedShard]:
    """The shards of a slice with their sites."""
    for index, name in enumerate(plan.slices[number].names):
        ref: ShardRef = plan.ref(config.output.url, number, index)
        yield shards[name] if name in shards else ref.load(config)


def _counted(plan: StoredPlan) -> list[int]:
    """Slices that stand for the plan: all, or some that are spread over it."""
    number = len(plan.slices)
    if number <= COUNTED_SLICES:
        return list(range(number))
    return sorted({round((i + 0.5) * number / COUNTED_SLICES - 0.5) for i in range(COUNTED_SLICES)})


def _sampled(config: BuildConfig, plan: StoredPlan, shards: dict[str, PlannedShard], sites: int) -> PlannedShard:
    """The first sites of each counted slice, in the order of a build, as one shard."""
    numbers, found, spares = _counted(plan), list[SiteRecord](), dict[str, Any]()
    for left, number in zip(range(len(numbers), 0, -1), numbers):
        wanted = len(found) + math.ceil((sites - len(found)) / left)
        for shard in _loaded(config, plan, shards, number):
            found += shard.records[: wanted - len(found)]
            spares |= shard.spares
            if len(found) >= wanted:
                break
    return PlannedShard("train-000000.tar", "train", tuple(found), spares)


def _over_plan(
    config: BuildConfig, plan: StoredPlan, shards: dict[str, PlannedShard], files: Files, workers: int, tasks: int
) -> Drivers:  # fmt: skip
    """What the whole build does: the counted slices' shards dealt to processes as they come, scaled to all sites."""
    counted, found, done = _counted(plan), Drivers(), 0
    processes = {task: [_Process(config, files) for _ in range(workers)] for task in range(tasks)}
    turn: Counter[int] = Counter()
    for number in counted:
        task = number % tasks
        for shard in _loaded(config, plan, shards, number):
            process = processes[task][turn[task] % workers]
            turn[task] += 1
            done += len(shard.records)
            for record in shard.records:
                process.read(record)
    for its in itertools.chain.from_iterable(processes.values()):
        found.add(its.found, plan.num_sites / max(done, 1))
    return found


class _Process:
    """What one process of a build opens and fetches, site after site."""

    def __init__(self, config: BuildConfig, files: Files) -> None:
        self._config, self._files, self.found = config, files, Drivers()
        self._open: OrderedDict[str, int] = OrderedDict()  # which time it is that the file is open
        self._times: Counter[str] = Counter()
        self._cache: OrderedDict[tuple[str, int, int, int], int] = OrderedDict()
        self._cached = 0
        self._windows: dict[tuple[Grid, Grid], Any] = {}

    def read(self, record: SiteRecord) -> None:
        for asset in record.assets:
            if asset.modality not in self._files:
                continue  # no raster, or none of the sample: it costs what a site costs
            block_h, block_w, pixel_bytes = self._files[asset.modality]
            size = block_h * block_w * pixel_bytes
            first = self._opened(asset)
            grid = asset.grid
            if grid is None:
                self.found.runs += 1
                self.found.loaded += size
                continue
            if first and _is_judged_whole(asset, grid):
                self._fetch(asset, (0, grid.height, 0, grid.width), (block_h, block_w), size)
            window = self._window(record, asset, grid)
            if window is not None:
                for missing in self._fetch(asset, window, (block_h, block_w), size):
                    self.found.runs += 1
                    self.found.loaded += missing * size

    def _opened(self, asset: Asset) -> bool:
        """Opens a file that is not open; whether that is for the first time."""
        if asset.href in self._open:
            self._open.move_to_end(asset.href)
            return False
        self._times[asset.href] += 1
        self._open[asset.href] = self._times[asset.href]
        while len(self._open) > most_open():
            self._open.popitem(last=False)
        self.found.opens[asset.modality] += 1
        first = self._times[asset.href] == 1
        if first:
            self.found.opens[f"{asset.modality}{JUDGED}"] += 1
        return first

    def _window(self, record: SiteRecord, asset: Asset, grid: Grid) -> Any:
        name = asset.modality if asset.modality in MODALITIES else "s2"
        target = target_grid(record, name, grid, self._config.grid)
        key = (grid, target)
        if key not in self._windows:
            if len(self._windows) > 4096:
                self._windows.clear()
            kind: Kind = MODALITIES[name].kind if asset.modality in MODALITIES else "class"
            self._windows[key] = needed_window(grid, target, kind)
        return self._windows[key]

    def _fetch(self, asset: Asset, window: Any, block: tuple[int, int], size: int) -> list[int]:
        """Blocks that are not in the cache, per row of blocks; they are afterwards."""
        row0, row1, col0, col1 = window
        missing: list[int] = []
        for row in range(row0 // block[0], (row1 - 1) // block[0] + 1):
            count = 0
            for column in range(col0 // block[1], (col1 - 1) // block[1] + 1):
                key = (asset.href, self._open[asset.href], row, column)
                if key in self._cache:
                    self._cache.move_to_end(key)
                    continue
                count += 1
                self._cache[key] = size
                self._cached += size
                while self._cached > BLOCK_CACHE_MB << 20:
                    self._cached -= self._cache.popitem(last=False)[1]
            if count:
                missing.append(count)
        return missing


def _is_judged_whole(asset: Asset, grid: Grid) -> bool:
    """Whether a file is read from end to end before its first site (`sources.evidence`)."""
    spec = MODALITIES.get(asset.modality)
    return spec is not None and spec.kind in ("reflectance", "backscatter") and grid.width * grid.height <= WHOLE_PIXELS


def _figures(
    plan: StoredPlan, sample: Sample, few: Drivers, whole: Drivers, sites: int, workers: int, tasks: int, prices: Prices
) -> dict[str, Any]:  # fmt: skip
    """The sample's costs times how often they happen in all."""
    times = plan.num_sites / sites
    by_site = few.runs == 0  # nothing was told apart: every site costs what a sampled one does
    requests = sample.rest.requests * (times if by_site else whole.runs / few.runs)
    size = sample.rest.bytes * (times if by_site else whole.loaded / few.loaded)
    opening_s = 0.0
    for name, cost in sample.opened.items():
        more = whole.opens[name] / few.opens[name] if few.opens[name] else times
        requests += cost.requests * more
        size += cost.bytes * more
        opening_s += cost.seconds * more
    steady_s = max(sample.seconds - sum(cost.seconds for cost in sample.opened.values()), 0.0)
    busy_h = (steady_s * times + opening_s) / 3600
    shards = len(plan.names)
    samples = round(plan.num_sites * sample.sites / sites)
    written = round(sample.written / sample.sites * samples) + TAR_END * shards
    uploads = shards * (max(math.ceil(written / shards / PART_BYTES), 1) + 3 + 3) + 3 * len(plan.slices) + 5
    paid = {
        "read": size / 1e9 * prices.read_gb, "requests": requests / 1e3 * prices.get_1000, "write": written / 1e9 * prices.write_gb,
        "puts": uploads / 1e3 * prices.put_1000, "hours": busy_h / workers * prices.hour,
    }  # fmt: skip
    return {
        "sites": plan.num_sites, "slices": len(plan.slices), "shards": shards, "samples": samples, "sampled_sites": sites,
        "read_requests": round(requests), "read_bytes": round(size), "files_opened": round(sum(whole.opens.values())),
        "written_bytes": written, "written_requests": uploads, "tasks": tasks, "workers": workers,
        "cpu_hours": busy_h, "hours": busy_h / workers / min(tasks, max(len(plan.slices), 1)), "faulty_share": sample.faults / sites,
        "cost": {**paid, "total": sum(paid.values())},
    }  # fmt: skip


def _alone(config: BuildConfig, shard: PlannedShard, prepared: bool) -> Sample:
    """The sample, read in a process that has read nothing before. Raises RunFailure if it dies."""
    if prepared and not config.source.modalities:  # its sites hold only what was asked for by name
        config = dataclasses.replace(config, source=dataclasses.replace(config.source, modalities=tuple(MODALITIES)))
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_read_sample, args=(config, shard, theirs))
    process.start()
    theirs.close()
    try:
        found: Sample | str = ours.recv()
    except EOFError:
        found = "the process that reads the sample died (out of memory?)"
    process.join()
    if isinstance(found, str):
        raise RunFailure(found)
    return found


def _read_sample(config: BuildConfig, shard: PlannedShard, pipe: Any) -> None:
    from data_prep.build import Job, build_shard
    from data_prep.pool import keep_memory
    from data_prep.sources.traffic import TRAFFIC

    keep_memory()
    TRAFFIC.start()
    try:
        with tempfile.TemporaryDirectory(prefix="geoloom-sample-", dir=config.output.scratch) as folder:
            own = dataclasses.replace(config, output=dataclasses.replace(config.output, url=folder))
            began = time.perf_counter()
            part, _ = build_shard(Job(shard, own, "sample"), lambda _: None)
            seconds = time.perf_counter() - began
        TRAFFIC.stop()
        written = max(part["bytes"] - TAR_END, 0)
        pipe.send(
            Sample(TRAFFIC.opened, TRAFFIC.rest, TRAFFIC.files, part["samples"], len(part["faults"]), written, seconds)
        )
    except Exception as error:
        pipe.send(f"the sample cannot be read: {type(error).__name__}: {error}")
