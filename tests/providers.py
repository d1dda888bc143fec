"""Items as their providers publish them, with the hrefs pointed at small local files of the same bands, types, nodata and pixel sizes.

The JSON in `tests/items` are real items; its README says where each comes from and what was left out. Nothing in them is changed here
but hrefs, and the shape that follows from a smaller file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.control
from rasterio.transform import Affine

from data_prep.geo import Grid, bbox_wgs84

ITEMS = Path(__file__).parent / "items"
COMMON = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1", "B06": "rededge2", "B07": "rededge3",
    "B08": "nir", "B8A": "nir08", "B09": "nir09", "B10": "cirrus", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
BAND_OF = {common: band for band, common in COMMON.items()}
NATIVE_M = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60, "B10": 60}
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
CORNER = (600000.0, 5800020.0)
CRS = "EPSG:32631"
SIDE_M = 600


def published(name: str) -> dict[str, Any]:
    """A real item of `tests/items`, as published."""
    return json.loads((ITEMS / f"{name}.json").read_text())


def crs_of_item(entry: dict[str, Any]) -> str:
    said = entry["properties"]
    code = said.get("proj:code") or next((a["proj:code"] for a in entry["assets"].values() if a.get("proj:code")), None)
    return str(code or f"EPSG:{said['proj:epsg']}")


def corner_of_item(entry: dict[str, Any]) -> tuple[float, float]:
    """Top left of its ground."""
    said = [source["proj:transform"] for source in (entry["properties"], *entry["assets"].values()) if source.get("proj:transform")]  # fmt: skip
    return (float(said[0][2]), float(said[0][5])) if said else CORNER


def grid_of(gsd_m: float, corner: tuple[float, float] = CORNER, crs: str = CRS, side_m: float = SIDE_M) -> Grid:
    pixels = round(side_m / gsd_m)
    return Grid(crs, (gsd_m, 0.0, corner[0], 0.0, -gsd_m, corner[1]), pixels, pixels)


def write(
    path: Path, pixels_CHW: np.ndarray, grid: Grid, nodata: float | None = None, driver: str = "GTiff", **options: Any
) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"QUALITY": "100", "REVERSIBLE": "YES", "YCBCR420": "NO"} if driver == "JP2OpenJPEG" else {}
    with rasterio.open(
        path, "w", driver=driver, count=len(pixels_CHW), height=grid.height, width=grid.width, dtype=pixels_CHW.dtype, nodata=nodata,
        crs=grid.crs, transform=Affine(*grid.transform), **lossless, **options,
    ) as dataset:  # fmt: skip
        dataset.write(pixels_CHW)
    return str(path)


@dataclass
class Scene:
    """A Sentinel-2 scene: what lies in the files (digital numbers per band, at their own sizes) and what that means.

    offset_dn: added to the reflectances in the files, +1000 or 0.
    """

    folder: Path
    offset_dn: int = 1000
    seed: int = 0
    corner: tuple[float, float] = CORNER
    crs: str = CRS
    bands: Iterable[str] = tuple(band for band in COMMON if band != "B10")
    reflectance: dict[str, np.ndarray] = field(default_factory=dict)
    scl: np.ndarray = field(default_factory=lambda: np.full((30, 30), 4, np.uint8))
    cloud_probability: np.ndarray = field(default_factory=lambda: np.full((30, 30), 12, np.uint8))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for band in self.bands:
            side = SIDE_M // NATIVE_M.get(band, 20)
            self.reflectance[band] = rng.integers(20, 4000, (side, side)).astype(np.uint16)
        self.scl[3:6, 3:6], self.scl[10, 10] = 9, 3

    @classmethod
    def of(cls, name: str, folder: Path, **more: Any) -> Scene:
        """A scene at the place of a published item."""
        entry = published(name)
        return cls(folder, corner=corner_of_item(entry), crs=crs_of_item(entry), **more)

    def grid(self, gsd_m: float) -> Grid:
        return grid_of(gsd_m, self.corner, self.crs)

    def file(self, name: str, values: np.ndarray, gsd_m: float, nodata: float | None = 0) -> str:
        """name: with its ending, which decides about the format."""
        driver = "JP2OpenJPEG" if name.endswith(".jp2") else "GTiff"
        plane = values[None] if values.ndim == 2 else values
        return write(self.folder / name, plane, self.grid(gsd_m), None if driver == "JP2OpenJPEG" else nodata, driver)

    def numbers(self, band: str, gsd_m: int) -> np.ndarray:
        """Digital numbers of a band at a pixel size: its own, or (wrong if read) a resampled copy that is 7 too high."""
        native = NATIVE_M.get(band, 20)
        own = self.reflectance[band] + self.offset_dn
        if gsd_m == native:
            return own.astype(np.uint16)
        side = SIDE_M // gsd_m
        index = np.arange(side) * gsd_m // native
        return (own[np.ix_(index, index)] + 7).astype(np.uint16)

    def content(self, about: str, bands: list[str], gsd_m: int) -> np.ndarray:
        """What lies in a file: by its bands, or by what its key and file name say of it."""
        side = SIDE_M // gsd_m
        if len(bands) == 1:
            return self.numbers(bands[0], gsd_m)
        if len(bands) == 3 or "pvi" in about or "tci" in about:
            return np.full((3, side, side), 77, np.uint8)
        if "scl" in about:
            return self.scl if gsd_m == 20 else np.full((side, side), 9, np.uint8)
        if "cld" in about or "snw" in about:
            return self.cloud_probability if "cld" in about else np.full((side, side), 90, np.uint8)
        return np.ones((side, side), np.uint16)  # aerosols, water vapour


def sentinel2(
    name: str, scene: Scene, untouched: Callable[[str, dict[str, Any]], bool] = lambda key, asset: False
) -> dict[str, Any]:
    """A published Sentinel-2 item whose rasters lie in the scene's folder. untouched: assets whose hrefs stay out of reach."""
    entry = published(name)
    for key, asset in entry["assets"].items():
        kind = asset.get("type", "")
        if not ("tiff" in kind or "jp2" in kind) or untouched(key, asset):
            continue
        listed = asset.get("eo:bands") or asset.get("bands") or []
        bands = [BAND_OF.get(band["name"], band["name"]) for band in listed]
        said = asset.get("proj:transform")
        gsd = int(said[0]) if said else int(asset.get("gsd") or 10)
        ending = asset["href"].rpartition(".")[2]
        gsd = gsd if SIDE_M % gsd == 0 else 60  # previews of 320 m
        about = f"{key} {asset['href'].rpartition('/')[2]}".lower()
        asset["href"] = scene.file(f"{key}.{ending}", scene.content(about, bands, gsd), gsd)
        _shrink(asset, scene.grid(gsd))
    return entry


