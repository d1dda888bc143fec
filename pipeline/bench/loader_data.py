"""Samples for the loader benchmark: sites of one size with natural-looking noise, as shards and as every rival's own format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from cluster import storage
from data_prep.config import BuildConfig, CodecsConfig
from data_prep.merge import commit_shard, merge_parts
from data_prep.schema import CLEAR, CLOUD, MODALITIES, Series, SiteArrays
from data_prep.shards import ShardWriter


def texture(rng: np.random.Generator, shape: tuple[int, int], octaves: int = 6) -> np.ndarray:
    """Smooth noise in [0, 1] with detail at every scale, as land has: float32 [H, W], amplitudes halved by octave."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        step = 2 ** (octaves - octave)
        size = [-(-side // step) + 1 for side in shape]
        coarse = rng.random(size, np.float32)
        for axis, side in enumerate(shape):
            at = np.arange(side) / step
            low = at.astype(int)
            part = (at - low).astype(np.float32)[:, None] if axis == 0 else (at - low).astype(np.float32)
            coarse = coarse.take(low, axis) * (1 - part) + coarse.take(low + 1, axis) * part
        total += coarse / 2**octave
    return total / 2


def make_site(number: int, hr_px: int = 512, series_px: int = 16, s2_dates: int = 20, s1_dates: int = 10) -> SiteArrays:
    """One site: hr, s2 and s1 of the same ground; the same number gives the same pixels."""
    rng = np.random.default_rng([number, 11])
    side_m = 10.0 * series_px
    series = {}
    for name, dates, side in (("hr", 1, hr_px), ("s2", s2_dates, series_px), ("s1", s1_dates, series_px)):
        spec = MODALITIES[name]
        ground = texture(rng, (side, side))
        pixels = np.empty((dates, len(spec.bands), side, side), spec.dtype)
        for t in range(dates):
            for band in range(len(spec.bands)):
                grain = rng.random((side, side), np.float32)
                value = ground + 0.03 * grain + 0.05 * t / dates
                if name == "hr":
                    pixels[t, band] = np.clip(150 * value, 0, 255)
                elif name == "s2":
                    pixels[t, band] = 1 + 3000 * value * (1 + 0.1 * band) + 30 * grain
                else:
                    pixels[t, band] = -20 + 10 * value + 2 * grain
        mask = np.full((dates, side, side), CLEAR, np.uint8)
        if name == "s2":
            mask[texture(rng, (side, side))[None].repeat(dates, 0) > 0.75] = CLOUD
        gsd = side_m / side
        days = [f"2023-{1 + t * 12 // dates:02d}-{1 + t * 7 % 28:02d}T10:00:00Z" for t in range(dates)]
        series[name] = Series(pixels, mask, sorted(days), (gsd, 0.0, 0.0, 0.0, -gsd, 0.0), gsd)
    east = 300_000.0 + 200 * side_m * (number % 200) / 100
    lon = 15.0 + 0.001 * number
    bbox = (lon, 46.9, lon + side_m / 76_000, 46.9 + side_m / 111_000)
    return SiteArrays(
        f"site_{number:06d}", "EPSG:32633", bbox, (east, 0.0, east + side_m, side_m), series, f"cell_{number}"
    )


def make_set(
    url: str,
    count: int,
    codec: str,
    per_shard: int = 64,
    hr_px: int = 512,
    series_px: int = 16,
    s2_dates: int = 20,
    s1_dates: int = 10,
) -> str:
    """A shard set of `count` sites, all members in one codec; returns its URL."""
    config = BuildConfig(codecs=CodecsConfig(hr=codec, s2=codec, s1=codec, mask=codec, label=codec))
    names = []
    for first in range(0, count, per_shard):
        name = f"train-{first // per_shard:06d}.tar"
        stream = io.BytesIO()
        writer = ShardWriter(stream, name, "train", config.codecs)
        for number in range(first, min(first + per_shard, count)):
            site = make_site(number, hr_px, series_px, s2_dates, s1_dates)
            writer.add(site, writer.encode(site))
        sha256, _ = writer.close()
        storage.make_folder(url)
        storage.write_atomic(storage.join(url, name), stream.getvalue())
        commit_shard(url, name, "train", writer, sha256, [], "benchmark")
        names.append(name)
    merge_parts(url, names, config, "benchmark")
    return url


def is_set(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()
