"""What the pixels of an asset say, from a bounded, deterministic sample of the *whole* asset, the same for audit and build.

A site may be a small window of a large scene, too small or too bright to judge by itself; so evidence belongs to the asset and
is computed once per process, however many sites are cut from it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from data_prep.geo import Grid, Window
from data_prep.harmonise import Evidence, dark_floors, judge
from data_prep.sources.cube import Cube
from data_prep.sources.records import Asset

# Up to this many pixels per layer and date are read whole (a Major-TOM cell has 1.1 M); larger ones in 16 blocks.
WHOLE_PIXELS = 1_500_000
BLOCK_PX = 256
BLOCKS_PER_SIDE = 4
MAX_DATES = 400


@dataclass(frozen=True)
class Floors:
    """Dark floors of one group of dates: DN per band, pixels behind them, and the share of zeros."""

    by_band: dict[str, int]
    pixels: int
    zero_share: float

    def judge(self) -> Evidence:
        return judge(self.by_band, self.pixels)


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


def floors_of(cube: Cube, dates: list[int]) -> Floors:
    """Dark floors over the pooled pixels of `dates`: one dark date proves that none of them carries the offset."""
    histograms: dict[str, np.ndarray] = {}
    chosen = [dates[i] for i in spread(len(dates), MAX_DATES)]
    for number, layer in enumerate(cube.layers):
        for window in sample_windows(layer.grid):
            for date in chosen:
                raw_CHW = cube.read(date, number, window)
                for band, plane in zip(layer.bands, raw_CHW):
                    counts = _histogram(plane)
                    histograms[band] = histograms[band] + counts if band in histograms else counts
    floors, pixels = dark_floors(histograms)
    total = sum(int(h.sum()) for h in histograms.values())
    zeros = sum(int(h[0]) for h in histograms.values())
    return Floors(floors, pixels, zeros / total if total else 0.0)


def backscatter_sample(cube: Cube) -> np.ndarray:
    """Finite Sentinel-1 numbers of a few dates, for telling dB from linear."""
    parts = []
    for date in spread(len(cube.dates), 8):
        for window in sample_windows(cube.layers[0].grid)[:4]:
            raw = cube.read(date, 0, window)
            parts.append(raw[np.isfinite(raw) & (raw != 0)].astype(np.float64))
    return np.concatenate(parts) if parts else np.empty(0)


def _histogram(plane: np.ndarray) -> np.ndarray:
    if plane.dtype.kind == "f":
        plane = np.nan_to_num(plane, nan=0.0, posinf=0.0, neginf=0.0)
    return np.bincount(np.clip(plane, 0, 65535).astype(np.int64).ravel(), minlength=65536)


class EvidenceCache:
    """Per process: floors by (asset, dates), so that the tiles of one scene are judged alike and once."""

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._known: dict[tuple[tuple[Asset, ...], tuple[int, ...]], Floors] = {}

    def floors(self, assets: tuple[Asset, ...], cube: Cube, dates: list[int]) -> Floors:
        key = (assets, tuple(dates))
        if key not in self._known:
            if len(self._known) >= self._size:
                self._known.pop(next(iter(self._known)))
            self._known[key] = floors_of(cube, dates)
        return self._known[key]


@functools.cache
def shared_cache() -> EvidenceCache:
    return EvidenceCache()
