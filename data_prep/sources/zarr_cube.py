"""Zarr cubes, format 2 and 3, dims time, band, y, x; the fields are listed in `stac.py`. Only touched chunks are read."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
import os
import re
from typing import Any

import numpy as np
import zarr
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.storage import FsspecStore, LocalStore, ZipStore

from cluster.storage import filesystem, is_local, local_path
from data_prep.geo import Grid, Window, crs_name
from data_prep.schema import CLEAR, CLOUD
from data_prep.sources.cube import DateInfo, Layer
from data_prep.sources.names import band_name, iso_datetime
from data_prep.sources.raster import first_line, scl_codes
from data_prep.sources.records import Asset, SourceFault

DIMS = ("time", "band", "y", "x")
CACHE_BYTES = 64 << 20
READ_AHEAD = 8  # dates per request where each has its own chunks
BLOSC_HEADER_BYTES = 16


class ZarrCube:
    """All dates of one modality of one site. Dates in the order of the file; sorting is `read.py`'s."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        group = open_group(asset)
        arrays = _arrays(group, asset)
        self._data = _data_array(arrays, asset)
        attributes = {**group.attrs.asdict(), **self._data.attrs.asdict()}
        self._nodata = attributes.get("nodata")
        self.asset = _with_attributes(asset, attributes)
        times, bands, height, width = self._data.shape
        names = [band_name(str(name)) for name in _listed(attributes, "bands", arrays, "band", asset)]
        if len(names) != bands:
            raise SourceFault(asset.id, f"names {len(names)} bands, the array has {bands}: {asset.href}")
        missing = [band for band in wanted if band not in names]
        if missing:
            raise SourceFault(asset.id, f"has no band {missing[0]}; it holds {', '.join(names)}")
        self._indices = [names.index(band) for band in wanted]
        self.dates = _dates(attributes, arrays, times, asset)
        self._grid = _grid(attributes, arrays, height, width, asset)
        self.layers = [Layer(wanted, self._grid)]
        self._mask, self._mask_is_scl = _mask_array(arrays, (times, height, width), asset)
        self.cloud = self._grid if self._mask is not None else None
        self._is_local = is_local(asset.href) and not asset.href.endswith(".zip")
        self._held: dict[str, tuple[tuple[int, Window], np.ndarray]] = {}

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        return self._read_date(self._data, date, window)[self._indices]

    def _read_date(self, array: Any, date: int, window: Window) -> np.ndarray:
        """One date of an array, out of a block of dates that is fetched at once and kept.

        A chunk may span dates, and one call for several chunks costs little more than one call for one.
        """
        row0, row1, col0, col1 = window
        date_bytes = array.dtype.itemsize * math.prod(array.shape[1:-2]) * (row1 - row0) * (col1 - col0)
        span = array.chunks[0] if array.chunks[0] > 1 else READ_AHEAD
        span = span if span * date_bytes <= CACHE_BYTES else 1
        start = date // span * span
        held = self._held.get(array.path)
        if held is None or held[0] != (start, window):
            held = ((start, window), self._fetch(array, slice(start, min(start + span, array.shape[0])), window))
            self._held[array.path] = held
        return held[1][date - start]

    def _fetch(self, array: Any, times: slice, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        try:
            self._refuse_cut_blosc(array, times, window)
            return np.asarray(array[times, ..., row0:row1, col0:col1])
        except Exception as error:  # codecs raise what they like on damaged bytes
            raise SourceFault(
                self.asset.id, f"corrupt chunk in {self.asset.href}/{array.path}: {first_line(error)}"
            ) from None

    def _refuse_cut_blosc(self, array: Any, times: slice, window: Window) -> None:
        """Raises ValueError for a chunk file shorter than its Blosc header says: the decoder would make pixels up.

        Only for local folders: object stores show no half-written objects, zips carry checksums, other codecs notice.
        """
        if not (self._is_local and _uses_blosc(array)):
            return
        row0, row1, col0, col1 = window
        middle = [(0, size) for size in array.shape[1:-2]]
        ranges = [(times.start, times.stop), *middle, (row0, row1), (col0, col1)]
        spans = [range(a // size, -(-b // size)) for (a, b), size in zip(ranges, array.chunks)]
        folder = os.path.join(local_path(self.asset.href), array.path)
        for place in itertools.product(*spans):
            path = os.path.join(folder, array.metadata.encode_chunk_key(place))
            if not os.path.exists(path):
                continue  # absent chunks are the fill value, by the format's rules
            with open(path, "rb") as stream:
                header = stream.read(BLOSC_HEADER_BYTES)
            promised = int.from_bytes(header[12:16], "little")
            if len(header) < BLOSC_HEADER_BYTES or os.path.getsize(path) < promised:
                raise ValueError(f"chunk {place} has {os.path.getsize(path)} of {promised} bytes")

    def read_valid(self, date: int, layer: int, window: Window) -> np.ndarray | None:
        return None

    def read_cloud(self, date: int, window: Window) -> np.ndarray:
        assert self._mask is not None
        values = self._read_date(self._mask, date, window)
        return scl_codes(values) if self._mask_is_scl else np.where(values != 0, CLOUD, CLEAR).astype(np.uint8)

    def nodata_of(self, layer: int) -> float | None:
        return None if self._nodata is None else float(self._nodata)

    def close(self) -> None:
        self._held = {}


def open_group(asset: Asset) -> Any:
    """The Zarr group of an asset, read-only, from a folder, a zip or any fsspec URL."""
    href = asset.href.rstrip("/")
    try:
        if is_local(href):
            path = local_path(href)
            store: Any = ZipStore(path, mode="r") if href.endswith(".zip") else LocalStore(path, read_only=True)
        else:
            fs, path = filesystem(href)
            # the one (synchronous) client of this process, so that its connections are pooled and closed in one place
            store = FsspecStore(AsyncFileSystemWrapper(fs, asynchronous=True), read_only=True, path=path)
        return zarr.open_group(store, mode="r")
    except (FileNotFoundError, KeyError) as error:
        raise SourceFault(asset.id, f"{href} is not a Zarr group: {first_line(error)}") from None
    except Exception as error:  # damaged metadata: JSON, key and type errors of every sort
        raise SourceFault(asset.id, f"{href} cannot be opened as Zarr: {first_line(error)}") from None


def _arrays(group: Any, asset: Asset) -> dict[str, Any]:
    try:
        return dict(group.arrays())
    except Exception as error:  # damaged array metadata
        raise SourceFault(asset.id, f"{asset.href} cannot be opened as Zarr: {first_line(error)}") from None


def _with_attributes(asset: Asset, attributes: dict[str, Any]) -> Asset:
    """The asset with what the cube itself says where the catalog is silent: unit (s1), scale and offset (s2)."""
    said: dict[str, Any] = {}
    if not asset.unit and attributes.get("unit") in ("dB", "linear"):
        said["unit"] = attributes["unit"]
    for name in ("scale", "offset"):
        if getattr(asset, name) is None and isinstance(attributes.get(name), int | float):
            said[name] = float(attributes[name])
    return dataclasses.replace(asset, **said)


def _data_array(arrays: dict[str, Any], asset: Asset) -> Any:
    if asset.member:
        array = arrays.get(asset.member)
    else:
        array = arrays.get("data")
        if array is None:
            candidates = [name for name, item in sorted(arrays.items()) if item.ndim == 4]
            array = arrays[candidates[0]] if len(candidates) == 1 else None
    if array is None:
        held = ", ".join(sorted(arrays)) or "no array"
        raise SourceFault(
            asset.id, f"has no array {asset.member or 'data'} with dims {', '.join(DIMS)}; it holds {held}"
        )
    if array.ndim != 4:
        raise SourceFault(asset.id, f"array has {array.ndim} dimensions, wanted {', '.join(DIMS)}: {asset.href}")
    dims = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if dims and any(dims) and tuple(dims) != DIMS:
        raise SourceFault(
            asset.id, f"array has dims {', '.join(map(str, dims))}, wanted {', '.join(DIMS)}: {asset.href}"
        )
    if array.dtype.kind not in "uif":
        raise SourceFault(asset.id, f"array holds {array.dtype}, wanted numbers: {asset.href}")
    return array


def _uses_blosc(array: Any) -> bool:
    """Whether a chunk file is one Blosc frame (not a shard of several)."""
    metadata = array.metadata
    codecs = [getattr(metadata, "compressor", None), *(getattr(metadata, "codecs", None) or ())]
    return any("blosc" in type(codec).__name__.lower() for codec in codecs)


def _listed(attributes: dict[str, Any], name: str, arrays: dict[str, Any], coordinate: str, asset: Asset) -> list[Any]:
    if isinstance(attributes.get(name), list):
        return attributes[name]
    if coordinate in arrays:
        values = np.asarray(arrays[coordinate][:])
        return [item.decode() if isinstance(item, bytes) else item for item in values.tolist()]
    if name == "bands" and asset.bands:
        return list(asset.bands)
    raise SourceFault(asset.id, f"has neither an attribute {name} nor a coordinate {coordinate}: {asset.href}")


def _dates(attributes: dict[str, Any], arrays: dict[str, Any], times: int, asset: Asset) -> list[DateInfo]:
    stamps = _listed(attributes, "datetimes", arrays, "time", asset)
    if stamps and not isinstance(stamps[0], str):
        stamps = _cf_times(stamps, str(arrays["time"].attrs.get("units", "")), asset)
    stamps = [iso_datetime(str(stamp)) for stamp in stamps]
    if len(stamps) != times:
        raise SourceFault(asset.id, f"names {len(stamps)} dates, the array has {times}: {asset.href}")
    if times > 1 and "" in stamps:
        raise SourceFault(asset.id, f"date {stamps.index('')} has no readable time: {asset.href}")
    products = _per_date(attributes, ("product_ids",), times, asset.product_id, asset)
    orbits = _per_date(attributes, ("orbits", "orbit_states"), times, asset.orbit, asset)
    baselines = _per_date(attributes, ("baselines", "processing_baselines"), times, asset.baseline, asset)
    offsets = _per_date(attributes, ("boa_add_offsets",), times, None, asset)
    return [
        DateInfo(stamp, str(product or ""), str(baseline or ""), str(orbit or "").lower(), None if o is None else float(o))
        for stamp, product, baseline, orbit, o in zip(stamps, products, baselines, orbits, offsets)
    ]  # fmt: skip


def _per_date(attributes: dict[str, Any], names: tuple[str, ...], times: int, default: Any, asset: Asset) -> list[Any]:
    for name in names:
        values = attributes.get(name)
        if isinstance(values, list):
            if len(values) != times:
                raise SourceFault(
                    asset.id, f"{name} has {len(values)} entries, the array has {times} dates: {asset.href}"
                )
            return values
    return [default] * times


def _cf_times(values: list[Any], units: str, asset: Asset) -> list[str]:
    """CF numbers such as `days since 2020-01-01` as ISO strings."""
    match = re.match(r"(nanosecond|microsecond|millisecond|second|minute|hour|day)s? since (.+)", units.strip())
    if not match:
        raise SourceFault(
            asset.id, f"time coordinate has units {units!r}, wanted e.g. 'days since 2020-01-01': {asset.href}"
        )
    seconds = {
        "nanosecond": 1e-9, "microsecond": 1e-6, "millisecond": 1e-3, "second": 1, "minute": 60, "hour": 3600, "day": 86400,
    }[match[1]]  # fmt: skip
    origin = iso_datetime(match[2].strip())
    if not origin:
        raise SourceFault(asset.id, f"time coordinate counts from {match[2]!r}, which is no date: {asset.href}")
    start = dt.datetime.fromisoformat(origin)
    return [(start + dt.timedelta(seconds=float(value) * seconds)).isoformat() for value in values]


def _grid(attributes: dict[str, Any], arrays: dict[str, Any], height: int, width: int, asset: Asset) -> Grid:
    crs = str(attributes.get("crs") or asset.crs or "")
    if not crs and "spatial_ref" in arrays:
        reference = arrays["spatial_ref"].attrs
        crs = str(reference.get("crs_wkt") or reference.get("spatial_ref") or "")
    if not crs:
        raise SourceFault(asset.id, f"has no CRS (attribute crs, or proj:code in the catalog): {asset.href}")
    transform = attributes.get("transform") or asset.transform
    if transform is None and "x" in arrays and "y" in arrays and width > 1 and height > 1:
        xs, ys = np.asarray(arrays["x"][:], float), np.asarray(arrays["y"][:], float)
        step_x, step_y = (xs[-1] - xs[0]) / (width - 1), (ys[-1] - ys[0]) / (height - 1)
        transform = (step_x, 0.0, xs[0] - step_x / 2, 0.0, step_y, ys[0] - step_y / 2)  # coordinates are pixel centres
    if transform is None or len(transform) < 6:
        raise SourceFault(
            asset.id, f"has no transform (attribute transform, or proj:transform in the catalog): {asset.href}"
        )
    try:
        a, b, c, d, e, f = (float(value) for value in transform[:6])
        return Grid(crs_name(crs), (a, b, c, d, e, f), width, height)
    except Exception as error:
        raise SourceFault(asset.id, f"CRS or transform cannot be read: {first_line(error)}") from None


def _mask_array(arrays: dict[str, Any], shape: tuple[int, int, int], asset: Asset) -> tuple[Any, bool]:
    for name in ("scl", "cloud"):
        if name in arrays:
            array = arrays[name]
            if array.shape != shape:
                raise SourceFault(asset.id, f"array {name} has shape {array.shape}, wanted {shape}: {asset.href}")
            return array, name == "scl"
    return None, False
