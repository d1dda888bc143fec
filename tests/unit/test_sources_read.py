"""From STAC items to harmonised sites: alignment, dates, masks, splitting, and every bad input by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle

import numpy as np
import pytest
import zarr

from cluster.errors import UsageError
from data_prep.config import GridConfig
from data_prep.geo import Grid, crs_of
from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA
from data_prep.sources import SiteRecord, SourceFault, open_catalog, read_site, split_site
from data_prep.sources.items import AssetFields
from tests.scenes import GRID, S2_BANDS, item, s1_pixels, s2_item, s2_pixels, write_cube, write_items, write_tiff

NATIVE = GridConfig()


def only(folder, items, faults=None):
    (record,) = open_catalog(write_items(folder / "items", items), faults)
    return record


def cube_item(folder, pixels, grid=GRID, name="site", datetimes=None, fmt=3, modality="s2", **attributes):
    bands = MODALITIES[modality].bands
    datetimes = datetimes or [f"2021-06-{day + 1:02d}T10:00:00Z" for day in range(len(pixels))]
    href = write_cube(folder / f"{name}.zarr", pixels, grid, bands, datetimes, fmt, **attributes)
    return item(
        name, {modality: AssetFields(modality, href, "application/vnd+zarr", bands, grid)}, times=sorted(datetimes)
    )


def test_a_geotiff_comes_through_bit_for_bit(tmp_path):
    pixels = s2_pixels(1)[0]
    site = read_site(only(tmp_path, [s2_item(tmp_path, pixels=pixels)]), NATIVE)
    series = site.series["s2"]
    assert (series.pixels_TCHW[0] == pixels).all()
    assert (series.mask_THW == CLEAR).all()
    assert (series.transform, site.crs, site.footprint) == (GRID.transform, GRID.crs, GRID.bounds)
    assert series.datetimes == ["2021-06-01T10:00:00Z"]
    assert "." not in site.key
    assert "resampled" not in series.decisions[0]


@pytest.mark.parametrize("fmt", [2, 3])
def test_zarr_2_and_3_cubes_with_baselines_orbits_and_masks_per_date(tmp_path, fmt):
    pixels = np.concatenate([s2_pixels(2, dates=2, low=50), s2_pixels(3, dates=1, low=1050)])
    pixels[1, :, 2, 3] = 0
    entry = cube_item(tmp_path, pixels, fmt=fmt, baselines=["03.00", "03.00", "05.09"], product_ids=["a", "b", "c"])
    scl = np.full((3, 16, 16), 4, np.uint8)
    scl[2, 5, 5], scl[0, 0, 0] = 9, 3
    zarr.open_group(str(tmp_path / "site.zarr"), mode="a", zarr_format=fmt).create_array("scl", data=scl)
    series = read_site(only(tmp_path, [entry]), NATIVE).series["s2"]
    assert [d["offset_applied"] for d in series.decisions] == [0, 0, -1000]
    assert [d["pixels"] for d in series.decisions] == ["absent", "absent", "unclear"]  # 256 pixels prove no offset
    assert not any(d["flags"] for d in series.decisions)
    assert (series.pixels_TCHW[0] == pixels[0]).all()
    clear = series.mask_THW[1] != NODATA
    assert (series.pixels_TCHW[1][:, clear] == pixels[1][:, clear]).all()
    assert (series.pixels_TCHW[2] == pixels[2] - 1000).all()
    assert series.mask_THW[1, 2, 3] == NODATA
    assert (series.mask_THW[2, 5, 5], series.mask_THW[0, 0, 0]) == (CLOUD, CLOUD)
    assert (series.mask_THW != CLEAR).sum() == 3
    assert series.product_ids == ["a", "b", "c"]


def test_linear_backscatter_becomes_db_and_both_orbits_stay_apart_by_date(tmp_path):
    up, down = s1_pixels(1, 2), s1_pixels(2, 1)
    down[0, 0, 4, 4] = np.nan
    items = [
        cube_item(tmp_path, 10 ** (up / 10), name="up", modality="s1", orbits=["ascending"] * 2,
                  datetimes=["2021-06-01T17:00:00Z", "2021-06-13T17:00:00Z"]),
        cube_item(tmp_path, down, name="down", modality="s1", orbits=["descending"], datetimes=["2021-06-07T05:00:00Z"]),
    ]  # fmt: skip
    for entry in items:
        entry["properties"]["geoloom:site"] = "place"
    series = read_site(only(tmp_path, items), NATIVE).series["s1"]
    assert series.orbits == ["ascending", "descending", "ascending"]
    assert series.datetimes == sorted(series.datetimes)
    assert [d["source_unit"] for d in series.decisions] == ["linear", "dB", "linear"]
    assert series.pixels_TCHW.dtype == np.float16
    np.testing.assert_allclose(series.pixels_TCHW[[0, 2]].astype(float), up, atol=0.02)
    assert series.mask_THW[1, 4, 4] == NODATA
    assert np.isnan(series.pixels_TCHW[1, :, 4, 4]).all()
    assert (series.mask_THW == NODATA).sum() == 1


def test_time_axis_out_of_order_is_sorted_and_said_so(tmp_path):
    pixels = s2_pixels(3, 3)
    stamps = ["2021-06-20T10:00:00Z", "2021-06-01T10:00:00Z", "2021-06-11T10:00:00Z"]
    series = read_site(only(tmp_path, [cube_item(tmp_path, pixels, datetimes=stamps)]), NATIVE).series["s2"]
    assert series.datetimes == sorted(stamps)
    assert (series.pixels_TCHW == pixels[[1, 2, 0]]).all()
    assert all(d["time_order"] == "sorted" for d in series.decisions)


def test_cf_coordinates_do_where_attributes_are_missing(tmp_path):
    pixels = s2_pixels(4, 2, low=1001)
    group = zarr.open_group(str(tmp_path / "site.zarr"), mode="w", zarr_format=2)
    for name, data in {
        "dn": pixels, "time": np.array([10, 375.5]), "band": np.array(S2_BANDS, dtype="S3"),
        "x": 500000 + 10 * (np.arange(16) + 0.5), "y": 5300000 - 10 * (np.arange(16) + 0.5), "spatial_ref": np.array(0),
    }.items():  # fmt: skip
        group.create_array(name, data=data)
    group["time"].attrs["units"] = "days since 2021-01-01 00:00:00"
    group["spatial_ref"].attrs["crs_wkt"] = crs_of("EPSG:32633").to_wkt()
    group.attrs.update({"scale": 0.0001, "offset": -0.1})
    entry = item("site", {"s2": AssetFields("s2", str(tmp_path / "site.zarr"), "application/vnd+zarr", S2_BANDS, GRID)})
    series = read_site(only(tmp_path, [entry]), NATIVE).series["s2"]
    assert series.datetimes == ["2021-01-11T00:00:00Z", "2022-01-11T12:00:00Z"]
    assert series.transform == GRID.transform
    assert (series.pixels_TCHW == np.clip(pixels.astype(int) - 1000, 1, None)).all()  # the cube's own offset


def test_bands_of_several_sizes_meet_on_the_finest_grid(tmp_path):
    coarse = dataclasses.replace(GRID, transform=(20.0, 0.0, 500000.0, 0.0, -20.0, 5300000.0), width=8, height=8)
    assets = {}
    for number, band in enumerate(S2_BANDS):
        grid = GRID if band in ("B02", "B03", "B04", "B08") else coarse
        pixels = np.full((1, grid.height, grid.width), 100 * (number + 1), np.uint16)
        href = write_tiff(tmp_path / f"{band}.tif", pixels, grid)
        assets[band] = AssetFields(
            "s2", href, bands=(band,), grid=grid, datetime="2021-06-01T10:00:00Z", baseline="03.00"
        )
    series = read_site(only(tmp_path, [item("site", assets)]), NATIVE).series["s2"]
    assert series.pixels_TCHW.shape == (1, 10, 16, 16)
    assert (series.pixels_TCHW[0] == 100 * (np.arange(10) + 1)[:, None, None]).all()
    assert series.decisions[0]["resampled"] == "bilinear"


def test_the_common_footprint_is_what_all_share_cut_to_whole_series_pixels(tmp_path):
    hr_grid = Grid(GRID.crs, (0.5, 0.0, 500013.0, 0.0, -0.5, 5299987.0), 200, 200)  # 100 m, not on the 10 m lattice
    hr = write_tiff(tmp_path / "hr.tif", np.full((3, 200, 200), 9, np.uint8), hr_grid)
    entry = s2_item(tmp_path)
    entry["assets"]["hr"] = item("h", {"hr": AssetFields("hr", hr, bands=("R", "G", "B"), grid=hr_grid)})["assets"][
        "hr"
    ]
    site = read_site(only(tmp_path, [entry]), NATIVE)
    assert site.footprint == (500020.0, 5299890.0, 500110.0, 5299980.0)
    assert site.series["s2"].pixels_TCHW.shape[-2:] == (9, 9)
    assert site.series["hr"].pixels_TCHW.shape == (1, 3, 180, 180)
    assert "resampled" not in site.series["hr"].decisions[0]  # 7 m are 14 whole pixels


def test_labels_ride_along_nearest_and_unlabelled_is_minus_one(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (1, 16, 16)).astype(np.uint8)
    label = write_tiff(tmp_path / "lc.tif", values, GRID, nodata=0)
    entry = s2_item(tmp_path)
    extra = item(
        "l",
        {"cover": AssetFields("label", label, grid=GRID, nodata=0.0)},
        scalars={"scene": 2},
        classes={"scene": ["a", "b", "c"]},
    )
    entry["assets"]["cover"] = extra["assets"]["cover"]
    entry["properties"] |= {k: extra["properties"][k] for k in ("geoloom:labels", "label:classes")}
    site = read_site(only(tmp_path, [entry]), NATIVE)
    assert site.rasters["cover"].dtype == np.int16
    assert (site.rasters["cover"] == np.where(values[0] == 0, -1, values[0].astype(int))).all()
    assert (site.scalars, site.classes["scene"]) == ({"scene": 2}, ["a", "b", "c"])


def test_splitting_covers_whole_squares_and_equals_windows_of_the_whole(tmp_path):
    pixels = s2_pixels(5)[0]
    record = only(tmp_path, [s2_item(tmp_path, pixels=pixels)])
    parts = split_site(record, GridConfig(side_m=50, tile=True))
    assert [part.key for part in parts] == [f"site_{r}_{c}" for r in range(3) for c in range(3)]
    for part, (row, col) in zip(parts, itertools.product(range(3), range(3))):
        out = read_site(part, GridConfig(side_m=50, tile=True)).series["s2"].pixels_TCHW[0]
        assert (out == pixels[:, row * 5 : row * 5 + 5, col * 5 : col * 5 + 5]).all()
    (centre,) = split_site(record, GridConfig(side_m=60))
    assert (read_site(centre, NATIVE).series["s2"].pixels_TCHW[0] == pixels[:, 5:11, 5:11]).all()
    assert split_site(record, GridConfig(side_m=1000, tile=True)) == [record]
    with pytest.raises(UsageError, match="multiple"):
        split_site(record, GridConfig(side_m=55, tile=True))


def test_max_dates_are_spread_and_cloudy_dates_dropped(tmp_path):
    pixels = s2_pixels(6, 9)
    entry = cube_item(tmp_path, pixels)
    cloud = np.zeros((9, 16, 16), np.uint8)
    cloud[4] = 1
    zarr.open_group(str(tmp_path / "site.zarr"), mode="a").create_array("cloud", data=cloud)
    record = only(tmp_path, [entry])
    series = read_site(record, GridConfig(max_dates=3)).series["s2"]
    assert [d[8:10] for d in series.datetimes] == ["01", "05", "09"]
    series = read_site(record, GridConfig(min_clear=0.5)).series["s2"]
    assert len(series.datetimes) == 8


def test_records_survive_json_and_pickle(tmp_path):
    record = only(tmp_path, [s2_item(tmp_path)])
    assert SiteRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 — our own object, as a process pool moves it
    fault = pickle.loads(pickle.dumps(SourceFault("a", "b")))  # noqa: S301
    assert (fault.asset, fault.why) == ("a", "b")


# --- bad input: each one line that names the asset and why


def fault_of(record):
    with pytest.raises(SourceFault) as caught:
        read_site(record, NATIVE)
    text = str(caught.value)
    assert "\n" not in text
    assert "site" in text
    return text


def test_a_tiff_cut_short_is_a_fault(tmp_path):
    record = only(tmp_path, [s2_item(tmp_path)])
    path = record.assets[0].href
    os.truncate(path, os.path.getsize(path) // 2)
    assert "corrupt" in fault_of(record) or "cannot be read" in fault_of(record)


def test_a_file_that_is_no_tiff_and_one_that_vanished(tmp_path):
    record = only(tmp_path, [s2_item(tmp_path)])
    (tmp_path / "site_s2.tif").write_bytes(b"this is not a raster")
    assert "cannot be read as a raster" in fault_of(record)
    (tmp_path / "site_s2.tif").unlink()
    assert "does not exist" in fault_of(record)


@pytest.mark.parametrize("fmt", [2, 3])
def test_a_damaged_zarr_chunk_is_a_fault(tmp_path, fmt):
    record = only(tmp_path, [cube_item(tmp_path, s2_pixels(0, 2), fmt=fmt)])
    chunk = tmp_path / "site.zarr" / "data" / ("c/1/0/0/0" if fmt == 3 else "1.0.0.0")
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 3])
    assert "corrupt chunk" in fault_of(record)


def test_wrong_band_count_and_missing_band(tmp_path):
    href = write_tiff(tmp_path / "a.tif", s2_pixels()[0, :7], GRID)
    fields = AssetFields("s2", href, bands=S2_BANDS, grid=GRID, datetime="2021-06-01T10:00:00Z")
    assert "names 10 bands, the file has 7" in fault_of(only(tmp_path / "x", [item("site", {"s2": fields})]))
    fields = dataclasses.replace(fields, bands=S2_BANDS[:7])
    assert "has no band B8A" in fault_of(only(tmp_path / "y", [item("site", {"s2": fields})]))


def test_footprint_outside_the_asset(tmp_path):
    elsewhere = dataclasses.replace(GRID, transform=(10.0, 0.0, 700000.0, 0.0, -10.0, 5300000.0))
    record = only(tmp_path, [s2_item(tmp_path, grid=GRID)])
    moved = dataclasses.replace(record, footprint=elsewhere.bounds)
    assert "outside" in fault_of(moved)
    entry = s2_item(tmp_path)
    entry["properties"]["proj:bbox"] = list(elsewhere.bounds)
    faults: list[SourceFault] = []
    assert open_catalog(write_items(tmp_path / "bad", [entry]), faults) == []
    assert "outside" in str(faults[0])


def test_a_date_elsewhere_is_left_out_while_others_cover_the_site(tmp_path):
    far = dataclasses.replace(GRID, transform=(10.0, 0.0, 700000.0, 0.0, -10.0, 5300000.0))
    here, there = s2_item(tmp_path, "here"), s2_item(tmp_path, "there", grid=far, datetime="2021-07-01T00:00:00Z")
    here["properties"]["geoloom:site"] = there["properties"]["geoloom:site"] = "place"
    assert read_site(only(tmp_path, [here, there]), NATIVE).series["s2"].datetimes == ["2021-06-01T10:00:00Z"]


def test_modalities_that_share_no_ground(tmp_path):
    far = dataclasses.replace(GRID, transform=(10.0, 0.0, 700000.0, 0.0, -10.0, 5300000.0))
    one, two = s2_item(tmp_path, "a"), cube_item(tmp_path, s1_pixels(), far, "b", modality="s1")
    one["properties"]["geoloom:site"] = two["properties"]["geoloom:site"] = "both"
    with pytest.raises(SourceFault, match="share no ground"):
        open_catalog(write_items(tmp_path / "items", [one, two]))


def test_a_site_without_a_valid_pixel(tmp_path):
    record = only(tmp_path, [s2_item(tmp_path, pixels=np.zeros((10, 16, 16), np.uint16))])
    assert "no valid pixel" in fault_of(record)


def test_a_date_that_stands_twice(tmp_path):
    entry = cube_item(tmp_path, s2_pixels(0, 2), datetimes=["2021-06-01T10:00:00Z"] * 2)
    assert "stands twice" in fault_of(only(tmp_path, [entry]))


def test_unreadable_times_and_wrong_numbers_of_dates(tmp_path):
    entry = cube_item(tmp_path, s2_pixels(0, 2), datetimes=["2021-06-01T10:00:00Z", "soon"])
    assert "no readable time" in fault_of(only(tmp_path / "x", [entry]))
    entry = cube_item(tmp_path, s2_pixels(0, 2), datetimes=["2021-06-01T10:00:00Z"])
    assert "names 1 dates, the array has 2" in fault_of(only(tmp_path / "y", [entry]))


def test_hr_must_be_8_bit_and_a_crs_without_code_is_fine(tmp_path):
    wkt = (
        'PROJCS["unknown",GEOGCS["unknown",DATUM["Unknown based on GRS80 ellipsoid",SPHEROID["GRS 1980",6378137,298.257222101]],'
        'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
        'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",9.3],PARAMETER["scale_factor",0.9997],'
        'PARAMETER["false_easting",510000],PARAMETER["false_northing",0],UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    )
    grid = Grid(wkt, (0.25, 0.0, 500000.0, 0.0, -0.25, 5300000.0), 32, 32)
    pixels = np.random.default_rng(0).integers(1, 255, (3, 32, 32)).astype(np.uint8)
    href = write_tiff(tmp_path / "a.tif", pixels, grid)
    site = read_site(
        only(tmp_path / "x", [item("site", {"hr": AssetFields("hr", href, bands=("R", "G", "B"), grid=grid)})]), NATIVE
    )
    assert (site.series["hr"].pixels_TCHW[0] == pixels).all()
    assert site.crs.startswith("PROJCRS[")
    assert 45 < site.bbox_wgs84[1] < 50
    href = write_tiff(tmp_path / "b.tif", pixels.astype(np.uint16), grid)
    record = only(tmp_path / "y", [item("site", {"hr": AssetFields("hr", href, bands=("R", "G", "B"), grid=grid)})])
    assert "wanted uint8" in fault_of(record)


def test_a_crs_or_transform_that_is_missing(tmp_path):
    href = write_tiff(tmp_path / "site.tif", s2_pixels()[0], dataclasses.replace(GRID, crs=""))
    entry = s2_item(tmp_path)
    entry["assets"]["s2"]["href"] = href
    record = only(tmp_path / "x", [entry])
    assert (read_site(record, NATIVE).series["s2"].pixels_TCHW == s2_pixels()).all()  # the catalog says where it lies
    for place in (entry["properties"], entry["assets"]["s2"]):
        for name in ("proj:code", "proj:transform", "proj:shape"):
            place.pop(name, None)
    with pytest.raises(SourceFault, match="no coordinate reference system"):
        open_catalog(write_items(tmp_path / "y", [entry]))
