"""A target planted at a known point lands on that point in every modality, whatever grid and CRS the sources have.

Each sensor sees the same round blob, sampled at its own pixel centres on its own, mutually misaligned grid. After reading, the
blob's centroid must lie within a tenth of a pixel of the true point.
"""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.config import GridConfig
from data_prep.geo import Grid, transformer, utm_code
from data_prep.sources import open_catalog, read_site
from data_prep.sources.items import AssetFields
from tests.scenes import S2_BANDS, item, write_cube, write_items, write_tiff

RADIUS_M = 22.0
PLACES = {
    "UTM north": (12.4711, 52.3187, True),
    "UTM south": (-70.91, -23.456, True),
    "EPSG:4326": (73.3051, 30.4642, False),
}


def source_grid(
    lon: float, lat: float, gsd_m: float, shift_px: tuple[float, float], projected: bool, side_m: float = 360
) -> Grid:
    """A grid around the target in UTM or degrees, its corner shifted by a fraction of a pixel."""
    pixels = round(side_m / gsd_m)
    if projected:
        crs, step_x, step_y = utm_code(lon, lat), gsd_m, gsd_m
        x, y = transformer("EPSG:4326", crs).transform(lon, lat)
        x, y = np.floor(x / 10) * 10, np.floor(y / 10) * 10
    else:
        crs, step_y = "EPSG:4326", gsd_m / 110_900
        step_x = gsd_m / (111_320 * np.cos(np.radians(lat)))
        x, y = lon, lat
    left, top = x - (pixels // 2 - shift_px[0]) * step_x, y + (pixels // 2 - shift_px[1]) * step_y
    return Grid(crs, (step_x, 0.0, float(left), 0.0, -step_y, float(top)), pixels, pixels)


def blob(grid: Grid, lon: float, lat: float) -> np.ndarray:
    """exp(-r²/2R²), r = distance on the ground from the target to each pixel centre."""
    a, _, c, _, e, f = grid.transform
    xs, ys = np.meshgrid(c + a * (np.arange(grid.width) + 0.5), f + e * (np.arange(grid.height) + 0.5))
    metric = utm_code(lon, lat)
    mx, my = transformer(grid.crs, metric).transform(xs, ys)
    tx, ty = transformer("EPSG:4326", metric).transform(lon, lat)
    return np.exp(-((mx - tx) ** 2 + (my - ty) ** 2) / (2 * RADIUS_M**2))


def centroid_lonlat(weights: np.ndarray, transform: tuple, crs: str) -> tuple[float, float]:
    weights = np.clip(weights - 0.02 * weights.max(), 0, None)
    rows, cols = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    col, row = (cols * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()
    a, b, c, d, e, f = transform
    return transformer(crs, "EPSG:4326").transform(a * col + b * row + c, d * col + e * row + f)


def write_site(folder, lon: float, lat: float, projected: bool):
    hr_grid = source_grid(lon, lat, 0.5, (0.31, 0.77), projected, 220)
    s2_grid = source_grid(lon, lat, 10, (0.0, 0.0), projected)
    s2_coarse = source_grid(lon, lat, 20, (0.5, 0.5), projected)
    s1_grid = source_grid(lon, lat, 10, (0.43, -0.28), projected)
    moment = {"datetime": "2021-06-01T10:00:00Z"}
    hr = (blob(hr_grid, lon, lat) * 200 + 20).astype(np.uint8)
    hr_href = write_tiff(folder / "hr.tif", np.stack([hr] * 3), hr_grid)
    assets = {"hr": AssetFields("hr", hr_href, bands=("R", "G", "B"), grid=hr_grid, **moment)}
    for band in S2_BANDS:
        grid = s2_grid if band in ("B02", "B03", "B04", "B08") else s2_coarse
        pixels = (blob(grid, lon, lat) * 6000 + 200).round().astype(np.uint16)
        href = write_tiff(folder / f"{band}.tif", pixels[None], grid)
        assets[band] = AssetFields("s2", href, bands=(band,), grid=grid, baseline="03.00", **moment)
    power = blob(s1_grid, lon, lat) + 0.01
    db = (10 * np.log10(np.stack([power, power / 5])))[None].astype(np.float32)
    href = write_cube(
        folder / "s1.zarr", db, s1_grid, ("VV", "VH"), ["2021-06-02T05:00:00Z"], unit="dB", orbits=["ascending"]
    )
    assets["s1"] = AssetFields("s1", href, "application/vnd+zarr", ("VV", "VH"), s1_grid)
    return write_items(folder / "items", [item("target", assets)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("grid", [GridConfig(), GridConfig(hr_gsd_m=0.3)], ids=["native", "hr at 0.3 m"])
def test_a_known_point_lands_on_itself_in_every_modality(tmp_path, place, grid):
    lon, lat, projected = PLACES[place]
    (record,) = open_catalog(write_site(tmp_path, lon, lat, projected))
    site = read_site(record, grid)
    assert set(site.series) == {"hr", "s2", "s1"}
    to_metres = transformer("EPSG:4326", utm_code(lon, lat))
    true_x, true_y = to_metres.transform(lon, lat)
    for name, series in site.series.items():
        assert (series.mask_THW == 1).all()
        for band, pixels in enumerate(series.pixels_TCHW[0].astype(float)):
            weights = 10 ** (pixels / 10) - 0.01 / (1, 5)[band] if name == "s1" else pixels - pixels.min()
            x, y = to_metres.transform(*centroid_lonlat(weights, series.transform, site.crs))
            error_px = np.hypot(x - true_x, y - true_y) / series.gsd_m
            assert error_px < 0.1, f"{name} band {band}: {error_px:.3f} px off"


def test_every_modality_covers_the_same_ground(tmp_path):
    lon, lat, projected = PLACES["UTM south"]
    (record,) = open_catalog(write_site(tmp_path, lon, lat, projected))
    site = read_site(record, GridConfig())
    for series in site.series.values():
        height, width = series.pixels_TCHW.shape[-2:]
        np.testing.assert_allclose(Grid(site.crs, series.transform, width, height).bounds, site.footprint, atol=1e-6)
    west, south, east, north = site.bbox_wgs84
    assert west < lon < east
    assert south < lat < north
    assert site.crs == "EPSG:32719"
