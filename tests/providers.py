"""Items as the providers publish them, with the hrefs pointed at small local files of the same bands, types, scales and nodata.

Keys, roles, media types, band lists, projection and raster fields are those of real items: stactools-sentinel2 (whose layout the
Planetary Computer's and Element 84's items come from), odc-stac's copies of Planetary Computer items, stactools-sentinel1's RTC example,
eopf-stac's asset table; Copernicus Data Space, NAIP and Maxar Open Data by their collections' item_assets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine

from data_prep.geo import Grid, bbox_wgs84

COMMON = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1", "B06": "rededge2", "B07": "rededge3",
    "B08": "nir", "B8A": "nir08", "B09": "nir09", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
NATIVE_M = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60}
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
PRODUCT = "S2B_MSIL2A_20230701T103631_N0509_R008_T31UFU_20230701T134500"
CORNER = (600000.0, 5800020.0)
SIDE_M = 600


def grid_of(
    gsd_m: float, corner: tuple[float, float] = CORNER, crs: str = "EPSG:32631", side_m: float = SIDE_M
) -> Grid:
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
    extension: str = ".tif"
    corner: tuple[float, float] = CORNER
    bands: Iterable[str] = tuple(COMMON)
    reflectance: dict[str, np.ndarray] = field(default_factory=dict)
    scl: np.ndarray = field(default_factory=lambda: np.full((30, 30), 4, np.uint8))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for band in self.bands:
            side = SIDE_M // NATIVE_M.get(band, 20)
            self.reflectance[band] = rng.integers(20, 4000, (side, side)).astype(np.uint16)
        self.scl[3:6, 3:6], self.scl[10, 10] = 9, 3

    def file(self, name: str, values: np.ndarray, gsd_m: float, nodata: float | None = 0) -> str:
        driver = "JP2OpenJPEG" if self.extension == ".jp2" else "GTiff"
        plane = values[None] if values.ndim == 2 else values
        nodata = None if driver == "JP2OpenJPEG" else nodata
        return write(self.folder / f"{name}{self.extension}", plane, grid_of(gsd_m, self.corner), nodata, driver)

    def numbers(self, band: str, gsd_m: int) -> np.ndarray:
        """Digital numbers of a band at a pixel size: its own, or (wrong if read) a resampled copy that is 7 too high."""
        native = NATIVE_M.get(band, 20)
        own = self.reflectance[band] + self.offset_dn
        if gsd_m == native:
            return own.astype(np.uint16)
        side = SIDE_M // gsd_m
        index = np.arange(side) * gsd_m // native
        return (own[np.ix_(index, index)] + 7).astype(np.uint16)

    def picture(self, gsd_m: int = 10) -> np.ndarray:
        return np.full((3, SIDE_M // gsd_m, SIDE_M // gsd_m), 77, np.uint8)


def projection(gsd_m: float, corner: tuple[float, float] = CORNER) -> dict[str, Any]:
    grid = grid_of(gsd_m, corner)
    return {"proj:shape": list(grid.shape), "proj:transform": list(grid.transform), "proj:bbox": list(grid.bounds)}


def item(
    name: str, assets: dict[str, Any], properties: dict[str, Any], collection: str = "", grid: Grid | None = None
) -> dict[str, Any]:
    west, south, east, north = bbox_wgs84(*(lambda g: (g.crs, g.bounds))(grid or grid_of(10)))
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "links": [], "assets": assets,
        "geometry": {"type": "Polygon", "coordinates": [ring]}, "bbox": [west, south, east, north],
        "properties": {"datetime": "2023-07-01T10:46:30.262000Z", **properties},
    }  # fmt: skip


def stactools(scene: Scene) -> dict[str, Any]:
    """stactools-sentinel2: every band at every size its product has, the coarser copies first, JPEG 2000, TCI as `visual`."""
    assets: dict[str, Any] = {}
    for band, common in COMMON.items():
        for gsd in (60, 20, 10):
            native = NATIVE_M.get(band, 20)
            if gsd < native:
                continue
            key = common if gsd == native else f"{common}_{gsd}m"
            about: dict[str, Any] = {
                "href": scene.file(f"{band}_{gsd}m", scene.numbers(band, gsd), gsd), "type": "image/jp2", "roles": ["data", "reflectance"],
                "eo:bands": [{"name": band, "common_name": common}], **projection(gsd, scene.corner),
                "raster:bands": [{"nodata": 0, "data_type": "uint16", "spatial_resolution": gsd, "scale": 0.0001, "offset": -0.1 if scene.offset_dn else 0}],
            }  # fmt: skip
            assets[key] = about | ({"gsd": gsd} if gsd == native else {})
    rgb = [{"name": band, "common_name": COMMON[band]} for band in ("B04", "B03", "B02")]
    for gsd in (60, 20, 10):
        href = scene.file(f"TCI_{gsd}m", scene.picture(gsd), gsd)
        assets["visual" if gsd == 10 else f"visual_{gsd}m"] = {
            "href": href, "type": "image/jp2", "roles": ["visual", "data"], "eo:bands": rgb, "gsd": gsd, **projection(gsd, scene.corner),
        }  # fmt: skip
    for name, gsd in (("scl_60m", 60), ("scl", 20)):
        values = scene.scl if gsd == 20 else np.full((10, 10), 9, np.uint8)
        assets[name] = {
            "href": scene.file(name, values, gsd),
            "type": "image/jp2",
            "roles": ["data"],
            "gsd": gsd,
            **projection(gsd, scene.corner),
        }
    assets["aot"] = {
        "href": scene.file("AOT", np.ones((30, 30), np.uint16), 20),
        "type": "image/jp2",
        "roles": ["data"],
        **projection(20),
    }
    assets["preview"] = {
        "href": scene.file("PVI", scene.picture(60), 60),
        "type": "image/jp2",
        "roles": ["overview"],
        **projection(60),
    }
    assets["product_metadata"] = {"href": "MTD_MSIL2A.xml", "type": "application/xml", "roles": ["metadata"]}
    baseline = "05.09" if scene.offset_dn else "02.12"
    properties = {
        "platform": "sentinel-2b", "constellation": "sentinel-2", "proj:epsg": 32631, "s2:processing_baseline": baseline, "eo:cloud_cover": 10.0,
        "s2:product_uri": f"{PRODUCT}.SAFE", "sat:relative_orbit": 8, "grid:code": "MGRS-31UFU",
    }  # fmt: skip
    return item("S2B_T31UFU_20230701T104630_L2A", dict(reversed(assets.items())), properties)


def planetary_computer(scene: Scene) -> dict[str, Any]:
    """Planetary Computer: keys B02 …, no raster:bands at all, `visual` listed as data, `preview` a GeoTIFF."""
    assets: dict[str, Any] = {}
    for band, common in COMMON.items():
        gsd = NATIVE_M.get(band, 20)
        assets[band] = {
            "href": scene.file(band, scene.numbers(band, gsd), gsd), "type": COG, "roles": ["data"], "gsd": gsd, **projection(gsd),
            "eo:bands": [{"name": band, "common_name": common, "description": band}],
        }  # fmt: skip
    rgb = [{"name": band, "common_name": COMMON[band]} for band in ("B04", "B03", "B02")]
    assets = {
        "AOT": {
            "href": scene.file("AOT", np.ones((60, 60), np.uint16), 10),
            "type": COG,
            "roles": ["data"],
            "gsd": 10.0,
        },
        **assets,
        "SCL": {
            "href": scene.file("SCL", scene.scl, 20),
            "type": COG,
            "roles": ["data"],
            "gsd": 20.0,
            **projection(20),
        },
        "visual": {
            "href": scene.file("TCI", scene.picture(), 10),
            "type": COG,
            "roles": ["data"],
            "eo:bands": rgb,
            **projection(10),
        },
        "preview": {"href": scene.file("PVI", scene.picture(60), 60), "type": COG, "roles": ["thumbnail"]},
        "safe-manifest": {"href": "manifest.safe", "type": "application/xml", "roles": ["metadata"]},
        "tilejson": {
            "href": "https://planetarycomputer.microsoft.com/x.json",
            "type": "application/json",
            "roles": ["tiles"],
        },
    }
    properties = {
        "platform": "Sentinel-2B", "constellation": "Sentinel 2", "proj:epsg": 32631, "s2:processing_baseline": "05.09", "sat:relative_orbit": 8,
        "s2:product_uri": f"{PRODUCT}.SAFE", "sat:orbit_state": "descending", "s2:mgrs_tile": "31UFU",
    }  # fmt: skip
    return item(PRODUCT.replace("_N0509", ""), assets, properties, "sentinel-2-l2a")


def earth_search_v1(scene: Scene, twins: bool = True) -> dict[str, Any]:
    """Earth Search v1: GeoTIFF and, for whoever pays, JPEG 2000 twins; the offset is removed and still declared."""
    assets: dict[str, Any] = {}
    for band, common in COMMON.items():
        gsd = NATIVE_M.get(band, 20)
        about: dict[str, Any] = {
            "roles": ["data", "reflectance"], "eo:bands": [{"name": common, "common_name": common}], "gsd": gsd, **projection(gsd),
            "raster:bands": [{"nodata": 0, "data_type": "uint16", "bits_per_sample": 15, "spatial_resolution": gsd, "scale": 0.0001, "offset": -0.1}],
        }  # fmt: skip
        if twins:
            assets[f"{common}-jp2"] = about | {
                "href": f"s3://sentinel-s2-l2a/tiles/31/U/FU/2023/7/1/0/{band}.jp2",
                "type": "image/jp2",
            }
        assets[common] = about | {"href": scene.file(band, scene.numbers(band, gsd), gsd), "type": COG}
    rgb = [{"name": name, "common_name": name} for name in ("red", "green", "blue")]
    assets["visual"] = {
        "href": scene.file("TCI", scene.picture(), 10),
        "type": COG,
        "roles": ["visual"],
        "eo:bands": rgb,
        **projection(10),
    }
    assets["scl"] = {
        "href": scene.file("SCL", scene.scl, 20),
        "type": COG,
        "roles": ["data", "reflectance"],
        **projection(20),
    }
    assets["scl-jp2"] = {
        "href": "s3://sentinel-s2-l2a/tiles/31/U/FU/2023/7/1/0/SCL.jp2",
        "type": "image/jp2",
        "roles": ["data"],
    }
    assets["thumbnail"] = {"href": "https://x/preview.jpg", "type": "image/jpeg", "roles": ["thumbnail"]}
    properties = {
        "platform": "sentinel-2b", "constellation": "sentinel-2", "proj:epsg": 32631, "s2:processing_baseline": "05.09",
        "s2:product_uri": f"{PRODUCT}.SAFE", "earthsearch:boa_offset_applied": True, "eo:cloud_cover": 10.0,
    }  # fmt: skip
    return item("S2B_31UFU_20230701_0_L2A", assets, properties, "sentinel-2-l2a")


def earth_search_c1(scene: Scene, probability: np.ndarray) -> dict[str, Any]:
    """Earth Search Collection 1: offset in the pixels and declared; `scl`, cloud and snow *probabilities*."""
    made = earth_search_v1(scene, twins=False)
    made |= {"id": "S2B_T31UFU_20230701T104630_L2A", "collection": "sentinel-2-c1-l2a"}
    made["properties"].pop("earthsearch:boa_offset_applied")
    made["properties"] |= {"proj:code": "EPSG:32631"}
    made["assets"].pop("scl-jp2")
    for name, role in (("cloud", "cloud"), ("snow", "snow-ice")):
        href = scene.file(f"{'CLD' if name == 'cloud' else 'SNW'}_20m", probability, 20)
        made["assets"] = {name: {
            "href": href, "type": COG, "roles": ["data", role], "title": f"{name.title()} Probabilities", **projection(20),
            "raster:bands": [{"nodata": 0, "data_type": "uint8", "spatial_resolution": 20}],
        }} | made["assets"]  # fmt: skip
    return made


def data_space(scene: Scene) -> dict[str, Any]:
    """Copernicus Data Space: STAC 1.1 (`bands`, `nodata`, `raster:scale` on the asset), every size, JPEG 2000, `SCL_20m`."""
    assets: dict[str, Any] = {}
    for gsd in (60, 20, 10):
        for band, common in COMMON.items():
            native = NATIVE_M.get(band, 20)
            if gsd < native:
                continue
            assets[f"{band}_{gsd}m"] = {
                "href": scene.file(f"{band}_{gsd}m", scene.numbers(band, gsd), gsd), "type": "image/jp2", "gsd": gsd,
                "roles": ["data", "reflectance", "sampling:original" if gsd == native else "sampling:downsampled", f"gsd:{gsd}m"],
                "bands": [{"name": band, "eo:common_name": common, "eo:center_wavelength": 0.49}],
                "nodata": 0, "data_type": "uint16", "raster:scale": 0.0001, "raster:offset": -0.1,
                "proj:code": "EPSG:32631", **projection(gsd),
            }  # fmt: skip
        assets[f"TCI_{gsd}m"] = {
            "href": scene.file(f"TCI_{gsd}m", scene.picture(gsd), gsd), "type": "image/jp2", "roles": ["visual", f"gsd:{gsd}m"], "gsd": gsd,
            "bands": [{"name": band, "eo:common_name": COMMON[band]} for band in ("B04", "B03", "B02")], "data_type": "uint8",
            "proj:code": "EPSG:32631", **projection(gsd),
        }  # fmt: skip
    assets["SCL_60m"] = {
        "href": scene.file("SCL_60m", np.full((10, 10), 9, np.uint8), 60),
        "type": "image/jp2",
        "roles": ["data"],
        **projection(60),
    }
    assets["SCL_20m"] = {
        "href": scene.file("SCL_20m", scene.scl, 20),
        "type": "image/jp2",
        "roles": ["data"],
        **projection(20),
    }
    assets["thumbnail"] = {"href": "https://x/t.jpg", "type": "image/jpeg", "roles": ["thumbnail", "overview"]}
    assets["Product"] = {
        "href": "https://x/$value",
        "type": "application/zip",
        "roles": ["data", "metadata", "archive"],
    }
    properties = {
        "platform": "sentinel-2b", "constellation": "sentinel-2", "processing:level": "L2", "processing:version": "05.09",
        "product:type": "S2MSI2A", "sat:relative_orbit": 8, "grid:code": "MGRS-31UFU", "eo:cloud_cover": 10.0,
    }  # fmt: skip
    return item(PRODUCT, assets, properties, "sentinel-2-l2a") | {"stac_version": "1.1.0"}


def rtc(folder: Path, provider: str, db: np.ndarray) -> dict[str, Any]:
    """Sentinel-1 RTC of the Planetary Computer (`vv`), of AWS (`gamma0_vv`, MGRS tiles at 20 m) or OPERA (`0_VV`, bursts at 30 m)."""
    gsd = {"pc": 10, "aws": 20, "opera": 30}[provider]
    grid = grid_of(gsd)
    power = (10 ** (db / 10)).astype(np.float32)
    nodata = {"pc": -32768.0, "aws": 0.0, "opera": np.nan}[provider]
    hrefs = [write(folder / f"{name}.tif", plane[None], grid, nodata) for name, plane in zip(("VV", "VH"), power)]
    if provider == "pc":
        assets = {
            name: {"href": href, "type": COG, "roles": ["data"], **projection(10)}
            for name, href in zip(("vh", "vv"), hrefs[::-1])
        }
        properties = {
            "platform": "SENTINEL-1A", "constellation": "Sentinel-1", "proj:epsg": 32631, "sar:product_type": "GRD", "sat:orbit_state": "ascending",
            "sat:relative_orbit": 121, "sar:polarizations": ["VV", "VH"],
        }  # fmt: skip
        return item(
            "S1A_IW_GRDH_1SDV_20200103T233556_20200103T233621_030643_0382F7_rtc", assets, properties, "sentinel-1-rtc"
        )
    if provider == "aws":
        assets = {
            f"gamma0_{name}": {"href": href, "type": COG, "roles": ["data", "gamma0"], "raster:bands": [{"nodata": 0, "sampling": "area", "data_type": "float32"}]}
            for name, href in zip(("vv", "vh"), hrefs)
        }  # fmt: skip
        angle = write(folder / "angle.tif", np.full((1, *grid.shape), 3400, np.uint16), grid, 0)
        assets["incidence"] = {
            "href": angle,
            "type": COG,
            "roles": ["data", "local-incidence-angle"],
            "raster:bands": [{"nodata": 0, "scale": 0.01, "unit": "degrees"}],
        }
        properties = {
            "constellation": "sentinel-1", "platform": "sentinel-1a", "sar:product_type": "RTC", "sat:orbit_state": "ascending", "proj:epsg": 32631,
            "sat:relative_orbit": 121, "proj:transform": [*grid.transform, 0.0, 0.0, 1.0], "proj:shape": list(grid.shape), "datetime": "2020-01-03T23:36:21Z",
        }  # fmt: skip
        return item("S1A_20200103_17RMJ_ASC", assets, properties)
    assets = {
        "0_VV": {
            "href": hrefs[0],
            "title": "Download VV.tif",
            "roles": ["data"],
            "type": "image/tiff; application=geotiff",
        },
        "0_VH": {
            "href": hrefs[1],
            "title": "Download VH.tif",
            "roles": ["data"],
            "type": "image/tiff; application=geotiff",
        },
        "0_mask": {"href": hrefs[1], "roles": ["data"], "type": "image/tiff; application=geotiff"},
        "browse": {"href": "https://x/b.png", "type": "image/png", "roles": ["browse"]},
        "metadata": {
            "href": "https://cmr.earthdata.nasa.gov/x.json",
            "type": "application/json",
            "roles": ["metadata"],
        },
    }
    name = "OPERA_L2_RTC-S1_T064-135524-IW2_20231213T121235Z_20231213T184607Z_S1A_30_v1.0"
    return item(name, assets, {"datetime": "2023-12-13T12:12:35Z"}, "OPERA_L2_RTC-S1_V1_1")


def naip(folder: Path, pixels: np.ndarray, corner: tuple[float, float], name: str, year: int = 2020) -> dict[str, Any]:
    """A NAIP quad: one file of four bands, Red Green Blue NIR."""
    grid = grid_of(0.6, corner, "EPSG:26911", side_m=36)
    href = write(folder / f"{name}.tif", pixels, grid)
    listed = [
        {"name": n, "common_name": c} for n, c in (("Red", "red"), ("Green", "green"), ("Blue", "blue"), ("NIR", "nir"))
    ]
    assets = {
        "image": {"href": href, "type": COG, "roles": ["data"], "eo:bands": listed},
        "thumbnail": {"href": "https://x/t.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
        "metadata": {"href": "https://x/m.txt", "type": "text/plain", "roles": ["metadata"]},
    }
    properties = {
        "gsd": 0.6, "naip:year": str(year), "naip:state": "ca", "datetime": f"{year}-04-15T16:00:00Z", "proj:epsg": 26911,
        "proj:shape": list(grid.shape), "proj:transform": list(grid.transform), "proj:bbox": list(grid.bounds), "providers": [],
    }  # fmt: skip
    return item(name, assets, properties, "naip", grid)


def maxar(folder: Path, pixels: np.ndarray) -> dict[str, Any]:
    """Maxar Open Data (ARD): `visual` of three bytes, `ms_analytic` of eight bands, `pan_analytic`; bands are called BAND_R …"""
    grid = grid_of(0.3, (600000.0, 5800020.0), "EPSG:32631", side_m=30)
    coarse = grid_of(1.2, (600000.0, 5800020.0), "EPSG:32631", side_m=30)
    rgb = [
        {"name": f"BAND_{n}", "common_name": c, "description": c}
        for n, c in (("R", "red"), ("G", "green"), ("B", "blue"))
    ]
    eight = [{"name": f"BAND_{n}", "common_name": c} for n, c in (
        ("C", "coastal"), ("B", "blue"), ("G", "green"), ("Y", "yellow"), ("R", "red"), ("RE", "rededge"), ("N", "nir08"), ("N2", "nir09"))]  # fmt: skip
    ms = write(folder / "ms.tif", np.full((8, *coarse.shape), 500, np.uint16), coarse, 0)
    assets = {
        "ms_analytic": {"href": ms, "type": COG, "roles": ["data"], "eo:bands": eight, "gsd": 1.2},
        "pan_analytic": {
            "href": ms,
            "type": COG,
            "roles": ["data"],
            "eo:bands": [{"name": "BAND_P", "description": "Pan"}],
        },
        "visual": {
            "href": write(folder / "visual.tif", pixels, grid),
            "type": COG,
            "roles": ["visual"],
            "eo:bands": rgb,
            "gsd": 0.3,
        },
        "data-mask": {"href": "x.gpkg", "type": "application/geopackage+sqlite3", "roles": ["data-mask"]},
    }
    properties = {
        "platform": "WV03",
        "gsd": 0.3,
        "datetime": "2022-11-21T03:18:42Z",
        "proj:epsg": 32631,
        "catalog_id": "10300100CB626A00",
    }
    return item("48-300020121333-10300100CB626A00", assets, properties, "", grid)
