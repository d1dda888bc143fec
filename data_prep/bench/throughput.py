"""Build throughput: sites/s and MB/s, what each stage costs alone, what the build makes of it, with 1 and 2 workers; memory.

The stages of every site are first timed alone: read (raw bytes of its files), decode (GeoTIFF and Zarr to arrays), resample and
harmonise (the rest of reading a site), encode, write (tar, checksums, index, statistics, fsync, read-back). Their sum is the
limit of one worker; the share of it that the build reaches is what planning, processes and waiting cost. What the machine itself
gives for more processes (its cores may share caches, memory and clock) is measured beside it: one process that builds shards
against as many unrelated ones at once. MB are uncompressed pixels and masks. With --scene-px a Sentinel-2 tile of that side is
made and a part of it is cut into 640 m sites.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.build import Job
    from data_prep.config import BuildConfig
    from data_prep.sources.records import SiteRecord

STAGES = ("read", "decode", "resample + harmonise", "encode", "write")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--catalog", metavar="URL", help="catalog to build (default: simulated sites)")
    parser.add_argument("--sites", type=int, default=48, metavar="N", help="simulated sites (default 48)")
    parser.add_argument("--side-m", type=int, default=640, metavar="M", help="side of a simulated site (default 640)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="worker counts (default 1 2)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="builds per worker count (default 3)")
    parser.add_argument(
        "--scene-px", type=int, metavar="PX", help="instead: sites out of one Sentinel-2 scene of this side"
    )
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from data_prep.config import BuildConfig, GridConfig, OutputConfig, ShardsConfig, SourceConfig, SplitConfig

    with tempfile.TemporaryDirectory(prefix="geoloom-bench-") as folder:
        catalog, grid = args.catalog, GridConfig()
        if args.scene_px:
            from data_prep.bench.scene import make_scene

            catalog, grid = make_scene(folder, args.scene_px), GridConfig(side_m=640, tile=True)
        elif catalog is None:
            from data_prep.simulate.write import simulate

            catalog = simulate(os.path.join(folder, "scenes"), args.sites, 0, args.side_m)
        config = BuildConfig(
            SourceConfig((catalog,)), OutputConfig(os.path.join(folder, "set")), grid, SplitConfig({"train": 1.0}),
        )  # fmt: skip
        records = _records(config, args.sites)
        if not records:
            raise UsageError(f"{catalog} lists no site")
        per_shard = max(
            len(records) // (8 * max(args.workers)), 1
        )  # enough tasks that the last one does not leave others idle
        config = dataclasses.replace(config, shards=ShardsConfig(max_samples=per_shard, order="catalog"))
        figures = alone(records, config)
        report_alone(figures)
        rounds = []
        for number in range(args.rounds):  # side by side in time: what else the machine does falls on all alike
            rounds.append(
                [
                    _in_own_process(timed_build, records, config, n, os.path.join(folder, f"w{n}-{number}"), figures)
                    for n in args.workers
                ]
            )
            for build in rounds[-1]:
                build["gain"] = rounds[-1][0]["seconds"] / build["seconds"]
                build["machine_gain"] = machine_gain(records, config, build["workers"]) if build["workers"] > 1 else 1.0
                shutil.rmtree(os.path.join(folder, f"w{build['workers']}-{number}"))
        figures["rounds"], figures["builds"] = rounds, [_median(builds) for builds in zip(*rounds)]
        report_builds(figures)
    if args.json:
        print_json(figures)
    return 0


def _records(config: BuildConfig, number: int) -> list[SiteRecord]:
    """At most `number` sites of the plan, in catalog order."""
    from data_prep.plan import read_catalogs

    return read_catalogs(config)[0][:number]


def alone(records: list[SiteRecord], config: BuildConfig) -> dict[str, Any]:
    """Seconds of every stage by itself, one site after another."""
    from data_prep.build import Job, build_shard
    from data_prep.plan import make_plan
    from data_prep.sources import read_site

    read_site(records[0], config.grid)  # imports and first-use costs are not a stage
    seconds = dict.fromkeys(STAGES, 0.0)
    pixels, seen = 0, set[str]()
    for record in records:
        start = time.perf_counter()
        _read_files(record, seen)
        seconds["read"] += time.perf_counter() - start
        decode = [0.0]
        with _timed_decoders(decode):
            start = time.perf_counter()
            site = read_site(record, config.grid)
            whole = time.perf_counter() - start
        seconds["decode"] += decode[0]
        seconds["resample + harmonise"] += whole - decode[0]
        pixels += sum(s.pixels_TCHW.nbytes + s.mask_THW.nbytes for s in site.series.values())
    plan = make_plan(records, _at(config, os.path.join(config.output.url, "alone")))
    for shard in plan.shards:  # encode and write as the build's own task times them, with reading left out
        sites = {record.key: read_site(record, config.grid) for record in shard.records}
        job = Job(shard, _at(config, os.path.join(config.output.url, "alone")), plan.fingerprint)
        _, spent = build_shard(job, lambda _: None, lambda record, grid, sites=sites: sites[record.key])  # type: ignore[misc]
        seconds["encode"] += spent["encode"]
        seconds["write"] += spent["write"] + spent["check"] + spent["commit"]
    # raw bytes are read again by decode: count them once
    seconds["decode"] = max(seconds["decode"] - seconds["read"], 0.0)
    return {"sites": len(records), "mb": pixels / 1e6, "seconds": seconds, "sum_s": sum(seconds.values())}


def _in_own_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `work` returns, done in a fresh process: with one worker as with many, memory and caches start cold."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def machine_gain(records: list[SiteRecord], config: BuildConfig, processes: int, seconds: float = 2.0) -> float:
    """How many times the work of one process that many of them do at once which share nothing but the machine: each
    builds shards of its own, into a folder of its own. No build can gain more from its workers."""
    alone_per_s = sum(_rates(records, config, 1, seconds))
    return sum(_rates(records, config, processes, seconds)) / alone_per_s


def _rates(records: list[SiteRecord], config: BuildConfig, processes: int, seconds: float) -> list[float]:
    """Sites per second of each of so many processes that work at the same time."""
    from data_prep.build import Job
    from data_prep.plan import make_plan

    context = mp.get_context("spawn")
    start, answers = context.Barrier(processes), context.SimpleQueue()
    workers = []
    for number in range(processes):
        own = _at(config, os.path.join(config.output.url, f"machine-{number}"))
        plan = make_plan(records, own)
        jobs = [Job(shard, own, plan.fingerprint) for shard in plan.shards[number::processes]]
        workers.append(context.Process(target=_build_for, args=(start, answers, jobs, seconds), daemon=True))
        workers[-1].start()
    rates = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    return rates


def _build_for(start: Any, answers: Any, jobs: list[Job], seconds: float) -> None:
    """Builds shard after shard, from the moment all processes are ready until the time is over."""
    from data_prep.build import build_shard
    from data_prep.pool import keep_memory

    keep_memory()
    build_shard(jobs[0], lambda _: None)
    start.wait()
    began, sites = time.perf_counter(), 0
    for job in itertools.cycle(jobs):
        build_shard(job, lambda _: None)
        sites += job.shard.num_sites
        if time.perf_counter() - began >= seconds:
            break
    answers.put(sites / (time.perf_counter() - began))


def timed_build(
    records: list[SiteRecord], config: BuildConfig, workers: int, url: str, figures: dict[str, Any]
) -> dict[str, Any]:
    """One build. Measured from when every worker has made a throw-away shard (before, they import) to the end, over the
    sites that were done in that time."""
    from cluster.errors import RunFailure
    from data_prep.build import Job
    from data_prep.plan import make_plan
    from data_prep.pool import run_jobs

    config = _at(config, url)
    plan = make_plan(records, config)
    jobs = [Job(shard, config, plan.fingerprint) for shard in plan.shards]
    # one small throw-away shard per worker: imports and first use of libraries are no throughput
    warm = [
        Job(dataclasses.replace(shard, records=shard.records[:1]), _at(config, url + "-warm"), "warm")
        for shard in plan.shards[:workers]
    ]
    done: list[float] = []
    start, cpu_s, peak, warming = 0.0, 0.0, 0.0, len(warm)
    stages: dict[str, float] = {}
    both = [*warm, *jobs]
    results = run_jobs(
        measured_shard, both, workers, lambda _: done.append(time.perf_counter()), [job.shard.name for job in both]
    )
    for part, spent, shard_cpu_s, rss in results:
        peak = max(peak, rss)
        if part["plan"] == "warm":
            warming -= 1
            start = time.perf_counter()
            continue
        cpu_s += shard_cpu_s
        for stage, value in spent.items():
            stages[stage] = stages.get(stage, 0.0) + value
    if warming:
        raise RunFailure(f"{len(jobs)} shards are too few for {workers} workers: more --sites")
    counted = sum(moment > start for moment in done)
    seconds = (time.perf_counter() - start) * len(records) / counted  # as if all had been done at that rate
    limit = figures["sum_s"] / min(workers, os.cpu_count() or 1)
    return {
        "workers": workers, "seconds": seconds, "cpu_s": cpu_s, "sites_per_s": len(records) / seconds, "mb_per_s": figures["mb"] / seconds,
        "share_of_limit": limit / seconds, "stages_s": stages, "peak_rss_mb": peak, "shards": len(plan.shards),
    }  # fmt: skip


def report_alone(figures: dict[str, Any]) -> None:
    print(f"{figures['sites']} sites, {figures['mb']:.0f} MB of pixels and masks; every stage alone, one core:")
    for stage, value in figures["seconds"].items():
        rate = figures["mb"] / value if value else float("inf")
        print(f"  {stage:<22}{value:8.2f} s  {value / figures['sum_s']:5.0%}   {rate:8.0f} MB/s")
    print(f"  {'sum of parts':<22}{figures['sum_s']:8.2f} s          {figures['mb'] / figures['sum_s']:8.0f} MB/s")


def report_builds(figures: dict[str, Any]) -> None:
    print(f"medians of {len(figures['rounds'])} rounds:")
    for build in figures["builds"]:
        machine = f" (machine ×{build['machine_gain']:.2f})" if build["workers"] > 1 else ""
        print(
            f"build, {build['workers']} workers: {build['seconds']:.2f} s  {build['sites_per_s']:.2f} sites/s  "
            f"{build['mb_per_s']:.0f} MB/s  {build['share_of_limit']:.0%} of the limit  "
            f"×{build['gain']:.2f}{machine}  CPU {build['cpu_s']:.2f} s  peak {build['peak_rss_mb']:.0f} MB per worker"
        )


def _median(builds: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Figure by figure; the time per stage, a table in itself, of the build in the middle."""
    middle = sorted(builds, key=lambda build: build["seconds"])[len(builds) // 2]
    return {k: statistics.median(b[k] for b in builds) if isinstance(v, float) else v for k, v in middle.items()}


def _at(config: BuildConfig, url: str) -> BuildConfig:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, url=url))


