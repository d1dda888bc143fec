"""OlmoEarth's training set: one HDF5 file per sample, `sample_{index}.h5`, as its `convert_to_h5py` writes it.

    latlon                          latitude, longitude of the middle of the *tile* that the sample is cut from
    timestamps                      [T, 3] day, month counted from 0, year: of all series of a year's set
    timestamps_{series}             [t, 3], where every capture is kept and the series have dates of their own
    missing_timesteps_masks/{series}   [T] True where the series has an image
    sentinel2_l2a, sentinel1        [H, W, t, C] at 10 m: digital numbers of twelve bands, 10 m ones first; dB of VV, VH
    sentinel2_scl                   [H, W, t, 1] scene classification, where every capture is kept

The set's tiles are of 256 pixels and its samples may be quarters of them; which quarter a file is, it does not say. The place is
therefore taken as the middle of the tile, up to 0.9 km off, and every date's decision says so; all quarters of a tile lie in one
ground cell, so in one split. Series that no modality here stands for (Landsat, WorldCover, ERA5, the 2.5 m copy of NAIP, …) are left.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import h5py
import numpy as np

from cluster.errors import UsageError
from cluster.storage import join, list_names
from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, centred_grid, utm_code
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile, hdf5_dataset
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.masks import mask_codes
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.treesatai import open_h5

GSD_M = 10.0
# data set: modality, bands in file order
SERIES = {
    "sentinel2_l2a": ("s2", ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")),
    "sentinel1": ("s1", ("VV", "VH")),
}
SCL = "sentinel2_scl"
POSITION = "position assumed: middle of its tile, up to 0.9 km off, the file does not say which part of the tile it is"
_SAMPLE = re.compile(r"sample_(\d+)\.h5")


def holds_samples(url: str) -> bool:
    """Whether a folder holds such files, by the names and by what the first of them holds."""
    name = next((name for name in sorted(list_names(url)) if _SAMPLE.fullmatch(name)), None)
    if name is None:
        return False
    try:
        with open_h5(join(url, name), name) as file:
            return "latlon" in file and any(series in file for series in SERIES)
    except SourceFault:
        return False  # damaged: to be named file by file


def _opened(href: str, name: str) -> Any:
    """The file, with Zstandard, which the set is published with and HDF5 has to be told of."""
    import hdf5plugin  # noqa: F401

    return open_h5(href, name)


def sites(url: str) -> list[tuple[str, ...]]:
    """File names by their number. Raises UsageError if there are none."""
    numbers = {int(match[1]): name for name in list_names(url) if (match := _SAMPLE.fullmatch(name))}
    if not numbers:
        raise UsageError(f"{url} holds no OlmoEarth sample (sample_{{index}}.h5)")
    return [(numbers[number],) for number in sorted(numbers)]


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One sample as a STAC item. Raises SourceFault for a file without a place, dates or any series that is read."""
    name, href = site[0].removesuffix(".h5"), join(url, site[0])
    assets: dict[str, AssetFields] = {}
    times: set[str] = set()
    with _opened(href, name) as file:
        centre = _checked(file, "latlon", name).reshape(-1)
        if centre.shape != (2,) or not (abs(centre[0]) <= 90 and abs(centre[1]) <= 180):
            raise SourceFault(name, f"latlon is {centre.tolist()}, wanted latitude and longitude: {href}")
        for series, (modality, bands) in SERIES.items():
            if series not in file:
                continue
            grid = _grid(float(centre[0]), float(centre[1]), file[series].shape, series, name)
            s2 = modality == "s2"
            assets[series] = AssetFields(
                modality, href, "application/x-hdf5", bands, grid, level="L2A" if s2 else "", unit="" if s2 else "dB",
                scale=1e-4 if s2 else None, nodata=0.0 if s2 else None, member=series, note=POSITION, format="olmoearth",
            )  # fmt: skip
            times |= set(stamps(file, series, name))
    if not assets:
        raise SourceFault(name, f"holds none of {', '.join(SERIES)}: {href}")
    return make_item(name, assets, times=sorted(times))


