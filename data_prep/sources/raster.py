"""GeoTIFF and COG through rasterio, from any fsspec URL, always by window. One cube = one date, in one file or one per band."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterWindow

from cluster.storage import filesystem, is_local, local_path
from data_prep.geo import Grid, Window, crs_name
from data_prep.harmonise import SCL_CLOUD, SCL_NODATA
from data_prep.schema import CLEAR, CLOUD, NODATA
from data_prep.sources.cube import DateInfo, Layer
from data_prep.sources.records import Asset, SourceFault

MAX_OPEN = 40
# GDAL's block cache defaults to 5 % of the machine's memory, per process; this holds one row of blocks of a Sentinel-2 tile.
os.environ.setdefault("GDAL_CACHEMAX", "192")
# `raster_grid` refuses a file without a georeference in one line, and patches are allowed to have none
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def open_raster(href: str, name: str) -> Any:
    """A rasterio dataset of a local path or any fsspec URL. Raises SourceFault if it cannot be opened as a raster."""
    try:
        if is_local(href):
            return rasterio.open(local_path(href))
        fs, path = filesystem(href)
        return rasterio.open(path, opener=fs)
    except FileNotFoundError:
        raise SourceFault(name, f"{href} does not exist") from None
    except (RasterioError, OSError, ValueError) as error:
        missing = is_local(href) and not filesystem(href)[0].exists(local_path(href))
        why = f"{href} does not exist" if missing else f"{href} cannot be read as a raster: {first_line(error)}"
        raise SourceFault(name, why) from None


class _OpenRasters(threading.local):
    """Open datasets of this thread, most recently used last: the tiles of one scene share handles and decoded blocks."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.held: OrderedDict[tuple[str, tuple[int, int]], Any] = OrderedDict()


_open_rasters = _OpenRasters()


def borrow_raster(asset: Asset) -> Any:
    """A dataset that stays open after use, at most MAX_OPEN per thread; a local file that changed is opened anew.

    GDAL handles belong to one thread and do not survive a fork, so neither does this cache.
    """
    cache = _open_rasters
    if cache.pid != os.getpid():
        cache.pid, cache.held = os.getpid(), OrderedDict()
    key = (f"{asset.href}#{asset.member}", _signature(asset.href))
    if key in cache.held:
        cache.held.move_to_end(key)
        return cache.held[key]
    if asset.format == "parquet_raster":
        from data_prep.sources.majortom_parquet import open_cell  # reads through this module's helpers

        dataset = open_cell(asset.href, asset.member, asset.id)
    else:
        dataset = open_raster(asset.href, asset.id)
    cache.held[key] = dataset
    if len(cache.held) > MAX_OPEN:
        cache.held.popitem(last=False)[1].close()
    return dataset


