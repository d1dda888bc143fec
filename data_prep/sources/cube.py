"""The one protocol of all readers: a cube is one modality of one site as stored, with dates, bands and pixel grids.

Readers return raw numbers; harmonisation and resampling happen once, in `read.py`, for every format alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.geo import Grid, Window
from data_prep.sources.records import Asset


@dataclass(frozen=True)
class DateInfo:
    """One acquisition. `offset_dn`: the offset written beside the pixels (None: not said)."""

    datetime: str
    product_id: str = ""
    baseline: str = ""
    orbit: str = ""
    offset_dn: float | None = None


@dataclass(frozen=True)
class Layer:
    """Bands that share a pixel grid (Sentinel-2 has three of them)."""

    bands: tuple[str, ...]
    grid: Grid


class Cube(Protocol):
    """An opened source. `asset` is its first asset and names it in faults.

    `cloud` is the grid of the validity codes, None if the source has none. `nodata` and `unit` are as the file declares.
    """

    asset: Asset
    dates: list[DateInfo]
    layers: list[Layer]
    cloud: Grid | None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        """Raw numbers [bands of the layer, h, w] of one date. Raises SourceFault for unreadable bytes."""
        ...

    def read_valid(self, date: int, layer: int, window: Window) -> np.ndarray | None:
        """The file's own validity (alpha, internal mask) as bool [h, w]; None if it has none."""
        ...

    def read_cloud(self, date: int, window: Window) -> np.ndarray:
        """Validity codes uint8 [h, w] on the `cloud` grid: NODATA, CLEAR, CLOUD."""
        ...

    def nodata_of(self, layer: int) -> float | None:
        """The nodata value the file itself declares for a layer."""
        ...

    def close(self) -> None: ...
