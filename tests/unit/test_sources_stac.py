"""STAC as other people write it: Earth-search style items, hrefs, band aliases, levels, grids without declared projection."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest

from cluster.errors import UsageError
from data_prep.catalog import write_items
from data_prep.config import GridConfig
from data_prep.geo import Grid
from data_prep.schema import CLOUD, NODATA
from data_prep.sources import SourceFault, open_catalog, read_site
from data_prep.sources.names import band_name, date_in, iso_datetime, s1_datetime, s2_product
from data_prep.sources.stac_io import absolute, read_items
from tests.scenes import GRID, s2_item, write_tiff
from tests.scenes import write_items as write_json

COLOURS = {
    "blue": "B02", "green": "B03", "red": "B04", "rededge1": "B05", "rededge2": "B06", "rededge3": "B07", "nir": "B08",
    "nir08": "B8A", "swir16": "B11", "swir22": "B12",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ours"),
    [("B2", "B02"), ("b8a", "B8A"), ("B11", "B11"), ("nir08", "B8A"), ("vv", "VV"), ("swir16", "B11"), ("odd", "odd")],
)
def test_band_names_in_every_spelling(name, ours):
    assert band_name(name) == ours


def test_product_names_and_dates():
    product = s2_product("x/S2A_MSIL2A_20220706T085611_N0400_R007_T33NZA_20220706T153419.SAFE")
    assert product == {
        "level": "L2A",
        "datetime": "2022-07-06T08:56:11Z",
        "baseline": "04.00",
        "relative_orbit": "007",
        "tile": "33NZA",
    }
    assert s2_product("S2B_MSIL1C_20170613T101031_N9999_R022_T33UUP")["baseline"] == ""
    assert s2_product("m_3211605_ne_11_060_20200415") == {}
    assert s1_datetime("S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904") == "2020-06-07T01:08:00Z"
    assert date_in("m_3211605_ne_11_060_20200415") == "2020-04-15T00:00:00Z"
    assert date_in("tile_2021-07-09_x") == "2021-07-09T00:00:00Z"
    assert date_in("a_12345678_b") == ""
    assert iso_datetime("2023-06-10T07:46:21.000000000") == "2023-06-10T07:46:21Z"
    assert iso_datetime("2021-01-01T02:00:00+02:00") == "2021-01-01T00:00:00Z"
    assert iso_datetime("soon") == ""


def test_hrefs_are_resolved_against_their_catalog():
    assert absolute("../sites/a.tif", "/data/items") == "/data/sites/a.tif"
    assert absolute("./a.tif", "s3://bucket/items") == "s3://bucket/items/a.tif"
    assert absolute("s3://other/a.tif", "/data") == "s3://other/a.tif"
    assert absolute("/abs/a.tif", "s3://bucket/x") == "/abs/a.tif"


def earth_search(folder):
    """One Sentinel-2 scene as Earth-search publishes it: a file per band, SCL, a 10 m preview, offsets in raster:bands."""
    rng = np.random.default_rng(0)
    coarse = Grid(GRID.crs, (20.0, 0.0, 500000.0, 0.0, -20.0, 5300000.0), 8, 8)
    truth, assets = {}, {}
    for key, band in COLOURS.items():
        grid = GRID if band in ("B02", "B03", "B04", "B08") else coarse
        pixels = rng.integers(1010, 4000, (1, *grid.shape)).astype(np.uint16)
        truth[band] = pixels[0]
        write_tiff(folder / f"{band}.tif", pixels, grid, nodata=0)
        assets[key] = {
            "href": f"./{band}.tif", "type": "image/tiff; application=geotiff; profile=cloud-optimized", "roles": ["data", "reflectance"],
            "eo:bands": [{"name": key, "common_name": key}],
            "raster:bands": [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}],
            "proj:shape": list(grid.shape), "proj:transform": list(grid.transform),
        }  # fmt: skip
    scl = np.full((1, 8, 8), 4, np.uint8)
    scl[0, 2, 3], scl[0, 0, 0] = 9, 0
    write_tiff(folder / "SCL.tif", scl, coarse)
    assets["scl"] = {"href": "./SCL.tif", "type": "image/tiff", "roles": ["data", "reflectance"]}
    write_tiff(folder / "TCI.tif", np.full((3, 16, 16), 99, np.uint8), GRID)
    assets["visual"] = {
        "href": "./TCI.tif",
        "type": "image/tiff",
        "roles": ["visual"],
        "eo:bands": [{"name": c} for c in ("red", "green", "blue")],
    }
    assets["thumbnail"] = {"href": "./t.jpg", "type": "image/jpeg", "roles": ["thumbnail"]}
    return truth, {
        "type": "Feature", "stac_version": "1.0.0", "id": "S2B_33UVP_20230601_0_L2A", "links": [], "bbox": [14.9, 47.8, 15.0, 47.9],
        "geometry": {"type": "Polygon", "coordinates": [[[14.9, 47.8], [15.0, 47.8], [15.0, 47.9], [14.9, 47.9], [14.9, 47.8]]]},
        "properties": {
            "datetime": "2023-06-01T10:06:12.345Z", "platform": "sentinel-2b", "constellation": "sentinel-2", "proj:epsg": 32633,
            "s2:processing_baseline": "05.09", "eo:cloud_cover": 12.5, "earthsearch:boa_offset_applied": False, "grid:code": "MGRS-33UVP",
            "s2:product_uri": "S2B_MSIL2A_20230601T100031_N0509_R122_T33UVP_20230601T132345.SAFE",
        },
        "assets": assets,
    }  # fmt: skip


def test_earth_search_items_are_read_as_they_are(tmp_path):
    truth, entry = earth_search(tmp_path)
    (tmp_path / "item.json").write_text(json.dumps(entry))
    (record,) = open_catalog(str(tmp_path / "item.json"))
    assert (record.key, record.cell, record.modalities) == ("S2B_33UVP_20230601_0_L2A", "MGRS-33UVP", ("s2",))
    series = read_site(record, GridConfig()).series["s2"]
    for number, band in ((0, "B02"), (2, "B04"), (6, "B08")):
        clear = series.mask_THW[0] != NODATA
        expected = np.clip(truth[band].astype(int) - 1000, 1, None)
        assert (series.pixels_TCHW[0, number][clear] == expected[clear]).all()
    assert (series.mask_THW[0, 4:6, 6:8] == CLOUD).all()
    assert (series.mask_THW[0, :2, :2] == NODATA).all()
    assert series.datetimes == ["2023-06-01T10:06:12Z"]
    assert series.decisions[0]["flags"] == []
    assert series.decisions[0]["baseline"] == "05.09"


def test_a_provider_that_removed_the_offset_is_believed(tmp_path):
    truth, entry = earth_search(tmp_path)
    entry["properties"]["earthsearch:boa_offset_applied"] = True
    for asset in entry["assets"].values():
        for band in asset.get("raster:bands", []):
            band.pop("offset", None)
    (tmp_path / "item.json").write_text(json.dumps(entry))
    series = read_site(open_catalog(str(tmp_path / "item.json"))[0], GridConfig()).series["s2"]
    clear = series.mask_THW[0] != NODATA
    assert (series.pixels_TCHW[0, 0][clear] == truth["B02"][clear]).all()
    assert series.decisions[0]["offset_applied"] == 0


def test_dates_of_one_place_join_into_one_site(tmp_path):
    one, two = s2_item(tmp_path, "a"), s2_item(tmp_path, "b", datetime="2020-01-01T00:00:00Z")
    one["properties"]["geoloom:site"] = two["properties"]["geoloom:site"] = "place 7.5"
    (record,) = open_catalog(write_json(tmp_path / "items", [one, two]))
    assert record.key == "place_7_5"
    assert read_site(record, GridConfig()).series["s2"].datetimes == ["2020-01-01T00:00:00Z", "2021-06-01T10:00:00Z"]


def test_parquet_with_relative_hrefs_moves_with_its_folder(tmp_path):
    entry = s2_item(tmp_path / "one", "a")
    relative = copy.deepcopy(entry)
    relative["assets"]["s2"]["href"] = "a_s2.tif"
    write_items([relative], str(tmp_path / "one" / "catalog.parquet"))
    os.rename(tmp_path / "one", tmp_path / "two")
    (record,) = open_catalog(str(tmp_path / "two" / "catalog.parquet"))
    assert record.assets[0].href == str(tmp_path / "two" / "a_s2.tif")
    read_site(record, GridConfig())


def test_parquet_and_json_say_the_same(tmp_path):
    folder = write_json(tmp_path / "items", [s2_item(tmp_path, "a"), s2_item(tmp_path, "b")])
    write_items(list(read_items(folder, whole=True)), str(tmp_path / "c.parquet"))
    assert open_catalog(folder) == open_catalog(str(tmp_path / "c.parquet"))
    again = list(read_items(str(tmp_path / "c.parquet"), whole=True))
    assert [entry["bbox"] for entry in again] == [pytest.approx(entry["bbox"]) for entry in read_items(folder)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.parquet", b"no parquet", "is not a Parquet file"),
        ("c.json", b"{", "not valid JSON"),
        ("c.json", b'{"type": "Feature"}', "is no STAC item"),
        ("c.json", b"[]", "is no STAC item"),
    ],
)
def test_what_is_no_catalog_is_said_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        open_catalog(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_unusable_sites_are_collected_and_the_rest_stays(tmp_path):
    good, bad = s2_item(tmp_path, "good"), s2_item(tmp_path, "bad")
    bad["assets"] = {"notes": {"href": "x.txt", "type": "text/plain"}}
    folder = write_json(tmp_path / "items", [good, bad])
    faults: list[SourceFault] = []
    assert [record.key for record in open_catalog(folder, faults)] == ["good"]
    assert "no asset is recognised" in str(faults[0])
    with pytest.raises(SourceFault, match="bad"):
        open_catalog(folder)


def test_a_label_that_is_no_whole_number_is_a_fault(tmp_path):
    entry = s2_item(tmp_path, "a")
    entry["properties"]["geoloom:labels"] = {"scene": 1.5}
    with pytest.raises(SourceFault, match="whole number"):
        open_catalog(write_json(tmp_path / "items", [entry]))


def test_the_span_of_a_series_is_no_date_of_an_image(tmp_path):
    entry = s2_item(tmp_path, "a")
    entry["assets"]["s2"].pop("datetime")
    entry["properties"] |= {
        "datetime": None,
        "start_datetime": "2020-01-02T10:24:21Z",
        "end_datetime": "2020-12-30T10:24:21Z",
    }
    assert open_catalog(write_json(tmp_path / "year", [entry]))[0].assets[0].datetime == ""
    entry["properties"]["end_datetime"] = "2020-01-02T10:24:46Z"
    assert open_catalog(write_json(tmp_path / "pass", [entry]))[0].assets[0].datetime == "2020-01-02T10:24:21Z"
