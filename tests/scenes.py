"""Tiny source files for tests: GeoTIFFs, Zarr cubes and the STAC items that describe them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import zarr
from rasterio.transform import Affine

from data_prep.geo import Grid
from data_prep.schema import MODALITIES
from data_prep.sources.items import AssetFields, make_item

S2_BANDS = MODALITIES["s2"].bands
GRID = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5300000.0), 16, 16)


def write_tiff(path: Path, pixels_CHW: np.ndarray, grid: Grid, nodata: float | None = None, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels_CHW.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": pixels_CHW.dtype,
        "nodata": nodata,
    }
    with rasterio.open(path, "w", crs=grid.crs, transform=Affine(*grid.transform), **profile, **options) as dataset:
        dataset.write(pixels_CHW)
    return str(path)


def write_cube(
    path: Path,
    pixels_TCHW: np.ndarray,
    grid: Grid,
    bands: Sequence[str],
    datetimes: Sequence[str],
    fmt: int = 3,
    **attributes: Any,
) -> str:
    group = zarr.open_group(str(path), mode="w", zarr_format=fmt)
    names = {"dimension_names": ("time", "band", "y", "x")} if fmt == 3 else {}
    array = group.create_array("data", data=pixels_TCHW, chunks=(1, *pixels_TCHW.shape[1:]), **names)
    if fmt == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["time", "band", "y", "x"]
    group.attrs.update(
        {
            "crs": grid.crs,
            "transform": list(grid.transform),
            "bands": list(bands),
            "datetimes": list(datetimes),
            **attributes,
        }
    )
    return str(path)


def s2_pixels(seed: int = 0, dates: int = 1, size: int = 16, low: int = 100, high: int = 4000) -> np.ndarray:
    """Random digital numbers uint16 [T, 10, size, size], dark enough to hold evidence when `low` is."""
    return np.random.default_rng(seed).integers(low, high, (dates, len(S2_BANDS), size, size)).astype(np.uint16)


def s1_pixels(seed: int = 0, dates: int = 1, size: int = 16) -> np.ndarray:
    """Random dB float32 [T, 2, size, size]."""
    return np.random.default_rng(seed).normal(-14, 3, (dates, 2, size, size)).astype(np.float32)


def item(name: str, assets: dict[str, AssetFields], **more: Any) -> dict[str, Any]:
    return make_item(name, assets, **more)


def write_items(folder: Path, items: Sequence[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in items:
        (folder / f"{entry['id'].replace('/', '_')}.json").write_text(json.dumps(entry))
    return str(folder)


def s2_item(
    folder: Path, name: str = "site", pixels: np.ndarray | None = None, grid: Grid = GRID, **fields: Any
) -> dict[str, Any]:
    """An item with one Sentinel-2 GeoTIFF of ten bands."""
    pixels = s2_pixels()[0] if pixels is None else pixels
    href = write_tiff(folder / f"{name}_s2.tif", pixels, grid, nodata=0)
    defaults: dict[str, Any] = {"datetime": "2021-06-01T10:00:00Z", "baseline": "03.00", "scale": 1e-4, "nodata": 0.0}
    return item(name, {"s2": AssetFields("s2", href, bands=S2_BANDS, grid=grid, **{**defaults, **fields})})
