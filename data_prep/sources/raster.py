"""GeoTIFF, COG and JPEG 2000 through rasterio, always by window. One cube = one date, in one file or one per band."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow
import rasterio
import rasterio.session
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window as RasterWindow

from cluster.storage import filesystem, is_local, local_path
from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, crs_name
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile, check_chunk
from data_prep.sources.masks import mask_codes, told_by_numbers
from data_prep.sources.parquet import cell_bytes
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.remote import gdal_options, gdal_path, retrying, source_filesystem
from data_prep.sources.traffic import TRAFFIC

# A 60-date series of 11 band files keeps all of them open; remote files take no file descriptor, local ones at most half of ours.
MAX_OPEN = 1024
# Nothing but pixels: a VRT (whatever its name) would read the files that it names. COGs are GTiff's to read.
DRIVERS = {".jp2": "JP2OpenJPEG", ".j2k": "JP2OpenJPEG", ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
# GDAL's block cache defaults to 5 % of the machine's memory, per process; this holds one row of blocks of a Sentinel-2 tile.
BLOCK_CACHE_MB = 192
os.environ.setdefault("GDAL_CACHEMAX", str(BLOCK_CACHE_MB))
IDENTITY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION")
SMALL_PX = 512  # a mask is looked at this large to tell what its numbers mean
# `raster_grid` refuses a file without a georeference in one line, and patches are allowed to have none
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def open_raster(href: str, name: str) -> Any:
    """A rasterio dataset of a local path or any fsspec URL. Raises ReadFault if it cannot be opened as a raster."""
    try:
        with _settings(href):
            attempts = itertools.count()
            dataset = retrying(lambda: _open(href, next(attempts)), href)
        for (height, width), kind in zip(dataset.block_shapes, dataset.dtypes):
            check_chunk(href, (height, width), np.dtype(kind).itemsize)
        return dataset
    except FileNotFoundError:
        raise ReadFault(name, f"{href} does not exist") from None
    except Hostile as error:
        raise SourceFault(name, str(error)) from None
    except (RasterioError, OSError, ValueError, TypeError) as error:
        missing = is_local(href) and not filesystem(href)[0].exists(local_path(href))
        why = f"{href} does not exist" if missing else f"{href} cannot be read as a raster: {first_line(error)}"
        raise ReadFault(name, why) from None


def _open(href: str, attempt: int = 0) -> Any:
    if is_local(href):
        return _as_pixels(local_path(href))
    if path := gdal_path(href, attempt):
        return _as_pixels(path)
    fs, path = source_filesystem(href)
    return _as_pixels(path, opener=fs)


def _as_pixels(path: str, **options: Any) -> Any:
    """Opened by the driver its name suggests, else as GeoTIFF or JPEG 2000; never by any but these."""
    extension = os.path.splitext(path.lower().split("?")[0].split("#")[0])[1]
    likely = DRIVERS.get(extension, "GTiff")
    try:
        return rasterio.open(path, driver=likely, **options)
    except RasterioError as error:
        if "not recognized" not in str(error):
            raise
        return rasterio.open(path, driver="JP2OpenJPEG" if likely == "GTiff" else "GTiff", **options)


@contextlib.contextmanager
def _settings(href: str) -> Iterator[None]:
    """GDAL's settings for a remote file, which it asks for again with every request."""
    if is_local(href) or gdal_path(href) is None:
        yield
        return
    options = gdal_options(href)
    identity = {name: options.pop(name) for name in IDENTITY if name in options}
    with rasterio.Env(session=_Identity(identity) if identity else None, **options):
        yield


class _Identity(rasterio.session.Session):
    """An S3 identity as GDAL is told of it. rasterio takes none among its options, and would ask boto3 for the writer's."""

    def __init__(self, options: dict[str, str]) -> None:
        self.credentials = options

    def get_credential_options(self) -> dict[str, str]:
        return self.credentials


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
    key = _key(asset)
    if key in cache.held:
        cache.held.move_to_end(key)
        return cache.held[key]
    with TRAFFIC.opening(asset.modality, 1):
        if asset.format == "parquet_raster":
            dataset = open_cell(asset.href, asset.member, asset.id)
        else:
            dataset = open_raster(asset.href, asset.id)
    if TRAFFIC.counting:
        together = dataset.count if dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
        TRAFFIC.saw(asset.modality, dataset.block_shapes[0], together * np.dtype(dataset.dtypes[0]).itemsize)
    cache.held[key] = dataset
    while len(cache.held) > most_open():
        cache.held.popitem(last=False)[1].close()
    return dataset