def _grid(lat: float, lon: float, shape: tuple[int, ...], series: str, name: str) -> Grid:
    """A sample's pixels around the middle of its tile, on the 10 m lattice of the zone."""
    if len(shape) != 4 or not shape[0] or shape[0] != shape[1]:
        raise SourceFault(name, f"{series} has shape {shape}, wanted [H, W, T, C] with H = W")
    return centred_grid(utm_code(lon, lat), lon, lat, (shape[0], shape[1]), GSD_M)


def stamps(file: Any, series: str, name: str) -> list[str]:
    """Days of a series' images, ISO 8601. Raises SourceFault, ReadFault."""
    own = f"timestamps_{series}"
    rows = _checked(file, own if own in file else "timestamps", name)
    mask = f"missing_timesteps_masks/{series}"
    if own not in file and mask in file:
        held = _checked(file, mask, name).astype(bool)
        if held.shape != (len(rows),):
            raise SourceFault(name, f"{mask} has {held.size} entries for {len(rows)} timestamps")
        rows = rows[held]
    try:
        days = [dt.date(int(year), int(month) + 1, int(day)) for day, month, year in rows.tolist()]
    except (ValueError, TypeError) as error:
        raise SourceFault(name, f"timestamps are no rows of day, month from 0, year: {first_line(error)}") from None
    return [f"{day.isoformat()}T00:00:00Z" for day in days]


def _checked(file: Any, member: str, name: str) -> np.ndarray:
    try:
        return np.asarray(hdf5_dataset(file, member)[()])
    except Hostile as error:
        raise SourceFault(name, str(error)) from None
    except (KeyError, OSError, ValueError, RuntimeError) as error:
        raise ReadFault(name, f"corrupt or missing {member}: {first_line(error)}") from None


class OlmoEarthCube(Cube):
    """One series of a sample; small, so it is held in memory whole."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        grid = asset.grid
        if grid is None:
            raise SourceFault(asset.id, "the catalog gives no place; make it with --layout olmoearth")
        with _opened(asset.href, asset.id) as file:
            data_HWTC = _checked(file, asset.member, asset.id)
            moments = stamps(file, asset.member, asset.id)
            scl = self._scl(file, moments) if asset.modality == "s2" else None
        expected = (*grid.shape, len(moments), len(asset.bands))
        if data_HWTC.shape != expected:
            raise SourceFault(
                asset.id, f"{asset.member} has shape {data_HWTC.shape}, wanted {expected} by its dates: {asset.href}"
            )
        places = [asset.bands.index(band) for band in wanted]
        self._data_TCHW = np.ascontiguousarray(data_HWTC.transpose(2, 3, 0, 1)[:, places])
        self._scl_THW = scl
        # captures of one day are told apart: they may be two tiles of one pass
        stem = asset.id.partition("/")[0]
        self.dates = [DateInfo(moment, f"{stem}_{asset.member}_{t}") for t, moment in enumerate(moments)]
        self.layers = [Layer(wanted, grid)]
        self.cloud = grid if scl is not None else None

    def _scl(self, file: h5py.File, moments: list[str]) -> np.ndarray | None:
        """The scene classification of every date [T, H, W]; None where the file has none for all of them."""
        if SCL not in file:
            return None
        of_scl = stamps(file, SCL, self.asset.id)
        if sorted(of_scl) != sorted(moments):
            return None
        values_HWT = _checked(file, SCL, self.asset.id)[..., 0]
        order = np.argsort(np.argsort(moments, kind="stable"), kind="stable")
        return values_HWT.transpose(2, 0, 1)[np.argsort(of_scl, kind="stable")[order]]

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        return self._data_TCHW[date, :, row0:row1, col0:col1]

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._scl_THW is not None
        row0, row1, col0, col1 = window
        return mask_codes(self._scl_THW[date, row0:row1, col0:col1], "scl", quality)
