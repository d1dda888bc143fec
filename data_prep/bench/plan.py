"""What planning costs at many sites: a made-up archive of 65 + 13 images per site, metadata only, from sites to the merge.

Stages, each in a process of its own whose peak memory is measured: `sites`, `prepare` (one worker), reading one slice of the plan, rolling
up the parts of a slice, merging the parts of all shards (20 samples each, with statistics as full as real ones). With several --sites
the growth between them is printed: what a set of 21.5 million sites would take follows from it.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

SAMPLES, DATES = 20, 78
SIDE_M, SPACING_M = 640.0, 5120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sites", type=int, nargs="+", default=[10_000, 40_000], metavar="N", help="about so many sites"
    )
    parser.add_argument(
        "--folder", metavar="PATH", help="where the archive and the plan go (default: a temporary folder)"
    )
    parser.add_argument("--skip-merge", action="store_true", help="only sites, prepare and the slice")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json

    rows = []
    with tempfile.TemporaryDirectory(prefix="geoloom-bench-", dir=args.folder) as folder:
        for number in args.sites:
            rows.append(measure(os.path.join(folder, str(number)), number, not args.skip_merge))
            for stage, figures in rows[-1].items():
                print(
                    f"{number:>9} sites  {stage:<12} " + "  ".join(f"{k} {v:,.6g}" for k, v in figures.items()),
                    flush=True,
                )
    if len(rows) > 1:
        ratio = rows[-1]["sites"]["count"] / rows[0]["sites"]["count"]
        for stage in rows[-1]:
            before, after = rows[0][stage]["cpu_s"], rows[-1][stage]["cpu_s"]
            if before > 0:
                print(
                    f"growth of {stage}: CPU x{after / before:.2f} for x{ratio:.2f} sites (exponent {math.log(after / before) / math.log(ratio):.2f})"
                )
    if args.json:
        print_json({"runs": rows})
    return 0


def measure(folder: str, number: int, with_merge: bool) -> dict[str, dict[str, float]]:
    """Figures of every stage at about `number` sites."""
    os.makedirs(folder)
    found = {
        "archive": alone(make_archive, folder, number), "sites": alone(make_sites, folder, number), "prepare": alone(prepare, folder, number),
        "slice": alone(read_slice, folder, number),
    }  # fmt: skip
    if with_merge:
        found["parts"] = alone(make_parts, folder, number)
        found["merge"] = alone(merge, folder, number)
    return found


def alone(work: Callable[[str, int], dict[str, float]], folder: str, number: int) -> dict[str, float]:
    """Figures of `work(folder, number)` in a process of its own: wall and CPU seconds, peak memory, and what it returns."""
    import multiprocessing as mp

    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_alone, args=(work, folder, number, theirs))
    process.start()
    theirs.close()
    figures: dict[str, float] = ours.recv()
    process.join()
    return figures


def _alone(work: Callable[[str, int], dict[str, float]], folder: str, number: int, pipe: Any) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    found = work(folder, number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send(
        {
            **found,
            "wall_s": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu,
            "peak_mb": peak,
            "start_mb": before,
        }
    )


def bbox(number: int) -> tuple[float, float, float, float]:
    """A box at the equator with about so many sites."""
    side = math.sqrt(number) * SPACING_M / 111_320
    width = min(max(2 * side, 2.0), 340.0)
    height = number * (SPACING_M / 111_320) ** 2 / width
    return -width / 2, -height / 2, width / 2, height / 2


def config(folder: str, number: int) -> Any:
    from cluster.config import from_dict
    from data_prep.config import BuildConfig

    span = {"start": "2023-01-01", "end": "2023-12-31"}
    sensors = {
        "s2": {"source": f"{folder}/archive/s2.parquet", "collections": ["s2"], "dates": 65, "min_dates": 10, "spares": 0, **span},
        "s1": {"source": f"{folder}/archive/s1.parquet", "dates": 12, **span}, "hr": {"source": f"{folder}/archive/hr.parquet", "spares": 0},
    }  # fmt: skip
    return from_dict(
        BuildConfig,
        {
            "sites": {"url": f"{folder}/sites.parquet", "bbox": list(bbox(number)), "spacing_m": SPACING_M},
            "prepare": {"url": f"{folder}/plan", "sensors": sensors}, "grid": {"side_m": SIDE_M},
            "output": {"url": f"{folder}/set"}, "workers": 1,
        },
    )  # fmt: skip


def make_archive(folder: str, number: int) -> dict[str, float]:
    from data_prep.bench.catalogue import write_dump

    west, south, east, north = bbox(number)
    counts = write_dump(f"{folder}/archive", (west - 1, south - 1, east + 1, north + 1))
    return {f"{name}_items": float(count) for name, count in counts.items()}


def make_sites(folder: str, number: int) -> dict[str, float]:
    from data_prep.prepare.layout import lay_sites

    found = lay_sites(config(folder, number))
    return {"count": float(sum(found.sites.values())), "slices": float(found.slices)}


def prepare(folder: str, number: int) -> dict[str, float]:
    from data_prep.prepare.run import SliceJob, claim, finish, prepare_slice, read_dumps

    own = config(folder, number)
    count, mark = claim(own)
    read_dumps(own)
    for i in range(count):
        prepare_slice(SliceJob(i, own), lambda _: None)
    entries = finish(own, count, mark)["slices"]
    dates = sum(sensor["dates"] for entry in entries for sensor in entry["sensors"].values())
    size = sum(entry.stat().st_size for entry in os.scandir(f"{folder}/plan") if entry.is_file())
    return {"sites": float(sum(entry["sites"] for entry in entries)), "dates": float(dates), "plan_bytes": float(size)}


def read_slice(folder: str, number: int) -> dict[str, float]:
    """The slice as a build's task reads it: the plan, then one slice with every asset of its sites."""
    import resource

    from data_prep import planfile, planslices

    own = config(folder, number)
    start = time.perf_counter()
    plan = planfile.plan_prepared(own, "")
    planned, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time()
    piece = max(plan.slices, key=lambda its: sum(its.sites))
    opened = planslices.open_slice(planslices.ShardRef(plan.prepared, True, piece, 0), own)
    first = opened.shard(0)
    read = time.perf_counter()
    return {
        "plan_s": planned - start, "read_s": read - planned, "read_cpu_s": time.process_time() - cpu, "slice_sites": float(sum(piece.sites)),
        "read_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "shard_sites": float(len(first.records)), "shard_assets": float(sum(len(record.assets) for record in first.records)),
    }  # fmt: skip


