"""Catalog → shards. Each shard is one idempotent task: temporary name → check → commit; a re-run does only what is missing.

Layout of an output folder:
    {split}-{000000}.tar, index.parquet, manifest.json, faults.jsonl
    _build/plan.json                     claimed by the first builder; another plan is refused
    _build/{split}-{000000}.json         written last: this shard is finished (with .index.parquet and .stats.parquet)

Two builders with the same plan may work on one output at the same time: they make the same bytes and each commit is atomic.
Two with different plans may not: the second is refused before it writes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.config import to_dict
from cluster.errors import RunFailure, UsageError
from cluster.progress import Progress
from data_prep import merge
from data_prep.config import BuildConfig, GridConfig
from data_prep.plan import Plan, PlannedShard, make_plan, read_catalogs
from data_prep.pool import run_jobs
from data_prep.sample import SampleError
from data_prep.schema import CLEAR, SiteArrays
from data_prep.shards import FAULTS, INDEX, MANIFEST, ShardWriter
from data_prep.sources import read_site
from data_prep.sources.records import SiteRecord, SourceFault
from data_prep.split import cell_of
from data_prep.tar import extend_crc32c

PLAN = "plan.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Read = Callable[[SiteRecord, GridConfig], SiteArrays]


@dataclass(frozen=True)
class Job:
    """One shard to make; crosses to a worker process."""

    shard: PlannedShard
    config: BuildConfig
    plan: str


@dataclass
class Outcome:
    """What a build (or one task of it) did.

    Attributes:
        manifest: of the finished set; None while other tasks' shards are missing.
        parts: part JSON of every finished shard of this task.
        faults: of this task's shards (of all, once merged), and of the plan.
        seconds: spent per stage over all workers.
    """

    plan: Plan
    manifest: dict[str, Any] | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    built: int = 0


def build(config: BuildConfig, task: int = 0, tasks: int = 1, retry_faults: bool = False) -> Outcome:
    """Makes this task's shards that are not finished yet, and merges if then every shard of the plan is.

    Args:
        task, tasks: shard number n belongs to task n mod tasks.
        retry_faults: make shards with faults again (their source has been mended).

    Raises:
        UsageError: empty catalog, an output that holds another build.
        RunFailure: disk full, a dead worker, no usable sample. Finished shards stay.
    """
    url = config.output.url
    if not url:
        raise UsageError("output.url is empty; say where the shards go: output.url=PATH or s3://BUCKET/PREFIX")
    records, unplaced = read_catalogs(config)
    plan = make_plan(records, config, unplaced)
    claim(url, plan, config)
    outcome = Outcome(plan, faults=list(plan.faults))
    mine = plan.shards[task::tasks]
    jobs = []
    for shard in mine:
        part = finished(url, shard.name, plan.fingerprint)
        if part is None or (retry_faults and part["faults"]):
            jobs.append(Job(shard, config, plan.fingerprint))
        else:
            outcome.parts.append(part)
            outcome.faults += part["faults"]
    _run(jobs, config, outcome, resumed=sum(len(s.records) for s in mine) - sum(len(j.shard.records) for j in jobs))
    if all(merge.read_part(url, name) for name in plan.names):
        outcome.manifest = finish(config, plan)
        outcome.faults = [*plan.faults, *_faults_of(url, plan)]
    return outcome


def finish(config: BuildConfig, plan: Plan) -> dict[str, Any]:
    """The merge of a plan whose shards are all finished. Raises as `merge.merge_parts`, and RunFailure for a full disk."""
    try:
        manifest = merge.merge_parts(config.output.url, plan.names, config, plan.fingerprint, plan.report, plan.faults)
        sweep(config.output.url)
    except OSError as error:
        raise _storage_failure(config.output.url, error) from None
    return manifest


def claim(url: str, plan: Plan, config: BuildConfig) -> None:
    """Marks the output as this plan's; exactly one plan wins. Raises UsageError if another holds it."""
    place = storage.join(url, merge.PARTS, PLAN)
    content = {
        "plan": plan.fingerprint, "shards": plan.names, "report": plan.report, "faults": list(plan.faults), "config": to_dict(config),
    }  # fmt: skip
    try:
        if storage.create(place, merge.dump(content)):
            if storage.exists(storage.join(url, "manifest.json")):
                storage.remove(place)
                raise UsageError(f"{url} holds a shard set without its _build folder; choose another output.url")
            return
        holder = json.loads(storage.read_bytes(place))["plan"]
    except OSError as error:
        raise _storage_failure(url, error) from None
    except (ValueError, KeyError):
        holder = "damaged"
    if holder != plan.fingerprint:
        raise UsageError(
            f"{url} holds a build of another catalog or config (plan {holder}, this one is {plan.fingerprint}); choose another "
            "output.url, or remove that folder first"
        )


def finished(url: str, name: str, plan: str) -> dict[str, Any] | None:
    """The part of a shard that is committed and whose tar has the committed size; else None."""
    part = merge.read_part(url, name)
    if part is None or part["plan"] != plan:
        return None
    if part["samples"] == 0:
        return part
    try:
        return part if storage.size(storage.join(url, name)) == part["bytes"] else None
    except FileNotFoundError:
        return None


