"""What a shard set's storage can feed, and what partial decode saves."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np


def feed(url: str, batch: int, threads: int, samples: int, step_ms: float) -> dict[str, Any]:
    """Reads pretraining batches (u, v and a local view) from `url` and says how many GPUs that keeps busy.

    Raises UsageError or RunFailure as the reader does.
    """
    from data_prep.schema import MODALITIES
    from data_prep.shards import ShardSet
    from model.config import ModelConfig
    from pipeline.config import DataConfig
    from pipeline.reader.reader import Reader

    held = {name for names in ShardSet.open(url).read_index(["modalities"])["modalities"].to_pylist() for name in names}
    model = ModelConfig(modalities=tuple(name for name in MODALITIES if name in held))
    base = DataConfig(url=url, split="")
    tried = {}
    for number in dict.fromkeys((1, threads, 2 * threads)):
        opened = time.perf_counter()
        with Reader(dataclasses.replace(base, threads=number), model, seed=0, batch_per_rank=batch) as reader:
            next(reader)
            first_s = time.perf_counter() - opened
            before, read, cpu = time.perf_counter(), reader.bytes_read, time.process_time()
            count = 0
            while count < samples:
                next(reader)
                count += batch
            wall = time.perf_counter() - before
            tried[number] = {
                "samples_per_s": count / wall, "mb_per_s": (reader.bytes_read - read) / wall / 1e6,
                "cpu_us_per_sample": 1e6 * (time.process_time() - cpu) / count, "first_batch_s": first_s,
                "faults": float(reader.faults.total),
            }  # fmt: skip
    wanted = 1000 * batch / step_ms
    best = max(tried, key=lambda n: tried[n]["samples_per_s"])
    print(f"{url}, batches of {batch} sites with u, v and {base.local_views} local view; one reader process")
    print(f"{'threads':>8}{'samples/s':>11}{'MB/s':>8}{'CPU µs/sample':>15}{'first batch s':>15}{'GPUs fed':>10}")
    for number, row in tried.items():
        row["gpus_fed"] = row["samples_per_s"] / wanted
        print(
            f"{number:>8}{row['samples_per_s']:>11.1f}{row['mb_per_s']:>8.0f}{row['cpu_us_per_sample']:>15.0f}"
            f"{row['first_batch_s']:>15.2f}{row['gpus_fed']:>10.1f}"
        )
    print(
        f"a GPU that takes {step_ms:g} ms for {batch} samples wants {wanted:.1f} samples/s: one reader process feeds "
        f"{tried[best]['gpus_fed']:.1f} of them ({best} threads), and each GPU has a reader of its own\n",
        flush=True,
    )
    return {
        "storage": {
            "url": url,
            "threads": {str(n): row for n, row in tried.items()},
            "best_threads": best,
            "step_ms": step_ms,
        }
    }


def partial_decode(repeats: int = 5) -> dict[str, float]:
    """CPU of one view (20 of 65 s2 dates, a 512² crop of a 2048² hr tile) against decoding all of both members, medians."""
    from data_prep.codec import encode, open_member
    from pipeline.bench.loader_data import make_site

    site = make_site(1, hr_px=2048, series_px=64, s2_dates=65, s1_dates=1)
    hr, s2 = (encode(site.series[name].pixels_TCHW, "b2nd-lz4") for name in ("hr", "s2"))
    rng, whole, part = np.random.default_rng(0), [], []
    out_hr, out_s2 = np.empty((3, 512, 512), np.uint8), np.empty((20, 10, 64, 64), np.uint16)
    full_hr, full_s2 = np.empty((3, 2048, 2048), np.uint8), np.empty((65, 10, 64, 64), np.uint16)
    for _ in range(repeats):
        began = time.thread_time()
        open_member(hr, "b2nd").read_date(0, full_hr)
        series = open_member(s2, "b2nd")
        for t in range(65):
            series.read_date(t, full_s2[t])
        whole.append(time.thread_time() - began)
        y, x = (int(32 * v) for v in rng.integers(0, 49, 2))  # any place on the 10 m grid: 32 px of 0.3125 m
        dates = np.sort(rng.permutation(65)[:20])
        began = time.thread_time()
        open_member(hr, "b2nd").read_window(0, y, y + 512, x, x + 512, out_hr)
        series = open_member(s2, "b2nd")
        for n, t in enumerate(dates):
            series.read_date(int(t), out_s2[n])
        part.append(time.thread_time() - began)
    all_ms, part_ms = 1e3 * float(np.median(whole)), 1e3 * float(np.median(part))
    return {"all_ms": all_ms, "part_ms": part_ms, "share": part_ms / all_ms}