def _shrink(fields: dict[str, Any], grid: Grid) -> None:
    """What is declared of a file's extent, for a smaller file."""
    for key, value in (("proj:shape", list(grid.shape)), ("proj:bbox", list(grid.bounds))):
        if key in fields:
            fields[key] = value


def item(
    name: str, assets: dict[str, Any], properties: dict[str, Any], collection: str = "", grid: Grid | None = None
) -> dict[str, Any]:
    """An item of nobody's, for what no provider publishes."""
    west, south, east, north = bbox_wgs84(*(lambda g: (g.crs, g.bounds))(grid or grid_of(10)))
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "links": [], "assets": assets,
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [west, south, east, north],
        "properties": {"datetime": "2023-07-01T10:46:30.262000Z", **properties},
    }  # fmt: skip


# how each provider keeps backscatter: item, pixel size, nodata
RTC = {
    "pc": ("planetary_computer_s1_rtc", 10, -32768.0),
    "aws": ("aws_s1_rtc", 20, 0.0),
    "opera": ("opera_s1_rtc", 30, float("nan")),
}


def rtc(folder: Path, provider: str, db: np.ndarray, incidence_deg: float = 34.0) -> dict[str, Any]:
    """Sentinel-1 RTC of the Planetary Computer (`vv`), of AWS (`gamma0_vv`, MGRS tiles) or OPERA (`0_VV`, bursts), of `db` [2, H, W]."""
    name, gsd, nodata = RTC[provider]
    entry = published(name)
    crs = "EPSG:32617" if provider == "opera" else crs_of_item(entry)  # OPERA's items say nothing of the projection
    grid = grid_of(gsd, corner_of_item(entry), crs)
    power = (10 ** (db / 10)).astype(np.float32)
    for key, asset in entry["assets"].items():
        if key.lower().endswith(("vv", "vh")) and not key.startswith("s3_"):
            plane = power[0 if key.lower().endswith("vv") else 1]
            asset["href"] = write(folder / f"{key}.tif", plane[None], grid, nodata)
        elif key == "incidence":
            angle = np.full((1, *grid.shape), round(incidence_deg * 100), np.uint16)
            asset["href"] = write(folder / "incidence.tif", angle, grid, 0)
        elif key == "0_mask":
            asset["href"] = write(folder / "mask.tif", np.zeros((1, *grid.shape), np.uint8), grid, 255)
    _shrink(entry["properties"], grid)
    return entry


