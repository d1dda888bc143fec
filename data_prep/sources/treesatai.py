"""TreeSatAI-TS: `<stem>.tif` (aerial, 0.2 m, N G B R) beside `<stem>.h5` (Sentinel series of 6 x 6 pixels at 10 m).

The `.h5` holds `sen-2-data` [T, 10, 6, 6] (B02 B03 B04 B05 B06 B07 B08 B8A B11 B12, offset-free digital numbers as float32),
`sen-2-masks` [T, 10, 6, 6] (channel 0 snow, 1 cloud probability in %, the rest unused: the bright dates of channel 0 have an
NDSI near 0.6, those of channel 1 near 0.2), `sen-2-products`, and `sen-1-{asc,des}-data` [T, 2, 6, 6] (VV, VH, linear) with
products. Both orbit directions are kept, sorted together by date, each date with its orbit.

The series carry no georeference. Their 60 m are taken as centred on the 60.8 m aerial tile; the true position may differ by up
to half a Sentinel pixel (5 m), and every date's decision says `position: assumed…`. The site is those 60 m, so the aerial
image loses two pixels on each side (copied, not resampled); its near infrared band is not kept.

Band names are not in the file, its colour tags (red, green, blue, alpha) are wrong. The archive's description (Zenodo 6780578,
`220629_doc_TreeSatAI_benchmark_archive.pdf`) says infrared, green, blue, red, and pixels agree: see `AERIAL_BANDS`.
"""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from cluster.errors import UsageError
from cluster.storage import is_local, join, list_names, local_path
from data_prep.config import QualityConfig
from data_prep.geo import Grid, Transform, Window
from data_prep.schema import MODALITIES
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile, hdf5_dataset
from data_prep.sources.items import AssetFields, make_item, raster_fields
from data_prep.sources.masks import mask_codes
from data_prep.sources.names import relative_orbit, s1_datetime, s2_product
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.remote import open_source, retrying

# Of the nine forest tiles we hold, all have green crowns (sunlit pixels: band 2 above band 4 in 9 of 9; read as N R G B they would be
# redder than green) and in seven the third band loses least from sun to shade, which only the blue of the sky lights. The archive's
# means of all tiles say the same: 154, 92, 85, 79. tests/unit/test_aerial_bands.py looks at the pixels.
AERIAL_BANDS = ("N", "G", "B", "R")
SERIES_GSD_M = 10.0
SERIES_PX = 6
# The twenty classes of the data set; a file name begins with the dominant one. Rides along as the scalar label `species`.
SPECIES = (
    "Abies_alba", "Acer_pseudoplatanus", "Alnus_spec", "Betula_spec", "Cleared", "Fagus_sylvatica", "Fraxinus_excelsior",
    "Larix_decidua", "Larix_kaempferi", "Picea_abies", "Pinus_nigra", "Pinus_strobus", "Pinus_sylvestris", "Populus_spec",
    "Prunus_spec", "Pseudotsuga_menziesii", "Quercus_petraea", "Quercus_robur", "Quercus_rubra", "Tilia_spec",
)  # fmt: skip
# asset key: member of the file, modality, orbit
SERIES = {
    "s2": ("sen-2", "s2", ""),
    "s1_ascending": ("sen-1-asc", "s1", "ascending"),
    "s1_descending": ("sen-1-des", "s1", "descending"),
}
# keys by which other HDF5 archives are told
OTHERS = {
    "sentinel2_l2a": "OlmoEarth's series without its latlon", "sentinel2": "MMEarth's arrays without data_*_tile_info.json beside them",
    "sen1": "So2Sat (patches without place)",
}  # fmt: skip
POSITION = "position assumed: centred on the aerial tile, the file has no georeference"


def sites(url: str) -> list[tuple[str, ...]]:
    """(stem, extensions …), sorted. Raises UsageError if no aerial tile has a series beside it."""
    held: dict[str, list[str]] = {}
    for name in list_names(url):
        if name.endswith((".tif", ".h5")):
            held.setdefault(name.rsplit(".", 1)[0], []).append(name.rsplit(".", 1)[1])
    if not any({"tif", "h5"} <= set(extensions) for extensions in held.values()):
        raise UsageError(f"{url} is no treesatai folder: no aerial tile <stem>.tif with its series <stem>.h5 beside it")
    return [(stem, *extensions) for stem, extensions in sorted(held.items())]


