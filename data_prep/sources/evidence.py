"""What the pixels of an asset say, from a bounded, deterministic sample of the *whole* asset, the same for audit and build.

A site may be a small window of a large scene, too small or too bright to judge by itself; so evidence belongs to the asset and
is computed once per process, however many sites are cut from it. Each date is judged by its own pixels.

A large file whose metadata says which offset it has is only cross-checked: the smallest overview of two bands is read (vegetation
and water are dark in B04, snow and water in B12). If that contradicts the metadata, or there is no overview, the full sample is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.geo import Grid, Window
from data_prep.harmonise import LOWEST_REFLECTANCE, UNIT_TOP, Claim, Evidence, dark_floors, decide, judge
from data_prep.sources.cube import Cube
from data_prep.sources.records import Asset
from data_prep.sources.traffic import JUDGED, TRAFFIC

# Up to this many pixels per layer and date are read whole (a Major-TOM cell has 1.1 M); larger ones in 16 blocks.
WHOLE_PIXELS = 1_500_000
BLOCK_PX = 256
BLOCKS_PER_SIDE = 4
DATES_AT_ONCE = 8  # as many as a Zarr cube reads ahead
CHECK_BANDS = (
    "B04",
    "B12",
    "B10",
)  # of these an overview is enough where metadata speaks; B10 (L1C) is dark everywhere
TOP_PERCENT = 99.0


@dataclass(frozen=True)
class Floors:
    """Dark floors of one date, or of several pooled: DN per band, pixels behind them, share of zeros, and how bright it gets."""

    by_band: dict[str, int]
    pixels: int
    zero_share: float
    top: float | None = None
    is_share: bool = False

    def judge(self) -> Evidence:
        return judge(self.by_band, self.pixels, self.top, self.is_share)


@dataclass
class _Counts:
    """Histograms of one date; of decimals also how large they are, block by block, and whether they are shares of 1."""

    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    tops: list[float] = field(default_factory=list)
    shares: list[bool] = field(default_factory=list)

    def add(self, bands: Sequence[str], raw_CHW: np.ndarray) -> None:
        share = False
        if raw_CHW.dtype.kind == "f":
            seen = raw_CHW[np.isfinite(raw_CHW) & (raw_CHW > LOWEST_REFLECTANCE) & (raw_CHW != 0)]
            if seen.size:
                top = float(np.percentile(seen, TOP_PERCENT))
                share = top <= UNIT_TOP
                self.tops.append(top)
                self.shares.append(share)
        for band, plane in zip(bands, raw_CHW):
            counts = _histogram(plane * np.float32(10_000) if share else plane)
            self.histograms[band] = self.histograms[band] + counts if band in self.histograms else counts

    def floors(self) -> Floors:
        floors, pixels = dark_floors(self.histograms)
        total = sum(int(h.sum()) for h in self.histograms.values())
        zeros = sum(int(h[0]) for h in self.histograms.values())
        is_share = bool(self.shares) and all(self.shares)
        top = max(self.tops or [_top(h) for h in self.histograms.values()], default=0.0)
        return Floors(floors, pixels, zeros / total if total else 0.0, top or None, is_share)


def _top(histogram: np.ndarray) -> float:
    """TOP_PERCENT percentile of the non-zero pixels; 0 if there are none."""
    cumulative = np.cumsum(histogram[1:])
    return float(np.searchsorted(cumulative, cumulative[-1] * TOP_PERCENT / 100) + 1) if cumulative[-1] else 0.0


def sample_windows(grid: Grid) -> list[Window]:
    """The whole grid, or 16 blocks spread evenly over it; block corners fall on multiples of the block size (COG tiles)."""
    if grid.width * grid.height <= WHOLE_PIXELS:
        return [(0, grid.height, 0, grid.width)]
    windows = []
    for i in range(BLOCKS_PER_SIDE):
        for j in range(BLOCKS_PER_SIDE):
            row = int((i + 0.5) / BLOCKS_PER_SIDE * grid.height) // BLOCK_PX * BLOCK_PX
            col = int((j + 0.5) / BLOCKS_PER_SIDE * grid.width) // BLOCK_PX * BLOCK_PX
            windows.append((row, min(row + BLOCK_PX, grid.height), col, min(col + BLOCK_PX, grid.width)))
    return windows


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread, ends included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})


def floors_of(cube: Cube, dates: list[int], layers: Sequence[int]) -> dict[int, Floors]:
    """Dark floors per date over the sampled pixels of some layers."""
    found: dict[int, Floors] = {}
    for start in range(0, len(dates), DATES_AT_ONCE):
        chosen = dates[start : start + DATES_AT_ONCE]
        counts = {date: _Counts() for date in chosen}
        for number in layers:
            layer = cube.layers[number]
            for window in sample_windows(layer.grid):
                for date in chosen:
                    counts[date].add(layer.bands, cube.read(date, number, window))
        found |= {date: counts[date].floors() for date in chosen}
    return found


def checked_floors(cube: Cube, date: int, layers: Sequence[int]) -> Floors | None:
    """Floors of a large layer's two telling bands from their smallest overviews; None where something is small or has none."""
    counts = _Counts()
    for number in layers:
        layer = cube.layers[number]
        if layer.grid.width * layer.grid.height <= WHOLE_PIXELS:
            return None
        for band in (band for band in CHECK_BANDS if band in layer.bands):
            small = cube.read_overview(date, number, band)
            if small is None:
                return None
            counts.add((band,), small[None])
    return counts.floors() if counts.histograms else None


