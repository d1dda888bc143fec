"""MMEarth: one HDF5 file of all tiles, `data_*.h5`, and what is known of each in `data_*_tile_info.json`, as its `convert_to_h5` writes them.

    metadata             [N] (tile_id, S2_type): `l2a` or `l1c`
    sentinel2            [N, 13, H, W] digital numbers at 10 m, B8A before B8, B10 empty where L2A; harmonised: no +1000 in them
    sentinel2_scl        [N, 1, H, W] scene classification, 255 where L1C
    sentinel1            [N, 8, H, W] dB, sigma0 GRD of Earth Engine: VV, VH, HH, HV ascending, then descending; -inf where absent
    tile_info            by tile_id: S2_DATE (YYYY-MM-DD), S2_type, CRS, lat, lon of the middle, BANDS per sensor

A tile is one site: Sentinel-2 is modality `s2` or `s2_l1c` by its type, each orbit direction of Sentinel-1 a date. The pixels' corner
is not written: the place is taken as centred on the tile's middle, up to a pixel off, and every date says so. Sentinel-1's date is not
written either (the pass next to Sentinel-2's date): it stays unknown. What no modality here stands for (ERA5, ASTER, canopy
height, Dynamic World, …) is left.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.storage import join, list_names, read_bytes
from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, centred_grid, crs_name
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile, hdf5_dataset
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.masks import mask_codes
from data_prep.sources.names import band_name, iso_datetime
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.treesatai import open_h5

GSD_M = 10.0
S2_ORDER = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B08", "B09", "B10", "B11", "B12")
S1_ORDER = ("VV", "VH", "HH", "HV")
ORBITS = {"asc": "ascending", "desc": "descending"}
SCL, NO_SCL = "sentinel2_scl", 255
POSITION = "position assumed: centred on the tile's coordinates, up to one pixel off"


def holds_tiles(url: str) -> bool:
    """Whether a folder holds such a pair of files."""
    return _pair(url) is not None


def _pair(url: str) -> tuple[str, str] | None:
    names = sorted(list_names(url))
    for name in names:
        info = f"{name.removesuffix('.h5')}_tile_info.json"
        if name.startswith("data_") and name.endswith(".h5") and info in names:
            return name, info
    return None


def sites(url: str) -> list[tuple[str, ...]]:
    """(file, info file, position, tile id, type) of every tile. Raises UsageError for another folder, SourceFault for damage."""
    pair = _pair(url)
    if pair is None:
        raise UsageError(f"{url} holds no MMEarth set: data_*.h5 with data_*_tile_info.json beside it")
    with open_h5(join(url, pair[0]), pair[0]) as file:
        rows = _array(file, "metadata", pair[0])[:]
    if rows.dtype.names is None or not {"tile_id", "S2_type"} <= set(rows.dtype.names):
        raise SourceFault(pair[0], "metadata has no fields tile_id and S2_type")
    return [(*pair, str(number), _text(row["tile_id"]), _text(row["S2_type"])) for number, row in enumerate(rows)]


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


@functools.lru_cache(maxsize=1)
def _infos(url: str) -> dict[str, Any]:
    try:
        tree = json.loads(read_bytes(url))
    except (OSError, ValueError) as error:
        raise ReadFault(url.rsplit("/", 1)[-1], f"cannot be read as JSON: {first_line(error)}") from None
    return tree if isinstance(tree, dict) else {}


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One tile as a STAC item. Raises SourceFault for one that the info file does not know, or whose type it contradicts."""
    file_name, info_name, position, tile, kind = site
    name, href = f"mmearth_{tile}", join(url, file_name)
    info = _infos(join(url, info_name)).get(tile)
    if not isinstance(info, dict):
        raise SourceFault(name, f"tile {tile} is not in {info_name}")
    if info.get("S2_type") != kind or kind not in ("l1c", "l2a"):
        raise SourceFault(
            name, f"S2_type is {kind!r} in {file_name} and {info.get('S2_type')!r} in {info_name}, wanted l1c or l2a"
        )
    moment = iso_datetime(str(info.get("S2_DATE") or ""))
    if not moment:
        raise SourceFault(name, f"S2_DATE is {info.get('S2_DATE')!r}, wanted YYYY-MM-DD")
    with open_h5(href, name) as file:
        grid = _grid(info, _array(file, "sentinel2", name).shape, name)
    common: dict[str, Any] = {"type": "application/x-hdf5", "grid": grid, "note": POSITION, "format": "mmearth"}
    l1c = kind == "l1c"
    assets = {
        "sentinel2": AssetFields(
            "s2_l1c" if l1c else "s2", href, bands=S2_ORDER, level=kind.upper(), scale=1e-4, offset=0.0, nodata=0.0,
            data_type="uint16", member=f"sentinel2:{position}:{moment}", **common,
        )
    }  # fmt: skip
    bands = info.get("BANDS") or {}
    for short, orbit in ORBITS.items():
        if {"VV", "VH"} <= set(bands.get(f"sentinel1_{short}") or ()):
            assets[f"sentinel1_{short}"] = AssetFields(
                "s1", href, bands=S1_ORDER[:2], orbit=orbit, unit="dB", calibration="sigma0 GRD",
                member=f"sentinel1:{position}:{short}", **common,
            )  # fmt: skip
    return make_item(name, assets, times=[moment])