def grd(name: str, folder: Path) -> dict[str, Any]:
    """Sentinel-1 GRD as it is delivered: amplitudes in radar geometry, placed by ground control points."""
    entry = published(name)
    points = [
        rasterio.control.GroundControlPoint(row, col, 10 + col / 1000, 50 - row / 1000)
        for row in (0, 63)
        for col in (0, 63)
    ]
    for key in ("vv", "vh"):
        path = folder / f"{key}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", count=1, height=64, width=64, dtype="uint16", gcps=points, crs="EPSG:4326"
        ) as dataset:
            dataset.write(np.full((1, 64, 64), 250, np.uint16))
        entry["assets"][key]["href"] = str(path)
    return entry


def landsat(folder: Path, stored: dict[str, np.ndarray], quality: np.ndarray) -> dict[str, Any]:
    """Landsat Collection 2 Level 2 of the Planetary Computer: stored numbers by common name [H, W] at 30 m, and QA_PIXEL."""
    entry = published("planetary_computer_landsat_c2_l2")
    grid = Grid(
        crs_of_item(entry),
        (30.0, 0.0, corner_of_item(entry)[0], 0.0, -30.0, corner_of_item(entry)[1]),
        *quality.shape[::-1],
    )
    for key, values in (*stored.items(), ("qa_pixel", quality)):
        nodata = entry["assets"][key]["raster:bands"][0]["nodata"]
        entry["assets"][key]["href"] = write(folder / f"{key}.tif", values[None], grid, nodata)
    _shrink(entry["properties"], grid)
    return entry


def naip(folder: Path, pixels: np.ndarray, shift_m: float = 0.0, name: str = "", year: int = 0) -> dict[str, Any]:
    """A NAIP quad of the Planetary Computer: one file of four bands, Red Green Blue NIR. shift_m: moved east."""
    entry = published("planetary_computer_naip")
    corner = corner_of_item(entry)
    grid = grid_of(0.6, (corner[0] + shift_m, corner[1]), crs_of_item(entry), side_m=36)
    entry["assets"]["image"]["href"] = write(folder / f"{name or 'quad'}.tif", pixels, grid)
    entry["properties"]["proj:transform"] = [*grid.transform, 0.0, 0.0, 1.0]
    _shrink(entry["properties"], grid)
    if name:
        entry["id"] = name
    if year:
        entry["properties"] |= {"datetime": f"{year}-04-15T16:00:00Z", "naip:year": str(year)}
    return entry


def maxar(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    """Maxar Open Data (ARD): `visual` of three bytes, `ms_analytic` of eight bands, `pan_analytic`; bands are called BAND_R …"""
    entry = published("maxar_open_data")
    corner, crs = corner_of_item(entry), crs_of_item(entry)
    for key, asset in entry["assets"].items():
        if "tiff" not in asset["type"]:
            continue
        grid = grid_of(asset["proj:transform"][0], corner, crs, side_m=pixels.shape[-1] * 0.30517578125)
        values = pixels if key == "visual" else np.full((len(asset["eo:bands"]), *grid.shape), 500, np.uint16)
        asset["href"] = write(folder / f"{key}.tif", values, grid, None if key == "visual" else 0)
        _shrink(asset, grid)
        if key == "visual":
            _shrink(entry["properties"], grid)
    return entry