def pooled(floors: Sequence[Floors]) -> Evidence:
    """One verdict over several dates that are too small to be judged alone: the lowest floor, all their pixels."""
    by_band: dict[str, int] = {}
    for one in floors:
        for band, floor in one.by_band.items():
            by_band[band] = min(floor, by_band.get(band, floor))
    return judge(
        by_band, sum(one.pixels for one in floors), max((f.top for f in floors if f.top is not None), default=None)
    )


def backscatter_sample(cube: Cube) -> np.ndarray:
    """Finite Sentinel-1 numbers of a few dates, for telling dB from linear."""
    parts = []
    for date in spread(len(cube.dates), 8):
        layer = cube.layers[0]
        small = (
            cube.read_overview(date, 0, layer.bands[0]) if layer.grid.width * layer.grid.height > WHOLE_PIXELS else None
        )
        blocks = (
            [small] if small is not None else (cube.read(date, 0, window) for window in sample_windows(layer.grid)[:4])
        )
        for raw in blocks:
            parts.append(raw[np.isfinite(raw) & (raw != 0)].astype(np.float64))
    return np.concatenate(parts) if parts else np.empty(0)


def _histogram(plane: np.ndarray) -> np.ndarray:
    if plane.dtype.kind == "f":
        plane = np.nan_to_num(plane, nan=0.0, posinf=0.0, neginf=0.0)
    return np.bincount(np.clip(plane, 0, 65535).astype(np.int64).ravel(), minlength=65536)


class EvidenceCache:
    """Per process: floors by asset, date and layers, so that the tiles of one scene are judged alike and once."""

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._known: dict[tuple[tuple[Asset, ...], int, tuple[int, ...], bool], Floors] = {}

    def floors(
        self, assets: tuple[Asset, ...], cube: Cube, dates: list[int], layers: Sequence[int], claim: Claim | None = None
    ) -> dict[int, Floors]:
        """Per date; with a `claim` the cheap check comes first, and is enough where it does not contradict the claim."""
        with TRAFFIC.opening(f"{cube.asset.modality}{JUDGED}"):
            return self._floors(assets, cube, dates, layers, claim)

    def _floors(
        self, assets: tuple[Asset, ...], cube: Cube, dates: list[int], layers: Sequence[int], claim: Claim | None
    ) -> dict[int, Floors]:
        found: dict[int, Floors] = {}
        wanted = tuple(layers)
        for date in dates:
            if claim is None or claim.offset_dn is None:
                break  # nothing said that could be checked
            key = (assets, date, wanted, True)
            if key not in self._known:
                quick = checked_floors(cube, date, wanted)
                if quick is None or decide(claim, quick.judge()).flags:
                    continue
                self._keep(key, quick)
            found[date] = self._known[key]
        missing = [d for d in dates if d not in found and (assets, d, wanted, False) not in self._known]
        for date, floors in floors_of(cube, missing, wanted).items():
            self._keep((assets, date, wanted, False), floors)
            found[date] = floors
        return found | {d: self._known[(assets, d, wanted, False)] for d in dates if d not in found}

    def _keep(self, key: tuple[tuple[Asset, ...], int, tuple[int, ...], bool], floors: Floors) -> None:
        while len(self._known) >= self._size:
            self._known.pop(next(iter(self._known)))
        self._known[key] = floors


@functools.cache
def shared_cache() -> EvidenceCache:
    return EvidenceCache()
