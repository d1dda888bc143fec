"""Catalog → shards. Each shard is one idempotent task: temporary name → check → commit; a re-run does only what is missing.

Layout of an output folder:
    {split}-{000000}.tar, index.parquet, manifest.json, faults.jsonl
    _build/plan.json, plan/              the plan, made once (data_prep.planfile); another plan is refused
    _build/{split}-{000000}.json         written last: this shard is finished (with .index.parquet and .stats.parquet)
    _build/slice-{000000}.json           all shards of a slice are finished: one part instead of theirs (data_prep.merge)
    _build/removed.json                  what `remove` took out, and a build leaves out

Two builders with the same plan may work on one output at the same time: they make the same bytes and each commit is atomic.
Two with different plans may not: the second is refused before it writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.errors import RunFailure, UsageError
from cluster.progress import Progress
from data_prep import merge, parts, planfile, planslices
from data_prep.commit import FULL, check_written, commit, storage_failure, sweep, temporary
from data_prep.config import BuildConfig, GridConfig
from data_prep.executors import Executor, run_units
from data_prep.parts import State
from data_prep.plan import PlannedShard, make_plan, read_catalogs
from data_prep.planfile import StoredPlan
from data_prep.planslices import ShardRef
from data_prep.prepare.spares import Spares, read_with_spares
from data_prep.removed import read_removed, skipped_keys
from data_prep.sample import SampleError
from data_prep.schema import CLEAR, MODALITIES, SiteArrays
from data_prep.shards import FAULTS, MANIFEST, ShardWriter
from data_prep.sources import read_site
from data_prep.sources.records import SiteRecord, SourceFault
from data_prep.split import cell_of

Read = Callable[[SiteRecord, GridConfig], SiteArrays]


@dataclass(frozen=True)
class Job:
    """One shard to make; crosses to a worker process.

    shard: with its sites, or where they are to be read; plan: what its part carries; slice: its number; removed: keys that were taken
    out of it, and stay out.
    """

    shard: PlannedShard | ShardRef
    config: BuildConfig
    plan: str
    slice: int = 0
    removed: frozenset[str] = frozenset()


@dataclass
class Outcome:
    """What a build (or one task of it) did.

    Attributes:
        manifest: of the finished set; None while other tasks' shards are missing.
        parts: part JSON of every finished shard of this task.
        faults: of this task's shards (of all, once merged), and of the plan.
        seconds: spent per stage over all workers.
    """

    plan: StoredPlan
    manifest: dict[str, Any] | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    built: int = 0


def build(
    config: BuildConfig, task: int = 0, tasks: int = 1, retry_faults: bool = False, executor: Executor | None = None
) -> Outcome:
    """Makes this task's shards that are not finished yet, and merges if then every shard of the plan is.

    Args:
        task, tasks: slice number n of the plan belongs to task n mod tasks.
        retry_faults: make shards with faults again (their source has been mended).
        executor: who makes the shards; None: processes of this machine, as many as config.workers.

    Raises:
        UsageError: empty catalog, an output that holds another build.
        RunFailure: disk full, a dead worker, no usable sample. Finished shards stay.
    """
    if not config.output.url:
        raise UsageError("output.url is empty; say where the shards go: output.url=PATH or s3://BUCKET/PREFIX")
    return build_plan(config, find_plan(config, shared=tasks > 1), task, tasks, retry_faults, executor)


def build_plan(
    config: BuildConfig, plan: StoredPlan, task: int = 0, tasks: int = 1, retry_faults: bool = False,
    executor: Executor | None = None,
) -> Outcome:  # fmt: skip
    """`build` of a plan that stands."""
    url = config.output.url
    outcome = Outcome(plan, faults=list(plan.faults))
    state, removed = State.look(url, plan.fingerprints), read_removed(url)
    skipped_keys(config.source.skip)  # said now, not by every shard
    jobs: list[Job] = []
    for number in range(task, len(plan.slices), tasks):
        held = state.parts_of(number, plan.slices[number].names)
        redo = [part is None or (retry_faults and bool(part["faults"])) for part in held]
        if any(redo) and state.is_rolled(number):  # its statistics are one sum: the slice is made again
            parts.unroll(url, number)
            redo = [True] * len(redo)
        for index, (part, again) in enumerate(zip(held, redo)):
            if again:
                ref, mark = plan.ref(url, number, index), plan.origin_of(number).fingerprint
                jobs.append(Job(ref, config, mark, number, frozenset(removed.get(ref.name, ()))))
            elif part is not None:
                outcome.parts.append(part)
                outcome.faults += part["faults"]
    try:
        planned = sum(sum(its.sites) for its in plan.slices[task::tasks])
        _run(jobs, config, outcome, executor or Executor(workers=config.workers), resumed=planned)
        state = State.look(url, plan.fingerprints)
        for number in range(task, len(plan.slices), tasks):
            state.roll_up(number, plan.slices[number].names)
        if state.complete([its.names for its in plan.slices]):
            outcome.manifest = finish(config, plan)
            outcome.faults = [*plan.faults, *_faults_of(url, plan)]
    except OSError as error:
        raise storage_failure(url, error) from None
    return outcome


def find_plan(config: BuildConfig, shared: bool = False) -> StoredPlan:
    """The stored plan of a config, made now if there is none yet (by one of the tasks only, if it is `shared`).

    Raises UsageError: empty catalog, an output that holds another build.
    """
    url, inputs = config.output.url, planfile.inputs_of(config)
    held = planfile.read_plan(url)
    if held is not None and inputs and held.inputs == inputs:
        return held
    if not shared:
        return _make_plan(config, inputs)
    with planfile.lease(url) as mine:
        held = planfile.read_plan(url)  # made while we waited
        if held is not None and inputs and held.inputs == inputs:
            return held
        if mine:
            return _make_plan(config, inputs)
    return find_plan(config, shared)


def _make_plan(config: BuildConfig, inputs: str) -> StoredPlan:
    url = config.output.url
    if config.source.catalog and config.prepare.url:
        raise UsageError(
            "source.catalog and prepare.url are both given; a set is built from one of them: drop the other"
        )
    if config.prepare.url:
        return claim(url, planfile.plan_prepared(config, inputs), config, lambda: None)
    records, unplaced = read_catalogs(config)
    whole = make_plan(records, config, unplaced)
    slices, groups = planfile.slices_of(whole)
    plan = StoredPlan(tuple(slices), whole.fingerprint, whole.faults, whole.report, "", inputs)

    def write() -> None:
        for number, group in enumerate(groups):
            planslices.write_records(planslices.records_folder(url, plan.fingerprint), number, group)

    return claim(url, plan, config, write)


def finish(config: BuildConfig, plan: StoredPlan, allow_missing: bool = False) -> dict[str, Any]:
    """The merge of a plan whose shards are all finished. Raises as `merge.merge_parts`, and RunFailure for a full disk."""
    try:
        manifest = merge.merge_parts(
            config.output.url, plan.names, config, plan.last_fingerprint, plan.report, plan.faults, allow_missing,
            plan.fingerprints,
        )  # fmt: skip
        if "missing" not in manifest:
            sweep(config.output.url)
    except OSError as error:
        raise storage_failure(config.output.url, error) from None
    return manifest


def claim(url: str, plan: StoredPlan, config: BuildConfig, write: Callable[[], None]) -> StoredPlan:
    """Marks the output as this plan's, stores the plan and returns it, with what was appended to it; exactly one plan wins. `write`
    puts its sites in place: before plan.json, unless another plan stands there. Raises UsageError if another holds the output."""
    place = storage.join(url, parts.PARTS, planfile.PLAN)
    try:
        holder = _holder(place)
        if holder == "":
            if storage.exists(storage.join(url, MANIFEST)):
                raise UsageError(f"{url} holds a shard set without its _build folder; choose another output.url")
            write()
            if storage.create(place, planfile.plan_json(plan, config)):
                return plan
            holder = _holder(place)
        if (
            holder == plan.fingerprint
        ):  # the same sites from other files, or of an earlier version: its paths are taken over
            write()
            held = planfile.read_plan(url)
            if held is not None:
                plan = dataclasses.replace(held, prepared=plan.prepared, inputs=plan.inputs)
            storage.write_atomic(place, planfile.plan_json(plan, config))
            return plan
    except OSError as error:
        raise storage_failure(url, error) from None
    storage.remove(planslices.records_folder(url, plan.fingerprint), recursive=True)
    raise UsageError(
        f"{url} holds a build of another catalog or config (plan {holder}, this one is {plan.fingerprint}); choose another "
        "output.url, or remove that folder first"
    )


def _holder(place: str) -> str:
    """Fingerprint of the plan that holds an output; "" if none does."""
    try:
        return str(json.loads(storage.read_bytes(place))["plan"])
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (ValueError, KeyError, TypeError):
        return "damaged"


def build_shard(
    job: Job, report: Callable[[Any], None], read: Read | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Makes and commits one shard; returns its part and seconds per stage. One site is in memory at a time.

    Raises RunFailure when there is no space left.
    """
    url, name, config = job.config.output.url, job.shard.name, job.config
    prepared = isinstance(job.shard, ShardRef) and job.shard.prepared  # its sites hold only what was asked for by name
    modalities = config.source.modalities or (tuple(MODALITIES) if prepared else ())
    reading = read or functools.partial(read_site, quality=config.quality, modalities=modalities)
    shard = job.shard.load(config) if isinstance(job.shard, ShardRef) else job.shard
    leave = job.removed | skipped_keys(config.source.skip)
    clock = Stages()
    faults: list[dict[str, str]] = []
    skipped: list[str] = []
    try:
        with temporary(url, name, config.output.scratch) as local:
            with open(local, "wb") as stream:
                writer = ShardWriter(stream, name, shard.split, config.codecs)
                for record in shard.records:
                    if record.key in leave:
                        skipped.append(record.key)
                        continue
                    fault = _add_site(writer, record, config, reading, clock, shard.spares.get(record.key, {}))
                    if fault:
                        faults.append({"site": record.key, "shard": name, **fault})
                    report((1, len(faults), writer.bytes_written))
                sha256, crc32c = writer.close()
                with clock("write"):
                    stream.flush()
                    os.fsync(stream.fileno())
            with clock("check"):
                check_written(local, crc32c)
            with clock("commit"):
                if writer.rows:
                    commit(local, storage.join(url, name))
                part = parts.commit_shard(url, name, shard.split, writer, sha256, faults, job.plan, skipped)
    except OSError as error:
        # another builder of the same plan finished this shard, merged, and swept our temporary file away with the stale ones
        done = State.look(url, [job.plan]).part(name, job.slice) if isinstance(error, FileNotFoundError) else None
        if done is not None:
            return done, clock.seconds
        raise storage_failure(url, error) from None
    return part, clock.seconds


