"""Zarr with one variable per band, as xarray writes it: a product's arrays one by one, or groups per resolution (EOPF Sentinel).

An href ends at an array (`…/S2A_….zarr/measurements/reflectance/r10m/b02`), at a group of them (`…/r10m`), or at the product (`….zarr`),
whose groups are then searched; of a band that several resolutions hold the finest is read. Variables have dims (y, x) or (time, y, x).
Read from the store, where the catalog does not say it:

    place      coordinates `x`, `y` of the variable's group (pixel centres), or attribute `proj:transform`
    CRS        `proj:epsg`, `proj:code` of the variable; `spatial_ref`; of the product: `stac_discovery.properties`, or
               `other_metadata.horizontal_CRS_code`
    numbers    `scale_factor`, `add_offset`, `_FillValue` or `fill_value` (CF), also under `_eopf_attrs`
    dates      coordinate `time` (CF), else the catalog's one date or the product id's
    clouds     a variable `scl`, `cloud`, … in the product
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, crs_name
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile
from data_prep.sources.masks import mask_codes
from data_prep.sources.names import band_name, cf_times, iso_datetime, relative_orbit, s2_product
from data_prep.sources.raster import first_line
from data_prep.sources.records import MASKS, Asset, ReadFault, SourceFault
from data_prep.sources.remote import retrying
from data_prep.sources.zarr_store import CheckedStore, open_group, small

MAX_DEPTH = 6
MASK_NAMES = {"scl": "scl", "cloud_mask": "cloud", **{name: name for name in MASKS}}


@dataclasses.dataclass(frozen=True)
class Variable:
    """One array of one band, its place, and the asset that speaks for its numbers."""

    array: Any
    grid: Grid
    asset: Asset
    times: tuple[str, ...]

    def block(self, date: int, window: Window) -> np.ndarray:
        """Raw numbers [h, w]. Raises ReadFault."""
        row0, row1, col0, col1 = window
        pick: tuple[Any, ...] = (slice(row0, row1), slice(col0, col1))
        try:
            return retrying(lambda: np.asarray(self.array[(date, *pick) if self.times else pick]), self.asset.href)
        except Hostile as error:
            raise SourceFault(self.asset.id, f"{self.asset.href}: {error}") from None
        except Exception as error:  # codecs raise what they like on damaged bytes
            raise ReadFault(self.asset.id, f"corrupt chunk in {self.asset.href}: {first_line(error)}") from None


class ZarrBandsCube(Cube):
    """The dates of one modality of one product, every band its own variable.

    Args:
        assets: arrays, groups or products; all bands `wanted` must be among them. None wanted: all there are.
        cloud: a mask variable of the same product, where the catalog names one.
    """

    def __init__(self, assets: list[Asset], wanted: tuple[str, ...], cloud: Asset | None = None) -> None:
        self.asset = assets[0]
        found: dict[str, Variable] = {}
        masks: dict[str, Variable] = {}
        for asset in [*assets, *([cloud] if cloud is not None else [])]:
            for name, variable in _variables(asset):
                known = MASK_NAMES.get(name.lower(), "") or (asset.modality if asset is cloud else "")
                place = masks if known else found
                key = known or _band(asset, name)
                if key not in place or variable.grid.gsd_m() < place[key].grid.gsd_m():
                    place[key] = variable
        missing = [band for band in wanted if band not in found]
        if missing:
            raise SourceFault(self.asset.id, f"has no band {missing[0]}; it holds {', '.join(sorted(found)) or 'none'}")
        if not found:
            raise SourceFault(
                self.asset.id, f"holds no variable with dims y, x (or time, y, x) and a place: {self.asset.href}"
            )
        self._variables = {band: found[band] for band in wanted or sorted(found)}
        self._mask_kind = next((kind for kind in MASKS if kind in masks), "")
        self._mask = masks.get(self._mask_kind)
        self.cloud = self._mask.grid if self._mask is not None else None
        self.dates = self._dates(next(iter(self._variables.values())))
        self.layers = self._layers()

    def _dates(self, first: Variable) -> list[DateInfo]:
        product, asset = self.asset.product_id, self.asset
        stamps = first.times or (asset.datetime or s2_product(product).get("datetime", ""),)
        track = asset.relative_orbit or relative_orbit(product)
        return [DateInfo(stamp, product, asset.baseline, asset.orbit, relative_orbit=track) for stamp in stamps]

    def _layers(self) -> list[Layer]:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for band, variable in self._variables.items():
            if variable.times and len(variable.times) != len(self.dates):
                raise SourceFault(
                    variable.asset.id, f"band {band} has {len(variable.times)} dates, others {len(self.dates)}"
                )
            said = (variable.asset.scale, variable.asset.offset, str(variable.asset.nodata))
            groups.setdefault((variable.grid, *said), []).append(band)
        return [Layer(tuple(bands), key[0], self._variables[bands[0]].asset) for key, bands in groups.items()]

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        return np.stack([self._variables[band].block(date, window) for band in self.layers[layer].bands])

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._mask is not None
        return mask_codes(self._mask.block(date, window), self._mask_kind, quality)


def _band(asset: Asset, name: str) -> str:
    """A catalogued single array is the band the catalog says; variables of a group are named by themselves."""
    return asset.bands[0] if len(asset.bands) == 1 and asset.bands[0] else band_name(name)


def split_product(href: str) -> tuple[str, str]:
    """(URL of the Zarr product, path inside it)."""
    head, found, inner = href.rstrip("/").partition(".zarr/")
    return (f"{head}.zarr", inner) if found else (href.rstrip("/"), "")


def _variables(asset: Asset) -> Iterator[tuple[str, Variable]]:
    """(name, variable) of every 2- or 3-dimensional array with a place that the asset leads to. Raises ReadFault, SourceFault."""
    product, inner = split_product(asset.href)
    root, store = open_group(product, asset.id)
    try:
        node = root[inner] if inner else root
        parent = root[inner.rpartition("/")[0]] if "/" in inner else root
    except KeyError:
        raise ReadFault(asset.id, f"{product} holds no {inner}") from None
    except Exception as error:  # damaged metadata
        raise ReadFault(asset.id, f"{asset.href} cannot be opened as Zarr: {first_line(error)}") from None
    pairs = [(parent, node)] if hasattr(node, "chunks") else list(_arrays_below(node, 0))
    for group, array in pairs:
        variable = _variable(asset, root, group, array, store)
        if variable is not None:
            yield array.path.rpartition("/")[2], variable


def _arrays_below(group: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    if depth > MAX_DEPTH:
        return
    for _, array in sorted(group.arrays()):
        yield group, array
    for _, child in sorted(group.groups()):
        yield from _arrays_below(child, depth + 1)


def _variable(asset: Asset, root: Any, group: Any, array: Any, store: CheckedStore) -> Variable | None:
    """An array with its place; None for what is no image (coordinates, angles of another grid, tables)."""
    try:
        if array.ndim not in (2, 3) or array.dtype.kind not in "uif" or min(array.shape[-2:]) < 2:
            return None
        attributes = {**array.attrs.asdict().get("_eopf_attrs", {}), **array.attrs.asdict()}
        grid = _grid(asset, root, group, array, attributes)
        if grid is None:
            return None
        store.watch(array)
        times = _times(group) if array.ndim == 3 else ()
        if array.ndim == 3 and len(times) != array.shape[0]:
            return None
        return Variable(array, grid, _speaking(asset, attributes), times)
    except Hostile as error:
        raise SourceFault(asset.id, f"{asset.href}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceFault(asset.id, f"{asset.href}: {array.path}: {first_line(error)}") from None


def _speaking(asset: Asset, attributes: dict[str, Any]) -> Asset:
    """The asset with what the variable itself says where the catalog is silent."""

    def number(*names: str) -> float | None:
        value = next((attributes[name] for name in names if isinstance(attributes.get(name), int | float)), None)
        return None if value is None else float(value)

    def first(catalog: float | None, *names: str) -> float | None:
        return catalog if catalog is not None else number(*names)

    return dataclasses.replace(
        asset, scale=first(asset.scale, "scale_factor"), offset=first(asset.offset, "add_offset"),
        nodata=first(asset.nodata, "_FillValue", "fill_value"),
    )  # fmt: skip


def _times(group: Any) -> tuple[str, ...]:
    if "time" not in group:
        return ()
    values, units = small(group["time"]), str(group["time"].attrs.get("units", ""))
    if values.dtype.kind == "M":
        return tuple(iso_datetime(str(stamp)) for stamp in values)
    return tuple(iso_datetime(text) for text in cf_times(values.tolist(), units))


def _grid(asset: Asset, root: Any, group: Any, array: Any, attributes: dict[str, Any]) -> Grid | None:
    height, width = array.shape[-2:]
    transform = attributes.get("proj:transform")
    if "x" in group and "y" in group:
        if group["x"].shape != (width,) or group["y"].shape != (height,):
            return None
        xs, ys = (small(group[axis]).astype(float) for axis in ("x", "y"))
        step_x, step_y = (xs[-1] - xs[0]) / (width - 1), (ys[-1] - ys[0]) / (height - 1)
        transform = (step_x, 0.0, xs[0] - step_x / 2, 0.0, step_y, ys[0] - step_y / 2)
    elif not isinstance(transform, list | tuple) or len(transform) < 6:
        return None
    crs = _crs(asset, root, group, attributes)
    if not crs:
        return None
    a, b, c, d, e, f = (float(value) for value in transform[:6])
    return Grid(crs_name(crs), (a, b, c, d, e, f), width, height)


def _crs(asset: Asset, root: Any, group: Any, attributes: dict[str, Any]) -> str:
    """The CRS by the first of those who may know it; "" if nobody does."""
    reference = group["spatial_ref"].attrs if "spatial_ref" in group else {}
    about = root.attrs.asdict()
    stac = (about.get("stac_discovery") or {}).get("properties") or {}
    product = about.get("other_metadata") or {}
    candidates = (
        attributes.get("proj:code"), attributes.get("proj:epsg"), reference.get("crs_wkt"), reference.get("spatial_ref"),
        group.attrs.get("crs"), about.get("crs"), stac.get("proj:code"), stac.get("proj:epsg"), product.get("horizontal_CRS_code"),
        asset.crs,
    )  # fmt: skip
    value = next((value for value in candidates if value), "")
    return f"EPSG:{value}" if isinstance(value, int) or str(value).isdigit() else str(value)