def build_shard(
    job: Job, report: Callable[[Any], None], read: Read | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Makes and commits one shard; returns its part and seconds per stage. One site is in memory at a time.

    Raises RunFailure when there is no space left.
    """
    reading = read or functools.partial(read_site, quality=job.config.quality, modalities=job.config.source.modalities)
    url, name, config = job.config.output.url, job.shard.name, job.config
    clock = Stages()
    faults: list[dict[str, str]] = []
    try:
        with _temporary(url, name, config.output.scratch) as local:
            with open(local, "wb") as stream:
                writer = ShardWriter(stream, name, job.shard.split, config.codecs)
                for record in job.shard.records:
                    fault = _add_site(writer, record, config, reading, clock)
                    if fault:
                        faults.append({"site": record.key, "shard": name, **fault})
                    report((1, len(faults), writer.bytes_written))
                sha256, crc32c = writer.close()
                with clock("write"):
                    stream.flush()
                    os.fsync(stream.fileno())
            with clock("check"):
                _check_written(local, crc32c)
            with clock("commit"):
                if writer.rows:
                    _commit(local, storage.join(url, name))
                part = merge.commit_shard(url, name, job.shard.split, writer, sha256, faults, job.plan)
    except OSError as error:
        # another builder of the same plan finished this shard, merged, and swept our temporary file away with the stale ones
        done = finished(url, name, job.plan) if isinstance(error, FileNotFoundError) else None
        if done is not None:
            return done, clock.seconds
        raise _storage_failure(url, error) from None
    return part, clock.seconds


def sweep(url: str) -> None:
    """Removes temporary files that killed builders left. Every shard is finished, so none of a shard's can still be wanted;
    those of index, manifest and fault list may be another task's that merges at this moment."""
    if not storage.is_local(url):
        return
    folder = storage.local_path(url)
    for where in (folder, os.path.join(folder, merge.PARTS)):
        for entry in os.listdir(where):
            if entry.endswith(".tmp") and not entry.startswith((INDEX, MANIFEST, FAULTS)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(where, entry))


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
    writer: ShardWriter, record: SiteRecord, config: BuildConfig, read: Read, clock: Stages
) -> dict[str, str] | None:
    """Reads, checks, encodes and writes one site; returns its fault instead if it has one."""
    try:
        with clock("read"):
            site = read(record, config.grid)
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


def _run(jobs: list[Job], config: BuildConfig, outcome: Outcome, resumed: int) -> None:
    """Runs the jobs on the local pool, with a progress line; adds what they did to `outcome`."""
    if not jobs:
        return
    total = sum(len(job.shard.records) for job in jobs)
    workers = config.workers or int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    bar = Progress(total, "build")
    limit = config.error_budget * (outcome.plan.num_sites + len(outcome.plan.faults))
    note = f"({resumed} sites already done)" if resumed else ""
    try:
        results = run_jobs(build_shard, jobs, workers, lambda r: bar.advance(r[0], note), [j.shard.name for j in jobs])
        for part, seconds in results:
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


def _faults_of(url: str, plan: Plan) -> list[dict[str, Any]]:
    lines = storage.read_bytes(storage.join(url, FAULTS)).splitlines()
    return [json.loads(line) for line in lines][len(plan.faults) :]


@contextlib.contextmanager
def _temporary(url: str, name: str, scratch: str | None) -> Iterator[str]:
    """A local path for a tar in the making: beside its final place, or in scratch on its way to object storage."""
    if storage.is_local(url):
        folder = storage.local_path(url)
        os.makedirs(folder, exist_ok=True)
    else:
        folder = scratch or tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _commit(local: str, url: str) -> None:
    """Makes a checked tar visible under its name, whole."""
    if not storage.is_local(url):
        storage.upload(local, url)
        if storage.size(url) != os.path.getsize(local):
            raise RunFailure(f"{url} has not the size that was sent; run the command again")
        return
    target = storage.local_path(url)
    with contextlib.suppress(FileNotFoundError):  # another builder of the same plan has swept: its tar is the same
        os.replace(local, target)
    if not os.path.exists(target):
        raise RunFailure(f"{target} could not be put in place; run the command again")
    storage.fsync_folder(os.path.dirname(target))


def _check_written(path: str, crc32c: int) -> None:
    """Reads the finished file back, from the disk and not from the kernel's memory of it: what stands there is what was meant."""
    found, piece = 0, memoryview(bytearray(4 << 20))
    with open(path, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it was synced: nothing is lost
        while count := stream.readinto(piece):
            found = extend_crc32c(found, piece[:count])
    if found != crc32c:
        raise RunFailure(f"{path} reads back differently from what was written: check that disk")


def _storage_failure(url: str, error: OSError) -> RunFailure | UsageError:
    if error.errno in FULL:
        return RunFailure(f"{url}: no space left; finished shards are kept: free space and run the same command again")
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | FileNotFoundError):
        return UsageError(f"{url} cannot be written: {error.strerror or error}")
    return RunFailure(f"{url}: {type(error).__name__}: {error}")