def _read_files(record: SiteRecord, seen: set[str]) -> None:
    """Every byte of a site's files, once; files of a scene that an earlier site shared are not read again."""
    for href in dict.fromkeys(asset.href for asset in record.assets):
        path = href.removeprefix("file://")
        if path in seen:
            continue
        seen.add(path)
        files = [path] if os.path.isfile(path) else [os.path.join(d, f) for d, _, names in os.walk(path) for f in names]
        for name in files:
            with open(name, "rb", buffering=0) as stream:
                while stream.read(8 << 20):
                    pass


@contextlib.contextmanager
def _timed_decoders(total: list[float]) -> Iterator[None]:
    """Adds up the time inside the cubes' read methods (raster and Zarr)."""
    from data_prep.sources.raster import RasterCube
    from data_prep.sources.zarr_cube import ZarrCube

    methods = [
        (cube, name) for cube in (RasterCube, ZarrCube) for name in ("__init__", "read", "read_valid", "read_cloud")
    ]
    originals = [getattr(cube, name) for cube, name in methods]
    depth = [0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    total[0] += time.perf_counter() - start

        return call

    for (cube, name), original in zip(methods, originals):
        setattr(cube, name, timed(original))
    try:
        yield
    finally:
        for (cube, name), original in zip(methods, originals):
            setattr(cube, name, original)


def measured_shard(job: Job, report: Callable[[Any], None]) -> tuple[dict[str, Any], dict[str, float], float, float]:
    """`build_shard`, the CPU seconds it took, and the peak resident MB of the process that ran it (VmHWM: unlike ru_maxrss,
    not the parent's)."""
    from data_prep.build import build_shard

    before = time.process_time()
    part, seconds = build_shard(job, report)
    cpu_s = time.process_time() - before
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return part, seconds, cpu_s, peak / 1024