def refuse_other_hdf5(url: str) -> None:
    """Raises UsageError where the folder's HDF5 files hold something else, saying whose they look like."""
    name = next(name for name in list_names(url) if name.endswith((".h5", ".hdf5")))
    try:
        with open_h5(join(url, name), name) as file:
            held = sorted(file)
    except SourceFault:
        return  # damaged: to be named file by file
    if any(f"{member}-data" in held for member, _, _ in SERIES.values()):
        return
    likely = next(
        (who for sign, who in OTHERS.items() if any(sign in key for key in held)), "an archive we do not know"
    )
    raise UsageError(
        f"{join(url, name)} holds {', '.join(held[:6])}: {likely}, which no layout here reads; write STAC items for GeoTIFF or Zarr "
        f"copies of it, or name a layout with --layout"
    )


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One STAC item per aerial tile, with its three series. Raises SourceFault: without the `.tif` the place is unknown."""
    stem, *extensions = site
    if "tif" not in extensions:
        raise SourceFault(f"{stem}.h5", f"has no aerial tile {stem}.tif beside it, so its place is unknown")
    hr = raster_fields(join(url, f"{stem}.tif"), stem)
    bands = AERIAL_BANDS if hr.count == 4 else ("R", "G", "B")[: hr.count]
    tile = AssetFields(
        "hr", join(url, f"{stem}.tif"), bands=bands, grid=hr.grid, data_type=hr.data_type, nodata=hr.nodata
    )
    assets: dict[str, AssetFields] = {"hr": tile}
    times: list[str] = []
    if "h5" in extensions:
        grid, href = centred_grid(hr.grid, SERIES_PX), join(url, f"{stem}.h5")
        with open_h5(href, stem) as file:
            for name, (member, modality, orbit) in SERIES.items():
                if f"{member}-data" in file:
                    times += [info.datetime for info in _dates(file, member, orbit, stem)]
                    assets[name] = _series_fields(href, member, modality, orbit, grid)
    species = next((i for i, name in enumerate(SPECIES) if stem.startswith(f"{name}_")), None)
    label: dict[str, Any] = (
        {} if species is None else {"scalars": {"species": species}, "classes": {"species": SPECIES}}
    )
    return make_item(stem, assets, times=sorted(times), **label)


def _series_fields(href: str, member: str, modality: str, orbit: str, grid: Grid) -> AssetFields:
    s2 = modality == "s2"
    return AssetFields(
        modality, href, "application/x-hdf5", MODALITIES[modality].bands, grid, level="L2A" if s2 else "", orbit=orbit,
        unit="" if s2 else "linear", scale=1e-4 if s2 else None, nodata=0.0 if s2 else None, data_type="float32",
        member=member, note=POSITION, format="treesatai",
    )  # fmt: skip


def centred_grid(hr: Grid, pixels: int) -> Grid:
    """`pixels` x `pixels` of 10 m, centred on the aerial tile."""
    xmin, ymin, xmax, ymax = hr.bounds
    half = pixels * SERIES_GSD_M / 2
    left, top = round((xmin + xmax) / 2 - half, 6), round((ymin + ymax) / 2 + half, 6)
    transform: Transform = (SERIES_GSD_M, 0.0, left, 0.0, -SERIES_GSD_M, top)
    return Grid(hr.crs, transform, pixels, pixels)


def open_h5(href: str, name: str) -> Any:
    try:
        return retrying(lambda: h5py.File(local_path(href) if is_local(href) else open_source(href), "r"), href)
    except FileNotFoundError:
        raise ReadFault(name, f"{href} does not exist") from None
    except OSError as error:
        raise ReadFault(name, f"{href} cannot be read as HDF5: {first_line(error)}") from None


def _dates(file: Any, member: str, orbit: str, name: str) -> list[DateInfo]:
    key = f"{member}-products"
    if key not in file:
        raise SourceFault(name, f"has {member}-data but no {key}, so its dates are unknown")
    products = [
        item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in hdf5_dataset(file, key)[:]
    ]
    dates = []
    for product in products:
        if member == "sen-2":
            fields = s2_product(product)
            dates.append(DateInfo(fields.get("datetime", ""), product, fields.get("baseline", "")))
        else:
            dates.append(DateInfo(s1_datetime(product), product, orbit=orbit, relative_orbit=relative_orbit(product)))
        if not dates[-1].datetime:
            raise SourceFault(name, f"{key}: {product!r} names no date")
    return dates


class TreeSatCube(Cube):
    """One of the three series of an `.h5`; small, so it is held in memory whole."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        grid = asset.grid
        if grid is None:
            raise SourceFault(
                asset.id, "the catalog gives no proj:transform and proj:shape; make it with --layout treesatai"
            )
        with open_h5(asset.href, asset.id) as file:
            try:
                data_TCHW = hdf5_dataset(file, f"{asset.member}-data")[:]
                held = f"{asset.member}-masks" in file
                masks = hdf5_dataset(file, f"{asset.member}-masks")[:, :2] if held else None
            except Hostile as error:
                raise SourceFault(asset.id, f"{asset.href}: {error}") from None
            except (KeyError, OSError, ValueError, RuntimeError) as error:
                raise ReadFault(
                    asset.id, f"corrupt or missing {asset.member}-data in {asset.href}: {first_line(error)}"
                ) from None
            self.dates = _dates(file, asset.member, asset.orbit, asset.id)
        expected = (len(self.dates), len(asset.bands), *grid.shape)
        if data_TCHW.shape != expected:
            raise SourceFault(
                asset.id, f"{asset.member}-data has shape {data_TCHW.shape}, wanted {expected}: {asset.href}"
            )
        self._data_TCHW = data_TCHW[:, [asset.bands.index(band) for band in wanted]]
        self._masks = masks
        self.layers = [Layer(wanted, grid)]
        self.cloud = grid if masks is not None else None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        return self._data_TCHW[date, :, row0:row1, col0:col1]

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._masks is not None
        row0, row1, col0, col1 = window
        return mask_codes(self._masks[date, 1, row0:row1, col0:col1] / np.float32(100), "cloud_probability", quality)