def most_open() -> int:
    """How many files a thread keeps open."""
    return min(MAX_OPEN, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16))


def _forget(asset: Asset) -> None:
    """Closes a dataset: after a failed read GDAL may go on from what it half knows."""
    dataset = _open_rasters.held.pop(_key(asset), None)
    if dataset is not None:
        with contextlib.suppress(RasterioError, OSError):
            dataset.close()


def _key(asset: Asset) -> tuple[str, tuple[int, int]]:
    return f"{asset.href}#{asset.member}", _signature(asset.href)


def _signature(href: str) -> tuple[int, int]:
    """Modification time and size of a local file; (0, 0) where absent or remote."""
    if not is_local(href):
        return 0, 0
    try:
        status = os.stat(local_path(href))
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def open_cell(href: str, member: str, name: str) -> Any:
    """The GeoTIFF in one cell of a Parquet file ("row group:row:column") as a rasterio dataset. Raises ReadFault."""
    try:
        data = cell_bytes(href, member)
        if not data:
            raise ReadFault(name, f"cell {member} is empty: {href}")
        memory = MemoryFile(data)
        dataset = memory.open(driver="GTiff")
        dataset.held = (data, memory)  # GDAL reads from these bytes for as long as the dataset lives
        return dataset
    except (RasterioError, OSError, pyarrow.ArrowException, IndexError, KeyError, ValueError) as error:
        raise ReadFault(name, f"cell {member} is no raster: {href}: {first_line(error)}") from None


def raster_grid(dataset: Any, name: str) -> Grid:
    """The pixel grid of an open dataset. Raises SourceFault without a CRS or with an empty transform."""
    if dataset.crs is None and dataset.gcps[0]:
        raise SourceFault(
            name,
            "lies in the sensor's own geometry (ground control points, no grid): use a terrain-corrected product (RTC), or warp it first",
        )
    if dataset.crs is None:
        raise SourceFault(name, "has no coordinate reference system; give one in the catalog (proj:code) or the file")
    if dataset.transform.is_identity:
        raise SourceFault(name, "has no geotransform; give one in the catalog (proj:transform) or the file")
    return Grid(crs_name(dataset.crs.to_wkt()), tuple(dataset.transform)[:6], dataset.width, dataset.height)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RasterCube(Cube):
    """One date of one modality: a multi-band file, or one file per band, each band on its own grid.

    Args:
        assets: the files; bands are named by the assets. Of a band that two of them hold the first is read.
        wanted: band names to offer; the others are left in the files.
        cloud: a mask raster of the same date, of one of `records.MASKS`.
    """

    def __init__(self, assets: list[Asset], wanted: tuple[str, ...], cloud: Asset | None = None) -> None:
        self.asset = assets[0]
        self._places: dict[str, tuple[Asset, int]] = {}
        self.dates = [DateInfo(self.asset.datetime, self.asset.product_id, self.asset.baseline, self.asset.orbit)]
        for asset in assets:
            for index, band in enumerate(asset.bands):
                if band in wanted:
                    self._places.setdefault(band, (asset, index))
        missing = [band for band in wanted if band not in self._places]
        if missing:
            held = ", ".join(band for asset in assets for band in asset.bands) or "none"
            raise SourceFault(self.asset.id, f"has no band {missing[0]}; it holds {held}")
        for asset in dict.fromkeys(asset for asset, _ in self._places.values()):
            count = borrow_raster(asset).count
            if len(asset.bands) != count:
                raise SourceFault(
                    asset.id, f"the catalog names {len(asset.bands)} bands, the file has {count}: {asset.href}"
                )
        self.layers = self._layers(wanted)
        self._cloud_asset = cloud
        self._cloud_kind = ""
        self.cloud = self._grid_of(cloud) if cloud is not None else None

    @staticmethod
    def _grid_of(asset: Asset) -> Grid:
        dataset = borrow_raster(asset)
        placed = dataset.crs is not None and not dataset.transform.is_identity
        if not placed and asset.grid is not None and asset.grid.shape == (dataset.height, dataset.width):
            return asset.grid
        return raster_grid(dataset, asset.id)

    def _layers(self, wanted: tuple[str, ...]) -> list[Layer]:
        """Bands on one grid whose numbers are declared and stored alike, together."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        speakers: dict[tuple[Any, ...], Asset] = {}
        for band in wanted:
            asset, index = self._places[band]
            own, dataset = asset.of_band(index), borrow_raster(asset)
            nodata = own.nodata if own.nodata is not None else dataset.nodatavals[index]
            said = (own.scale, own.offset, own.offset_removed, None if nodata is None else str(nodata))
            key = (self._grid_of(asset), *said)
            groups.setdefault(key, []).append(band)
            speakers.setdefault(key, own)
        return [Layer(tuple(bands), key[0], speakers[key]) for key, bands in groups.items()]

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        by_file: dict[Asset, list[tuple[int, int]]] = {}
        bands = self.layers[layer].bands
        for position, band in enumerate(bands):
            asset, index = self._places[band]
            by_file.setdefault(asset, []).append((position, index + 1))
        out: np.ndarray | None = None
        for asset, places in by_file.items():
            block = _read(asset, [index for _, index in places], window=_raster_window(window))
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
        asset, _ = self._places[self.layers[layer].bands[0]]
        flags = borrow_raster(asset).mask_flag_enums[0]
        if all(flag == rasterio.enums.MaskFlags.all_valid for flag in flags):
            return None
        if asset.modality != "hr" and rasterio.enums.MaskFlags.nodata in flags:
            return None  # harmonisation compares with the declared nodata itself, band by band
        if rasterio.enums.MaskFlags.alpha in flags and not _is_mask(asset):
            return None
        return _asked(asset, lambda dataset: dataset.dataset_mask(window=_raster_window(window)) > 0, "mask")

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        asset = self._cloud_asset
        assert asset is not None
        if not self._cloud_kind:
            sample = _small(asset, 1) if asset.modality == "cloud" else np.empty(0)
            self._cloud_kind = told_by_numbers(asset.modality, sample)
        return mask_codes(_read(asset, [1], window=_raster_window(window))[0], self._cloud_kind, quality)

    def read_overview(self, date: int, layer: int, band: str) -> np.ndarray | None:
        asset, index = self._places[band]
        factors = borrow_raster(asset).overviews(index + 1)
        if not factors:
            return None
        height, width = (max(-(-side // factors[-1]), 1) for side in self.layers[layer].grid.shape)
        return _read(asset, [index + 1], out_shape=(1, height, width))[0]

    def nodata_of(self, layer: int) -> float | None:
        """The nodata value the file itself declares for a layer's first band."""
        asset, index = self._places[self.layers[layer].bands[0]]
        return borrow_raster(asset).nodatavals[index]

    def close(self) -> None:
        self._places = {}  # the datasets stay open for the next site of the same scene