def make_parts(folder: str, number: int) -> dict[str, float]:
    """Parts of number / 20 shards, rolled up by slice; the cost of one roll-up is measured."""
    import hashlib
    import io

    import pyarrow.parquet as pq

    from cluster import storage
    from data_prep import parts

    url, count = f"{folder}/set", number // SAMPLES
    rows, statistics, part = _template()
    per_slice = 32
    for start in range(0, count, per_slice):
        names = [f"train-{i:06d}.tar" for i in range(start, min(start + per_slice, count))]
        slice_number = start // per_slice
        if start == 0:  # as tasks leave them, then rolled up
            stream = io.BytesIO()
            pq.write_table(rows, stream, compression="zstd")
            hashes = {
                "index_sha256": hashlib.sha256(stream.getvalue()).hexdigest(),
                "stats_sha256": hashlib.sha256(statistics).hexdigest(),
            }
            for name in names:
                storage.write_atomic(parts.part_url(url, name, "index.parquet"), stream.getvalue())
                storage.write_atomic(parts.part_url(url, name, "stats.parquet"), statistics)
                storage.write_atomic(parts.part_url(url, name, "json"), parts.dump({**part, "shard": name, **hashes}))
            begin = time.perf_counter()
            parts.State.look(url, ["bench"]).roll_up(0, names)
            rolled = time.perf_counter() - begin
            found = parts.read_slice(url, 0)
            assert found is not None
            done = found
            tables = {s: storage.read_bytes(parts.part_url(url, parts.slice_name(0), s)) for s in parts.SUFFIXES[1:]}
            continue
        entry = {
            **done,
            "slice": slice_number,
            "parts": [{**p, "shard": name} for p, name in zip(done["parts"], names)],
        }
        for suffix, data in tables.items():
            if len(names) == per_slice:
                storage.write_atomic(parts.part_url(url, parts.slice_name(slice_number), suffix), data)
        if len(names) == per_slice:
            storage.write_atomic(parts.part_url(url, parts.slice_name(slice_number), "json"), parts.dump(entry))
    return {
        "shards": float(count // per_slice * per_slice),
        "roll_up_s": rolled,
        "stats_bytes": float(len(tables["stats.parquet"])),
    }


def _template() -> tuple[Any, bytes, dict[str, Any]]:
    """(index rows of one shard, its statistics, its part JSON): 20 samples of 65 + 12 + 1 dates."""
    import datetime as dt

    import numpy as np

    from data_prep import index
    from data_prep.schema import MODALITIES
    from data_prep.statistics import Histograms
    from data_prep.tar import Entry

    counts = {"s2": 65, "s1": 12, "hr": 1}
    rows = []
    for i in range(SAMPLES):
        modalities = {
            name: {
                "datetimes": [(dt.datetime(2023, 1, 1) + dt.timedelta(days=5 * t, seconds=i)).isoformat() + "Z" for t in range(n)],
                "shape": [n, len(MODALITIES[name].bands), 64, 64], "gsd_m": 10.0, "clear_fraction": [0.5 + t / 200 for t in range(n)],
                "product_ids": [f"{name.upper()}_MSIL2A_{t:03d}_{i}" for t in range(n)], "orbits": [""] * n,
                "decisions": [{"offset_applied": -1000.0, "basis": "baseline 05.09", "flags": []}] * n,
            }
            for name, n in counts.items()
        }  # fmt: skip
        info = {
            "key": f"k_{i}", "modalities": modalities, "bbox_wgs84": [10.0, 47.0, 10.01, 47.01], "crs": "EPSG:32632", "split": "train",
            "footprint": [575_000.0, 5_205_000.0, 575_640.0, 5_205_640.0], "cell": "522U_760R", "labels": [], "scalars": {},
        }  # fmt: skip
        entries = [
            Entry(f"k_{i}.{name}", 1000 * i, 512 + 1000 * i, 400, hex(i)[2:].zfill(64), i)
            for name in ("json", "hr.b2nd", "s2.b2nd", "s1.b2nd")
        ]
        rows.append(index.row_of(info, 0.2, "train-000000.tar", entries))
    table = index.table_of(rows)
    rng = np.random.default_rng(0)
    histograms = Histograms()
    for name, codes in (("hr", 256), ("s2", 9000), ("s1", 7000)):
        histograms._of(name)[:, 1 : codes - 1] += rng.integers(0, 500, (len(MODALITIES[name].bands), codes - 2))
    part = {
        "split": "train", "plan": "bench", "samples": SAMPLES, "bytes": 1, "sha256": "0" * 64, "bounds": [10.0, 47.0, 10.01, 47.01], "labels": [],
        "classes": {}, "radiometry": {f'{{"modality": "s2", "baseline": "0{i}.00"}}': 65 for i in range(4)}, "faults": [],
    }  # fmt: skip
    return table, histograms.to_bytes(), part


def merge(folder: str, number: int) -> dict[str, float]:
    from data_prep.merge import merge_parts

    shards = number // SAMPLES // 32 * 32
    manifest = merge_parts(
        f"{folder}/set", [f"train-{i:06d}.tar" for i in range(shards)], config(folder, number), "bench"
    )
    return {"samples": float(manifest["counts"]["samples"]), "index_bytes": float(manifest["index"]["bytes"])}
