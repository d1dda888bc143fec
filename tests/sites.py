"""Small random sites and shard sets, made without any source: for tests of what stands behind the `SiteArrays` seam."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from cluster import storage
from data_prep.config import BuildConfig, CodecsConfig
from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA, Series, SiteArrays
from data_prep.shards import ShardWriter
from data_prep.sources.records import Asset, SiteRecord

CLASSES = {"scene": ["water", "forest", "crop", "city"], "landcover": ["water", "forest", "crop", "city"]}
EAST, NORTH = 500_000.0, 5_200_000.0  # EPSG:32633, near Graz


def make_site(
    key: str = "site_0", seed: int = 0, modalities: Sequence[str] = ("hr", "s2", "s1"), dates: int = 3, side_px: int = 16,
    hr_px: int = 64, cell: str = "433D_629L", place: tuple[float, float] = (0.0, 0.0), labels: bool = True,
) -> SiteArrays:  # fmt: skip
    """A site of `side_px` 10 m pixels with random but valid content (clouds and nodata included).

    place: offset in metres east and south of a fixed point in UTM 33 north.
    """
    rng = np.random.default_rng([seed, 7])
    side_m = side_px * 10.0
    x, y = EAST + place[0], NORTH - place[1]
    series = {
        name: make_series(name, rng, dates, hr_px if name == "hr" else side_px, (x, y), side_m) for name in modalities
    }
    lon, lat = 15.0 + place[0] / 76_000, 46.95353 - place[1] / 111_200
    site = SiteArrays(
        key,
        "EPSG:32633",
        (lon, lat - side_m / 111_200, lon + side_m / 76_000, lat),
        (x, y - side_m, x + side_m, y),
        series,
        cell,
    )
    if labels:
        site.scalars = {"scene": int(rng.integers(0, 4))}
        site.rasters = {"landcover": rng.integers(-1, 4, (side_px, side_px)).astype(np.int16)}
        site.classes = CLASSES
    return site


def make_series(
    name: str, rng: np.random.Generator, dates: int, side_px: int, corner: tuple[float, float], side_m: float
) -> Series:
    """Random pixels of one modality: smooth gradients plus noise, so that codecs have something to do."""
    spec = MODALITIES[name]
    dates = dates if spec.is_series else 1
    shape = (dates, len(spec.bands), side_px, side_px)
    gradient = np.add.outer(np.arange(side_px), np.arange(side_px)) / (2 * side_px)
    mask = rng.choice(np.array([NODATA, CLEAR, CLOUD], np.uint8), (dates, side_px, side_px), p=[0.05, 0.85, 0.1])
    if name == "hr":
        mask[...] = CLEAR
        pixels = (gradient * 200 + rng.integers(0, 40, shape)).astype(np.uint8)
    elif name == "s2":
        pixels = (gradient * 3000 + rng.integers(1, 400, shape)).astype(np.uint16)
        pixels[np.broadcast_to((mask == NODATA)[:, None], shape)] = 0
    else:
        pixels = (gradient * 5 - 15 + rng.normal(0, 2, shape)).astype(np.float16)
        pixels[np.broadcast_to((mask == NODATA)[:, None], shape)] = np.nan
    gsd = side_m / side_px
    return Series(
        pixels, mask, [f"2021-{month + 1:02d}-{day:02d}T10:10:31Z" for month, day in zip(range(dates), range(5, 28))],
        (gsd, 0.0, corner[0], 0.0, -gsd, corner[1]), gsd, [f"{name.upper()}_{i:03d}" for i in range(dates)],
        ["ascending" if name == "s1" else ""] * dates,
        [{"offset_applied": -1000.0, "basis": "baseline 05.09", "flags": []} if name == "s2" else {}] * dates,
    )  # fmt: skip


def write_shard_set(
    url: str,
    sites: Sequence[SiteArrays],
    splits: Sequence[str] | None = None,
    per_shard: int = 4,
    codecs: CodecsConfig | None = None,
) -> str:
    """A complete shard set straight from sites, past catalog and plan; returns `url`."""
    from data_prep.merge import commit_shard, merge_parts  # the build's own last steps

    splits = splits or ["train"] * len(sites)
    config = BuildConfig() if codecs is None else BuildConfig(codecs=codecs)
    names: list[str] = []
    for split in dict.fromkeys(splits):
        members = [site for site, its in zip(sites, splits) if its == split]
        for start in range(0, len(members), per_shard):
            name = f"{split}-{start // per_shard:06d}.tar"
            stream = io.BytesIO()
            writer = ShardWriter(stream, name, split, config.codecs)
            for site in members[start : start + per_shard]:
                writer.add(site, writer.encode(site))
            sha256, _ = writer.close()
            storage.make_folder(url)
            storage.write_atomic(storage.join(url, name), stream.getvalue())
            commit_shard(url, name, split, writer, sha256, [], "test")
            names.append(name)
    merge_parts(url, names, config, "test")
    return url


def make_record(site: SiteArrays) -> SiteRecord:
    """What a catalog would say about `site`; the asset is called `KEY/data`."""
    assets = tuple(
        Asset(f"{site.key}/{name}", name, f"/nowhere/{site.key}/{name}.tif", bands=MODALITIES[name].bands)
        for name in site.series
    )
    dates = tuple(sorted({text for series in site.series.values() for text in series.datetimes}))
    return SiteRecord(
        site.key, site.cell, site.crs, site.footprint, site.bbox_wgs84, assets, dates, (), site.scalars, site.classes
    )