def _grid(info: dict[str, Any], shape: tuple[int, ...], name: str) -> Grid:
    try:
        return centred_grid(
            crs_name(str(info["CRS"])), float(info["lon"]), float(info["lat"]), (shape[-2], shape[-1]), GSD_M
        )
    except Exception as error:  # pyproj has its own errors for a CRS that is none
        raise SourceFault(name, f"CRS, lat and lon give no place: {first_line(error)}") from None


def _array(file: Any, member: str, name: str) -> Any:
    """A data set, of which only parts are read: one holds all tiles. Raises SourceFault, ReadFault."""
    try:
        return hdf5_dataset(file, member, whole=False)
    except Hostile as error:
        raise SourceFault(name, str(error)) from None
    except (KeyError, OSError, ValueError, RuntimeError) as error:
        raise ReadFault(name, f"corrupt or missing {member}: {first_line(error)}") from None


class MMEarthCube(Cube):
    """One date of one tile, held in memory."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        grid = asset.grid
        member, _, rest = asset.member.partition(":")
        position, _, about = rest.partition(":")
        if grid is None or not position.isdigit():
            raise SourceFault(asset.id, "the catalog gives no place and position; make it with --layout mmearth")
        s2 = member == "sentinel2"
        with open_h5(asset.href, asset.id) as file:
            values_CHW = self._tile(file, member, int(position))
            scl = self._tile(file, SCL, int(position))[0] if asset.modality == "s2" and SCL in file else None
        order = S2_ORDER if s2 else S1_ORDER * 2
        if values_CHW.shape != (len(order), *grid.shape):
            raise SourceFault(asset.id, f"{member} has tiles of {values_CHW.shape}, wanted {(len(order), *grid.shape)}")
        first = 4 if about == "desc" else 0
        self._values_CHW = values_CHW[[first + order.index(band_name(band)) for band in wanted]]
        self._scl_HW = None if scl is None or (scl == NO_SCL).all() else scl
        self.dates = [DateInfo(about if s2 else "", orbit=asset.orbit)]
        self.layers = [Layer(wanted, grid)]
        self.cloud = grid if self._scl_HW is not None else None

    def _tile(self, file: Any, member: str, position: int) -> np.ndarray:
        try:
            return np.asarray(_array(file, member, self.asset.id)[position])
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise ReadFault(self.asset.id, f"corrupt {member} of tile {position}: {first_line(error)}") from None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        return self._values_CHW[:, row0:row1, col0:col1]

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._scl_HW is not None
        row0, row1, col0, col1 = window
        return mask_codes(self._scl_HW[row0:row1, col0:col1], "scl", quality)