def _is_mask(asset: Asset) -> bool:
    """Whether a file's alpha band is one: writers call any fourth band of bytes so, the near infrared of an aerial image too."""
    dataset = borrow_raster(asset)
    index = [kind.name for kind in dataset.colorinterp].index("alpha")
    if asset.bands[index : index + 1] in ((), ("A",), ("",)):
        return True
    return bool(np.isin(_small(asset, index + 1), (0, 255)).all())


def _small(asset: Asset, index: int) -> np.ndarray:
    """One band, whole, at most SMALL_PX on a side."""
    dataset = borrow_raster(asset)
    shape = tuple(max(min(side, SMALL_PX), 1) for side in (dataset.height, dataset.width))
    return _read(asset, [index], out_shape=(1, *shape))[0]


def _read(asset: Asset, indices: list[int], **options: Any) -> np.ndarray:
    """Bands of a file; what goes wrong on the way is tried again with the file opened anew. Raises ReadFault."""
    return _asked(asset, lambda dataset: dataset.read(indices, **options), "pixels")


def _asked(asset: Asset, ask: Any, what: str) -> Any:
    def attempt() -> Any:
        try:
            return ask(borrow_raster(asset))
        except (RasterioError, OSError):
            _forget(asset)
            raise

    try:
        with _settings(asset.href):
            return retrying(attempt, asset.href)
    except (RasterioError, OSError) as error:
        raise ReadFault(
            asset.id, f"corrupt {what} in {local_name(asset.href)}: {first_line(error.__cause__ or error)}"
        ) from None


def local_name(href: str) -> str:
    return local_path(href) if is_local(href) else href


def _raster_window(window: Window) -> RasterWindow:
    row0, row1, col0, col1 = window
    return RasterWindow(col0, row0, col1 - col0, row1 - row0)