def over_budget(outcome: Outcome, config: BuildConfig) -> bool:
    """Whether more sites are faulty than the config allows."""
    listed = outcome.plan.num_sites + len(outcome.plan.faults)
    return len(outcome.faults) > config.error_budget * listed


class Stages:
    """Seconds per named stage: `with clock("read"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _add_site(
    writer: ShardWriter, record: SiteRecord, config: BuildConfig, read: Read, clock: Stages, spares: Spares
) -> dict[str, str] | None:
    """Reads, checks, encodes and writes one site; returns its fault instead if it has one."""
    try:
        with clock("read"):
            # with max_dates the reader leaves dates out by itself: none of them is missing
            site = read_with_spares(record, {} if config.grid.max_dates else spares, lambda own: read(own, config.grid))
        site.cell = cell_of(record, config.split)
        with clock("check"):
            _drop_empty(site)
        with clock("encode"):
            members = writer.encode(site)
    except (SourceFault, SampleError) as fault:
        return {"asset": fault.asset, "why": fault.why}
    except MemoryError:  # of this site: the next may be smaller, and a build that stops would stop here again
        return {"asset": record.assets[0].id, "why": "out of memory: a smaller grid.side_m, or fewer workers"}
    except Exception as error:  # whatever a damaged file makes a library do, it costs this site only, and is named
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        return {"asset": record.assets[0].id, "why": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    with clock("write"):
        writer.add(site, members)
    return None


def _drop_empty(site: SiteArrays) -> None:
    """A modality without one CLEAR pixel is absent, not zeros; dates that repeat an earlier one exactly are dropped."""
    # pixels are compared only where two dates bear the same time
    site.series = {name: series for name, series in site.series.items() if (series.mask_THW == CLEAR).any()}
    for series in site.series.values():
        if len(set(series.datetimes)) == len(series.datetimes):
            continue
        seen: dict[tuple[Any, ...], int] = {}
        for i, date in enumerate(series.datetimes):
            digest = hashlib.sha256(series.pixels_TCHW[i].tobytes() + series.mask_THW[i].tobytes()).digest()
            seen.setdefault((date, digest), i)
        keep = sorted(seen.values())
        if len(keep) == len(series.datetimes):
            continue
        series.pixels_TCHW, series.mask_THW = series.pixels_TCHW[keep], series.mask_THW[keep]
        for name in ("datetimes", "product_ids", "orbits", "decisions"):
            value = getattr(series, name)
            setattr(series, name, [value[i] for i in keep] if value else value)


def _run(jobs: list[Job], config: BuildConfig, outcome: Outcome, executor: Executor, resumed: int) -> None:
    """Runs the jobs, with a progress line; adds what they did to `outcome`."""
    if not jobs:
        return
    total = sum(job.shard.num_sites for job in jobs)
    resumed -= total
    bar = Progress(total, "build")
    limit = config.error_budget * (outcome.plan.num_sites + len(outcome.plan.faults))
    note = f"({resumed} sites already done)" if resumed else ""
    try:
        names = [job.shard.name for job in jobs]
        for part, seconds in run_units(build_shard, jobs, names, executor, lambda r: bar.advance(r[0], note)):
            if executor.kind != "local":  # remote workers report whole shards only
                bar.advance(part["samples"] + len(part["faults"]), note)
            outcome.built += 1
            outcome.parts.append(part)
            outcome.faults += part["faults"]
            for stage, value in seconds.items():
                outcome.seconds[stage] = outcome.seconds.get(stage, 0.0) + value
            if len(outcome.faults) >= config.max_faults and len(outcome.faults) > limit:
                raise RunFailure(
                    f"{len(outcome.faults)} faulty sites, past error_budget={config.error_budget}: stopped; last: "
                    f"{outcome.faults[-1]['site']}: {outcome.faults[-1]['why']}"
                )
    finally:
        bar.close()


def _faults_of(url: str, plan: StoredPlan) -> list[dict[str, Any]]:
    lines = storage.read_bytes(storage.join(url, FAULTS)).splitlines()
    return [json.loads(line) for line in lines][len(plan.faults) :]
