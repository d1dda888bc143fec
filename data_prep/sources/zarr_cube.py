"""Zarr cubes, format 2 and 3, dims time, band, y, x; the fields are listed in `stac.py`. Only touched chunks are read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, crs_name
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile
from data_prep.sources.masks import mask_codes
from data_prep.sources.names import band_name, cf_times, iso_datetime, relative_orbit
from data_prep.sources.raster import first_line
from data_prep.sources.records import MASKS, Asset, ReadFault, SourceFault
from data_prep.sources.remote import retrying
from data_prep.sources.zarr_store import arrays_of, open_group, small

DIMS = ("time", "band", "y", "x")
CACHE_BYTES = 64 << 20
READ_AHEAD = 8  # dates per request where each has its own chunks


class ZarrCube(Cube):
    """All dates of one modality of one site. Dates in the order of the file; sorting is `read.py`'s."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        group, store = open_group(asset.href, asset.id)
        arrays = arrays_of(group, store, asset.href, asset.id)
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
        self._mask, self._mask_kind = _mask_array(arrays, (times, height, width), asset)
        self.cloud = self._grid if self._mask is not None else None
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
            return retrying(lambda: np.asarray(array[times, ..., row0:row1, col0:col1]), self.asset.href)
        except Hostile as error:
            raise SourceFault(self.asset.id, f"{self.asset.href}/{array.path}: {error}") from None
        except Exception as error:  # codecs raise what they like on damaged bytes
            raise ReadFault(
                self.asset.id, f"corrupt chunk in {self.asset.href}/{array.path}: {first_line(error)}"
            ) from None

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._mask is not None
        return mask_codes(self._read_date(self._mask, date, window), self._mask_kind, quality)

    def nodata_of(self, layer: int) -> float | None:
        return None if self._nodata is None else float(self._nodata)

    def close(self) -> None:
        self._held = {}


def is_cube(asset: Asset) -> bool:
    """Whether a Zarr group holds one array of all dates and bands, or is to be refused as such; else it has a variable per band."""
    group, store = open_group(asset.href, asset.id)
    arrays = arrays_of(group, store, asset.href, asset.id)
    if asset.member or "data" in arrays or any(array.ndim >= 4 for array in arrays.values()):
        return True
    flat = any(array.ndim in (2, 3) and min(array.shape) > 1 for array in arrays.values())
    return not flat and not any(True for _ in group.groups())


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


def _listed(attributes: dict[str, Any], name: str, arrays: dict[str, Any], coordinate: str, asset: Asset) -> list[Any]:
    if isinstance(attributes.get(name), list):
        return attributes[name]
    if coordinate in arrays:
        values = _coordinate(arrays[coordinate], asset)
        return [item.decode(errors="replace") if isinstance(item, bytes) else item for item in values.tolist()]
    if name == "bands" and asset.bands:
        return list(asset.bands)
    raise SourceFault(asset.id, f"has neither an attribute {name} nor a coordinate {coordinate}: {asset.href}")


def _coordinate(array: Any, asset: Asset) -> np.ndarray:
    try:
        return small(array)
    except Hostile as error:
        raise SourceFault(asset.id, f"{asset.href}: {error}") from None
    except Exception as error:
        raise ReadFault(asset.id, f"corrupt chunk in {asset.href}/{array.path}: {first_line(error)}") from None


def _dates(attributes: dict[str, Any], arrays: dict[str, Any], times: int, asset: Asset) -> list[DateInfo]:
    stamps = _listed(attributes, "datetimes", arrays, "time", asset)
    if stamps and not isinstance(stamps[0], str):
        try:
            stamps = cf_times(stamps, str(arrays["time"].attrs.get("units", "")))
        except ValueError as error:
            raise SourceFault(asset.id, f"{error}: {asset.href}") from None
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
        DateInfo(
            stamp, str(product or ""), str(baseline or ""), str(orbit or "").lower(), None if o is None else float(o),
            relative_orbit(str(product or "")),
        )
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


def _grid(attributes: dict[str, Any], arrays: dict[str, Any], height: int, width: int, asset: Asset) -> Grid:
    crs = str(attributes.get("crs") or asset.crs or "")
    if not crs and "spatial_ref" in arrays:
        reference = arrays["spatial_ref"].attrs
        crs = str(reference.get("crs_wkt") or reference.get("spatial_ref") or "")
    if not crs:
        raise SourceFault(asset.id, f"has no CRS (attribute crs, or proj:code in the catalog): {asset.href}")
    transform = attributes.get("transform") or asset.transform
    if transform is None and "x" in arrays and "y" in arrays and width > 1 and height > 1:
        xs, ys = (_coordinate(arrays[axis], asset).astype(float) for axis in ("x", "y"))
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


def _mask_array(arrays: dict[str, Any], shape: tuple[int, int, int], asset: Asset) -> tuple[Any, str]:
    """(array, kind) of the first mask the cube holds; (None, "") without."""
    for name in MASKS:
        if name in arrays:
            array = arrays[name]
            if array.shape != shape:
                raise SourceFault(asset.id, f"array {name} has shape {array.shape}, wanted {shape}: {asset.href}")
            return array, name
    return None, ""