def _signature(href: str) -> tuple[int, int]:
    """Modification time and size of a local file; (0, 0) where absent or remote."""
    if not is_local(href):
        return 0, 0
    try:
        status = os.stat(local_path(href))
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def raster_grid(dataset: Any, name: str) -> Grid:
    """The pixel grid of an open dataset. Raises SourceFault without a CRS or with an empty transform."""
    if dataset.crs is None:
        raise SourceFault(name, "has no coordinate reference system; give one in the catalog (proj:code) or the file")
    if dataset.transform.is_identity:
        raise SourceFault(name, "has no geotransform; give one in the catalog (proj:transform) or the file")
    return Grid(crs_name(dataset.crs.to_wkt()), tuple(dataset.transform)[:6], dataset.width, dataset.height)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RasterCube:
    """One date of one modality: a multi-band file, or one file per band, each band on its own grid.

    Args:
        assets: the files; bands are named by the assets.
        wanted: band names to offer; the others are left in the files.
        cloud: a cloud or SCL raster of the same date.
    """

    def __init__(self, assets: list[Asset], wanted: tuple[str, ...], cloud: Asset | None = None) -> None:
        self.asset = assets[0]
        self._places: dict[str, tuple[Any, int, Asset]] = {}
        self.dates = [DateInfo(self.asset.datetime, self.asset.product_id, self.asset.baseline, self.asset.orbit)]
        for asset in assets:
            if set(asset.bands) & set(wanted):
                self._add(asset)
        missing = [band for band in wanted if band not in self._places]
        if missing:
            held = ", ".join(band for asset in assets for band in asset.bands) or "none"
            raise SourceFault(self.asset.id, f"has no band {missing[0]}; it holds {held}")
        self.layers = self._layers(wanted)
        self._cloud = borrow_raster(cloud) if cloud is not None else None
        self._cloud_is_scl = cloud is not None and cloud.modality == "scl"
        self.cloud = self._grid_of(self._cloud, cloud) if cloud is not None else None

    def _add(self, asset: Asset) -> None:
        dataset = borrow_raster(asset)
        if len(asset.bands) != dataset.count:
            raise SourceFault(
                asset.id, f"the catalog names {len(asset.bands)} bands, the file has {dataset.count}: {asset.href}"
            )
        for index, band in enumerate(asset.bands, start=1):
            self._places.setdefault(band, (dataset, index, asset))

    def _grid_of(self, dataset: Any, asset: Asset) -> Grid:
        placed = dataset.crs is not None and not dataset.transform.is_identity
        if not placed and asset.grid is not None and asset.grid.shape == (dataset.height, dataset.width):
            return asset.grid
        return raster_grid(dataset, asset.id)

    def _layers(self, wanted: tuple[str, ...]) -> list[Layer]:
        groups: dict[tuple[Grid, int | None], list[str]] = {}
        for band in wanted:
            dataset, _, asset = self._places[band]
            # one layer may span files only where each holds a single band
            groups.setdefault((self._grid_of(dataset, asset), None), []).append(band)
        return [Layer(tuple(bands), grid) for (grid, _), bands in groups.items()]

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        by_file: dict[int, tuple[Any, Asset, list[tuple[int, int]]]] = {}
        bands = self.layers[layer].bands
        for position, band in enumerate(bands):
            dataset, index, asset = self._places[band]
            by_file.setdefault(id(dataset), (dataset, asset, []))[2].append((position, index))
        out: np.ndarray | None = None
        for dataset, asset, places in by_file.values():
            block = self._read(dataset, asset, [index for _, index in places], window)
            if len(by_file) == 1:
                return block
            if out is None:
                out = np.empty((len(bands), *block.shape[1:]), dtype=block.dtype)
            elif out.dtype != block.dtype:
                out = out.astype(np.result_type(out.dtype, block.dtype))
            out[[position for position, _ in places]] = block
        assert out is not None
        return out

    def read_valid(self, date: int, layer: int, window: Window) -> np.ndarray | None:
        dataset, _, asset = self._places[self.layers[layer].bands[0]]
        flags = dataset.mask_flag_enums[0]
        if all(flag == rasterio.enums.MaskFlags.all_valid for flag in flags):
            return None
        if asset.modality != "hr" and rasterio.enums.MaskFlags.nodata in flags:
            return None  # harmonisation compares with the declared nodata itself, band by band
        try:
            return dataset.dataset_mask(window=_raster_window(window)) > 0
        except (RasterioError, OSError) as error:
            raise SourceFault(asset.id, f"corrupt mask in {asset.href}: {first_line(error)}") from None

    def read_cloud(self, date: int, window: Window) -> np.ndarray:
        assert self._cloud is not None
        values = self._read(self._cloud, self.asset, [1], window)[0]
        return scl_codes(values) if self._cloud_is_scl else np.where(values != 0, CLOUD, CLEAR).astype(np.uint8)

    @staticmethod
    def _read(dataset: Any, asset: Asset, indices: list[int], window: Window) -> np.ndarray:
        try:
            return dataset.read(indices, window=_raster_window(window))
        except (RasterioError, OSError) as error:
            raise SourceFault(
                asset.id, f"corrupt pixels in {dataset.name}: {first_line(error.__cause__ or error)}"
            ) from None

    def nodata_of(self, layer: int) -> float | None:
        """The nodata value the file itself declares for a layer's first band."""
        dataset, index, _ = self._places[self.layers[layer].bands[0]]
        return dataset.nodatavals[index - 1]

    def close(self) -> None:
        self._places = {}  # the datasets stay open for the next site of the same scene


def scl_codes(scl: np.ndarray) -> np.ndarray:
    """Validity codes of a Sentinel-2 scene classification: nodata and defective → NODATA, cloud, shadow, cirrus → CLOUD."""
    codes = _scl_table()
    return codes[np.minimum(scl.astype(np.int64), 255)]


@functools.cache
def _scl_table() -> np.ndarray:
    table = np.full(256, CLEAR, dtype=np.uint8)
    table[list(SCL_NODATA)] = NODATA
    table[list(SCL_CLOUD)] = CLOUD
    return table


def _raster_window(window: Window) -> RasterWindow:
    row0, row1, col0, col1 = window
    return RasterWindow(col0, row0, col1 - col0, row1 - row0)
