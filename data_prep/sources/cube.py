"""The one protocol of all readers: a cube is one modality of one site as stored, with dates, bands and pixel grids.

Readers return raw numbers; harmonisation and resampling happen once, in `read.py`, for every format alike.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window
from data_prep.sources.records import Asset, SourceFault


@dataclass(frozen=True)
class DateInfo:
    """One acquisition. `offset_dn`: the offset written beside the pixels (None: not said)."""

    datetime: str
    product_id: str = ""
    baseline: str = ""
    orbit: str = ""
    offset_dn: float | None = None
    relative_orbit: int = 0


@dataclass(frozen=True)
class Layer:
    """Bands that share a pixel grid (Sentinel-2 has three of them) and what is declared of their numbers.

    asset: speaks for their scale, offset and nodata; None = the cube's does.
    """

    bands: tuple[str, ...]
    grid: Grid
    asset: Asset | None = None


class Cube(Protocol):
    """An opened source. `asset` is its first asset and names it in faults.

    `cloud` is the grid of the validity codes, None if the source has none. A reader inherits from this: what it does not have
    (a mask of its own, overviews) it leaves as it is here.
    """

    asset: Asset
    dates: list[DateInfo]
    layers: list[Layer]
    cloud: Grid | None

    @abc.abstractmethod
    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        """Raw numbers [bands of the layer, h, w] of one date. Raises ReadFault for unreadable bytes."""

    def read_valid(self, date: int, layer: int, window: Window) -> np.ndarray | None:
        """The file's own validity (alpha, internal mask) as bool [h, w]; None if it has none."""
        return None

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        """Validity codes uint8 [h, w] on the `cloud` grid: NODATA, CLEAR, CLOUD."""
        raise SourceFault(self.asset.id, "has no cloud mask")

    def read_overview(self, date: int, layer: int, band: str) -> np.ndarray | None:
        """One band, whole, at its smallest stored overview: raw numbers [h, w]; None if the source keeps none."""
        return None

    def nodata_of(self, layer: int) -> float | None:
        """The nodata value the file itself declares for a layer."""
        return self.asset.nodata

    def speaker(self, layer: int) -> Asset:
        """The asset that speaks for a layer's numbers."""
        return self.layers[layer].asset or self.asset

    def close(self) -> None:
        return None
