"""`build --dry-run`: what a build will read, write, take and cost, before it starts. Nothing is written to the output.

A sample of the plan's sites is really read and encoded, in a process of its own, in the order in which a build would: what opening a file
takes (once per process) is told from what a site takes. Both are then multiplied by how often they happen over the whole plan, which
follows from the plan alone: a process opens a file once, and a block of it that still lies in the block cache is not fetched again.
Of a large plan some runs of neighbouring slices are counted through and stand for the others (neighbours, because sites share files).
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
from data_prep.sources.evidence import WHOLE_PIXELS, spread
from data_prep.sources.raster import BLOCK_CACHE_MB, most_open
from data_prep.sources.read import target_grid
from data_prep.sources.records import Asset, SiteRecord
from data_prep.sources.traffic import JUDGED, Cost

COUNTED_SITES = 20_000  # a plan with more of them is not counted through, but this many in COUNTED_RUNS pieces
COUNTED_RUNS = 4
SAMPLED_SLICES = 4  # the sites that are really read come from so many slices
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
    """How often what costs happens.

    Attributes:
        opens: files opened, by modality. loaded: bytes of the blocks that are fetched, before compression.
        runs: of blocks that lie one after the other in a file and are fetched by one request.
        uncounted: of these, all but one of each read: GDAL fetches the runs of one read side by side and counts one request for them.
    """

    opens: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    runs: float = 0
    uncounted: float = 0
    loaded: float = 0

    def add(self, other: Drivers, times: float = 1.0) -> None:
        for name, count in other.opens.items():
            self.opens[name] += count * times
        self.runs += other.runs * times
        self.uncounted += other.uncounted * times
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


def _counted(plan: StoredPlan) -> list[list[int]]:
    """Slices that stand for the plan: all as one run, or COUNTED_RUNS runs of neighbours that are spread over it."""
    number = len(plan.slices)
    length = number * COUNTED_SITES // max(plan.num_sites, 1) // COUNTED_RUNS
    if plan.num_sites <= COUNTED_SITES or number <= COUNTED_RUNS * max(length, 1):
        return [list(range(number))]
    length = max(length, 1)
    starts = [round(i * (number - length) / (COUNTED_RUNS - 1)) for i in range(COUNTED_RUNS)]
    return [list(range(start, start + length)) for start in starts]


def _sampled(config: BuildConfig, plan: StoredPlan, shards: dict[str, PlannedShard], sites: int) -> PlannedShard:
    """The first sites of some counted slices, in the order of a build, as one shard."""
    counted = list(itertools.chain.from_iterable(_counted(plan)))
    numbers = [counted[i] for i in spread(len(counted), SAMPLED_SLICES)]
    found, spares = list[SiteRecord](), dict[str, Any]()
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
    """What the whole build does: the counted slices' shards dealt to processes as they come. What is not counted costs per site what
    the second half of each counted run did, when files that all sites share were open."""
    processes = {task: [_Process(config, files) for _ in range(workers)] for task in range(tasks)}
    found, steady = Drivers(), Drivers()
    turn: Counter[int] = Counter()
    done = late = 0
    for run in _counted(plan):
        half, seen = sum(sum(plan.slices[number].sites) for number in run) / 2, 0
        for number in run:
            task = number % tasks
            for shard in _loaded(config, plan, shards, number):
                process = processes[task][turn[task] % workers]
                turn[task] += 1
                for record in shard.records:
                    process.read(record)
                    cost, seen = process.taken(), seen + 1
                    found.add(cost)
                    if seen > half:
                        steady.add(cost)
                        late += 1
        done += seen
    found.add(steady, (plan.num_sites - done) / max(late, 1))
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
                self._fetch(asset, (0, grid.height, 0, grid.width), grid, (block_h, block_w), size)
            window = self._window(record, asset, grid)
            if window is not None:
                runs = self._fetch(asset, window, grid, (block_h, block_w), size)
                self.found.runs += len(runs)
                self.found.uncounted += max(len(runs) - 1, 0)
                self.found.loaded += sum(runs) * size

    def taken(self) -> Drivers:
        """What was found since the last call."""
        found, self.found = self.found, Drivers()
        return found

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

    def _fetch(self, asset: Asset, window: Any, grid: Grid, block: tuple[int, int], size: int) -> list[int]:
        """Blocks that are not in the cache, as lengths of runs that follow one another in the file; they are in it afterwards."""
        row0, row1, col0, col1 = window
        across = -(-grid.width // block[1])
        runs: list[int] = []
        last = -2
        for row in range(row0 // block[0], (row1 - 1) // block[0] + 1):
            for column in range(col0 // block[1], (col1 - 1) // block[1] + 1):
                key = (asset.href, self._open[asset.href], row, column)
                if key in self._cache:
                    self._cache.move_to_end(key)
                    continue
                place = row * across + column
                if place == last + 1:
                    runs[-1] += 1
                else:
                    runs.append(1)
                last = place
                self._cache[key] = size
                self._cached += size
                while self._cached > BLOCK_CACHE_MB << 20:
                    self._cached -= self._cache.popitem(last=False)[1]
        return runs


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
    requests = (sample.rest.requests + few.uncounted) * (times if by_site else whole.runs / few.runs)
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
