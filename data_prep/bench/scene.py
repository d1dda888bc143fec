"""One whole Sentinel-2 scene on disk: ten tiled, compressed GeoTIFFs and a STAC item, made block by block."""

from __future__ import annotations

import json
import os

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from data_prep.geo import bbox_wgs84
from data_prep.schema import MODALITIES

BLOCK = 512
WRITTEN_ROWS = (
    1024  # the sites of the benchmark lie there; the rest of the file is declared but empty, which costs no disk
)
EAST, NORTH, CRS = 300_000.0, 5_300_040.0, "EPSG:32633"  # tile corners of Sentinel-2 lie on multiples of 10 m


def make_scene(folder: str, side_px: int) -> str:
    """Writes the scene; returns its catalog (a folder of one item). All bands at 10 m, plausible noise over gradients."""
    bounds = (EAST, NORTH - side_px * 10.0, EAST + side_px * 10.0, NORTH)
    items, images = os.path.join(folder, "items"), os.path.join(folder, "images")
    os.makedirs(items)
    os.makedirs(images)
    assets = {}
    for band in MODALITIES["s2"].bands:
        path = os.path.join(images, f"{band}.tif")
        _write_band(path, side_px)
        assets[band] = {
            "href": path, "type": "image/tiff; application=geotiff; profile=cloud-optimized", "roles": ["data"],
            "eo:bands": [{"name": band}], "raster:bands": [{"nodata": 0, "data_type": "uint16"}],
            "proj:code": CRS, "proj:transform": [10.0, 0.0, EAST, 0.0, -10.0, NORTH], "proj:shape": [side_px, side_px],
        }  # fmt: skip
    west, south, east, north = bbox_wgs84(CRS, bounds)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "S2A_MSIL2A_20210705T101031_N0301_R022_T33TWN",
        "bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]}, "links": [],
        "properties": {
            "datetime": "2021-07-05T10:10:31Z", "s2:processing_baseline": "03.01", "processing:level": "L2A", "proj:code": CRS,
        },
        "assets": assets,
    }  # fmt: skip
    with open(os.path.join(items, "item.json"), "w") as stream:
        json.dump(item, stream)
    return items


def _write_band(path: str, side_px: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (BLOCK, BLOCK)).astype(np.uint16)
    profile = {
        "driver": "GTiff", "width": side_px, "height": side_px, "count": 1, "dtype": "uint16", "crs": CRS, "nodata": 0,
        "transform": from_origin(EAST, NORTH, 10, 10), "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK,
        "compress": "deflate", "zlevel": 1, "predictor": 2, "sparse_ok": True,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as dataset:
        for row in range(0, min(side_px, WRITTEN_ROWS), BLOCK):
            for column in range(0, side_px, BLOCK):
                height, width = min(BLOCK, side_px - row), min(BLOCK, side_px - column)
                values = 300 + (row + column) // 20 + noise[:height, :width]
                dataset.write(values.astype(np.uint16), 1, window=Window(column, row, width, height))
