"""Items as providers publish them: right bands, right values, right dates, right place, or a refusal that says why."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from data_prep.config import BuildConfig, GridConfig, QualityConfig
from data_prep.geo import Grid
from data_prep.plan import make_plan
from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA
from data_prep.sources import SourceFault, open_catalog, read_site
from data_prep.sources.stac import item_assets
from tests import providers
from tests.providers import NATIVE_M, Scene
from tests.scenes import write_items

NATIVE = GridConfig()
TENS = ("B02", "B03", "B04", "B08")


def record_of(folder, *items):
    (record,) = open_catalog(write_items(folder / "items", items))
    return record


def same_site(*items):
    for one in items:
        one["properties"]["geoloom:site"] = "here"
    return items


def check_scene(scene, series, moment, offset):
    """Every 10 m band bit for bit, every 20 m band where its pixel centres fall, the clouds of the SCL, place and date."""
    bands = MODALITIES["s2"].bands
    for band in TENS:
        truth = scene.reflectance[band].astype(int)
        clear = series.mask_THW[0] != NODATA
        assert (series.pixels_TCHW[0, bands.index(band)][clear] == np.clip(truth, 1, None)[clear]).all(), band
    for band in (band for band in bands if NATIVE_M.get(band, 20) == 20):
        low, high = scene.reflectance[band].min(), scene.reflectance[band].max()
        found = series.pixels_TCHW[0, bands.index(band)]
        assert low <= found.min() <= found.max() <= high
        assert abs(found.mean() - scene.reflectance[band].mean()) < 20
    cloudy = np.kron(np.isin(scene.scl, (3, 8, 9, 10)), np.ones((2, 2), bool))
    assert ((series.mask_THW[0] == CLOUD) == cloudy).all()
    assert series.datetimes == [moment]
    assert series.transform == scene.grid(10).transform
    assert [decision["offset_applied"] for decision in series.decisions] == [offset]
    assert not any(decision["flags"] for decision in series.decisions)


def twins(key, asset):
    """What the requester pays for: never to be opened beside a file that anybody may read."""
    return asset["href"].startswith("s3://sentinel-s2-l2a")


S2_L2A = [
    # item, what is added to reflectance in its files, its date
    ("stactools_s2_l2a", 0, "2019-02-12T19:26:51Z"),
    ("planetary_computer_s2_l2a", 1000, "2024-08-25T17:39:09Z"),
    ("earth_search_v1_s2_l2a", 0, "2023-10-08T18:02:55Z"),
    ("earth_search_v1_s2_l2a_2025", 0, "2025-07-31T13:19:22Z"),
    ("earth_search_v0_s2_l2a", 0, "2025-07-31T13:19:22Z"),
    ("earth_search_c1_s2_l2a", 1000, "2024-04-22T17:53:02Z"),
    ("copernicus_data_space_s2_l2a", 1000, "2022-02-17T18:34:31Z"),
]


@pytest.mark.parametrize(("name", "offset_dn", "moment"), S2_L2A)
def test_sentinel_2_items_as_they_are_published(tmp_path, name, offset_dn, moment):
    """Bands at every size, 8-bit pictures, JPEG 2000 twins, cloud probabilities, STAC 1.0 and 1.1: right bands, values, date, place."""
    scene = Scene.of(name, tmp_path, offset_dn=offset_dn)
    record = record_of(tmp_path, providers.sentinel2(name, scene, twins))
    assert record.crs == scene.crs
    assert len(record.of("s2")) == 12  # one file per band
    assert {asset.modality for asset in record.assets} == {"s2", "scl"}
    assert not [asset.href for asset in record.assets if asset.href.startswith("s3://")]
    check_scene(scene, read_site(record, NATIVE).series["s2"], moment, -offset_dn)


def test_an_offset_that_is_removed_is_said_in_every_generation_of_earth_search(tmp_path):
    """`earthsearch:…`, and before that `sentinel:boa_offset_applied`, `sentinel:processing_baseline`, `sentinel:product_id`."""
    for name in ("earth_search_v0_s2_l2a", "earth_search_v1_s2_l2a_2025"):
        scene = Scene.of(name, tmp_path / name, offset_dn=0)
        record = record_of(tmp_path / name, providers.sentinel2(name, scene, twins))
        (decision,) = read_site(record, NATIVE).series["s2"].decisions
        assert (decision["offset_applied"], decision["basis"]) == (0.0, "boa_offset_applied, baseline 05.11")
        assert record.product_ids[0].startswith("S2B_MSIL2A_20250731T131909_N0511_R095_T20EPT_20250731T143919")


@pytest.mark.parametrize("name", ["earth_search_v1_s2_l1c", "stactools_s2_l1c"])
def test_level_1c_items_are_top_of_atmosphere_and_only_read_when_asked_for(tmp_path, name):
    offset = 1000 if "earth" in name else 0
    scene = Scene.of(name, tmp_path, offset_dn=offset, bands=MODALITIES["s2_l1c"].bands)
    record = record_of(tmp_path, providers.sentinel2(name, scene))
    assert record.modalities == ("s2_l1c",)
    with pytest.raises(SourceFault):
        read_site(record, NATIVE)
    series = read_site(record, NATIVE, modalities=("s2_l1c",)).series["s2_l1c"]
    assert series.pixels_TCHW.shape[1] == 13
    assert (series.pixels_TCHW[0, 1] == np.clip(scene.reflectance["B02"], 1, None)).all()
    assert [decision["offset_applied"] for decision in series.decisions] == [-offset]


@pytest.mark.parametrize("named", [True, False])
def test_a_probability_is_thresholded_by_name_or_by_its_numbers(tmp_path, named):
    name = "earth_search_c1_s2_l2a"
    scene = Scene.of(name, tmp_path)
    scene.cloud_probability[:10], scene.cloud_probability[20:] = 49, 90
    entry = providers.sentinel2(name, scene)
    entry["assets"].pop("scl")
    if not named:
        entry["assets"]["cloud"].pop("title")
        entry["assets"]["cloud"]["href"] = scene.file("mask.tif", scene.cloud_probability, 20)
    record = record_of(tmp_path, entry)
    mask = read_site(record, NATIVE).series["s2"].mask_THW[0]
    assert (mask[:40] == CLEAR).all()
    assert (mask[40:] == CLOUD).all()
    strict = read_site(record, NATIVE, QualityConfig(cloud_probability=45)).series["s2"].mask_THW[0]
    assert (strict[:20] == CLOUD).all()
    assert (strict[20:40] == CLEAR).all()
    grown = read_site(record, NATIVE, QualityConfig(cloud_dilate_px=2)).series["s2"].mask_THW[0]
    assert (grown[36:] == CLOUD).all()
    assert (grown[:36] == CLEAR).all()


@pytest.mark.parametrize(("provider", "gsd"), [("pc", 10), ("aws", 20), ("opera", 30)])
def test_sentinel_1_rtc_of_three_providers(tmp_path, provider, gsd):
    rng = np.random.default_rng(0)
    db = rng.normal(-14, 2, (2, 600 // gsd, 600 // gsd))
    record = record_of(tmp_path, providers.rtc(tmp_path, provider, db))
    series = read_site(record, GridConfig(series_gsd_m=gsd)).series["s1"]
    np.testing.assert_allclose(series.pixels_TCHW[0], db, atol=0.02)
    assert series.decisions[0]["calibration"] == "gamma0 RTC"
    assert series.decisions[0]["relative_orbit"] == {"pc": 80, "aws": 121, "opera": 87}[provider]
    assert series.gsd_m == gsd
    assert series.datetimes == [
        {"pc": "2025-03-11T04:42:40Z", "aws": "2020-01-03T23:36:21Z", "opera": "2020-01-01T16:16:22Z"}[provider]
    ]


def test_grd_amplitudes_are_refused_by_name(tmp_path):
    entry = providers.rtc(tmp_path, "pc", np.full((2, 60, 60), 25.0))  # uncalibrated digital numbers of some hundred
    entry["collection"] = "sentinel-1-grd"
    with pytest.raises(SourceFault, match="neither dB nor linear"):
        read_site(record_of(tmp_path, entry), NATIVE)


@pytest.mark.parametrize("name", ["planetary_computer_s1_grd", "copernicus_data_space_s1_grd"])
def test_grd_in_radar_geometry_is_refused_with_the_way_out(tmp_path, name):
    with pytest.raises(SourceFault, match=r"ground control points, no grid.*terrain-corrected"):
        record_of(tmp_path, providers.grd(name, tmp_path))


def test_the_angle_of_a_radar_image_goes_on_record(tmp_path):
    """A raster of angles in the item (hundredths of a degree, nodata 0), else what the item says of the whole scene."""
    db = np.random.default_rng(0).normal(-14, 2, (2, 30, 30))
    record = record_of(tmp_path / "aws", providers.rtc(tmp_path, "aws", db, incidence_deg=37.25))
    planned = make_plan([record], BuildConfig()).shards[0].records[0]
    (decision,) = read_site(planned, GridConfig(series_gsd_m=20)).series["s1"].decisions
    assert decision["incidence_deg"] == 37.25
    (tmp_path / "incidence.tif").write_bytes(b"broken")
    (decision,) = read_site(record, GridConfig(series_gsd_m=20)).series["s1"].decisions
    assert decision["incidence_deg"] == "unreadable: S1A_20200103_17RMJ_ASC/incidence"
    entry = providers.rtc(tmp_path / "pc", "pc", np.random.default_rng(1).normal(-14, 2, (2, 60, 60)))
    assert "incidence_deg" not in read_site(record_of(tmp_path / "a", entry), NATIVE).series["s1"].decisions[0]
    entry["properties"]["view:incidence_angle"] = 39.185510
    assert read_site(record_of(tmp_path / "b", entry), NATIVE).series["s1"].decisions[0]["incidence_deg"] == 39.19


def test_a_date_that_is_none_is_refused(tmp_path):
    entry = providers.rtc(tmp_path, "pc", np.full((2, 60, 60), -14.0))
    entry["properties"]["datetime"] = "2025-03-11T04:42:9Z"
    with pytest.raises(SourceFault, match="is no ISO 8601 time"):
        record_of(tmp_path, entry)


def test_calibrations_are_not_mixed(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for number in range(3):
        entry = providers.rtc(tmp_path / str(number), "pc", rng.normal(-14, 2, (2, 60, 60)))
        entry["id"] = f"S1A_{number}"
        entry["properties"] |= {"datetime": f"2020-01-{3 + 12 * number // 2:02d}T23:36:21Z"}
        entry["collection"] = "sentinel-1-rtc" if number else "sentinel-1-sigma0"
        entries.append(entry)
    record = record_of(tmp_path, *same_site(*entries))
    site = read_site(record, NATIVE)
    assert [d["calibration"] for d in site.series["s1"].decisions] == ["gamma0 RTC"] * 2
    assert "mixes gamma0 RTC and sigma0 GRD" in site.losses[0]["why"]
    with pytest.raises(SourceFault, match="mixes"):
        read_site(record, NATIVE, QualityConfig(on_contradiction="fail"))


def test_naip_quads_and_maxar_scenes_are_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (4, 60, 60)).astype(np.uint8)
    naip = record_of(tmp_path / "n", providers.naip(tmp_path, pixels))
    hr = read_site(naip, NATIVE).series["hr"]
    assert (hr.pixels_TCHW[0] == pixels[:3]).all()
    assert (hr.gsd_m, hr.datetimes) == (0.6, ["2023-11-17T16:00:00Z"])
    pixels = rng.integers(0, 255, (3, 100, 100)).astype(np.uint8)
    maxar = record_of(tmp_path / "m", providers.maxar(tmp_path, pixels))
    hr = read_site(maxar, NATIVE).series["hr"]
    assert [asset.id.rsplit("/", 1)[1] for asset in maxar.assets] == ["visual"]
    assert (hr.pixels_TCHW[0] == pixels).all()
    assert hr.gsd_m == pytest.approx(0.305, abs=1e-3)
    assert hr.datetimes == ["2024-12-14T18:53:50Z"]


def test_of_several_pictures_the_one_that_shows_most_wins_not_the_newest(tmp_path):
    whole = np.full((4, 60, 60), 100, np.uint8)
    old = providers.naip(tmp_path, whole, 0.0, "old", 2018)
    newer = providers.naip(tmp_path, whole + 1, 0.0, "newer", 2020)
    sliver = providers.naip(tmp_path, whole + 2, 35.4, "sliver", 2022)  # one column of the site
    entries = same_site(old, newer, sliver)
    series = read_site(record_of(tmp_path, *entries), NATIVE).series["hr"]
    assert series.datetimes == ["2020-04-15T16:00:00Z"]
    assert (series.pixels_TCHW == 101).all()


def test_one_pass_in_two_tiles_is_one_date_with_equal_pixels(tmp_path):
    """Two MGRS tiles of one datatake overlap; a site across their edge is whole, and where both see it they say the same."""
    name = "planetary_computer_s2_l2a"
    whole = Scene.of(name, tmp_path / "w", seed=3)
    halves = []
    for number, tile in enumerate(("T13TDE", "T13TEE")):
        scene = Scene.of(name, tmp_path / tile, seed=3)
        for values in scene.reflectance.values():
            side = values.shape[0]
            hidden = np.s_[:, side * 2 // 3 :] if number == 0 else np.s_[:, : side // 3]
            values[hidden] = 0
        scene.numbers = lambda band, gsd, s=scene: np.where(
            s.reflectance[band] > 0, s.reflectance[band] + 1000, 0
        ).astype(np.uint16)  # type: ignore[method-assign]
        entry = providers.sentinel2(name, scene)
        entry["id"] = entry["id"].replace("T13TDE", tile)
        entry["properties"]["s2:product_uri"] = entry["properties"]["s2:product_uri"].replace("T13TDE", tile)
        entry["properties"]["datetime"] = f"2024-08-25T17:39:{9 + 14 * number:02d}Z"
        halves.append(entry)
    both = read_site(record_of(tmp_path, *same_site(*halves)), NATIVE).series["s2"]
    entry = providers.sentinel2(name, whole)
    alone = read_site(record_of(tmp_path / "alone", entry), NATIVE).series["s2"]
    assert len(both.datetimes) == 1
    assert both.decisions[0]["mosaic"]
    seen = both.mask_THW[0] != NODATA
    assert seen.mean() > 0.9  # a 60 m band's edge pixel may stay out
    tens = [MODALITIES["s2"].bands.index(band) for band in TENS]
    assert (both.pixels_TCHW[0, tens][:, seen] == alone.pixels_TCHW[0, tens][:, seen]).all()


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_burst_that_was_processed_twice_the_newer_product_counts(tmp_path, turned):
    entries = []
    for number, stamp in enumerate(("20250911T203016Z", "20260102T000000Z")):
        entry = providers.rtc(tmp_path / stamp, "opera", np.full((2, 20, 20), -14.0 - number))
        entry["id"] = entry["id"].replace("20250911T203016Z", stamp)
        entries.append(entry)
    record = record_of(tmp_path, *same_site(*(entries[::-1] if turned else entries)))
    series = read_site(record, GridConfig(series_gsd_m=30)).series["s1"]
    assert len(series.datetimes) == 1
    assert (series.pixels_TCHW == -15).all()
    assert "20260102T000000Z" in series.product_ids[0]


def test_an_offset_that_the_data_space_declares_for_old_products_too_is_a_contradiction(tmp_path):
    """Its items say -0.1 whatever the baseline; before 04.00 nothing was added."""
    name = "copernicus_data_space_s2_l2a"
    scene = Scene.of(name, tmp_path, offset_dn=0)
    entry = providers.sentinel2(name, scene)
    entry["id"] = entry["id"].replace("_N0510_", "_N0214_")
    record = record_of(tmp_path, entry)
    with pytest.raises(SourceFault, match=r"raster:bands offset says -1000, baseline 02\.14 says 0"):
        read_site(record, NATIVE)
    series = read_site(record, NATIVE, QualityConfig(on_contradiction="correct")).series["s2"]
    assert (series.pixels_TCHW[0, 0] == np.clip(scene.reflectance["B02"], 1, None)).all()
    assert series.decisions[0]["corrected"] is True


def test_the_other_orbit_of_the_same_day_stays_a_date_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for number, (orbit, hour) in enumerate((("descending", "05"), ("ascending", "17"))):
        entry = providers.rtc(tmp_path / orbit, "pc", rng.normal(-14, 2, (2, 60, 60)))
        entry["id"] = f"S1_{number}"
        entry["properties"] |= {
            "sat:orbit_state": orbit,
            "sat:relative_orbit": 10 + number,
            "datetime": f"2020-01-03T{hour}:36:21Z",
        }
        entries.append(entry)
    series = read_site(record_of(tmp_path, *same_site(*entries)), NATIVE).series["s1"]
    assert series.orbits == ["descending", "ascending"]


def test_per_band_scale_offset_and_nodata_of_one_file(tmp_path):
    """raster:bands differ band by band: each band is read by its own."""
    names = MODALITIES["s2"].bands
    grid = providers.grid_of(10)
    rng = np.random.default_rng(0)
    truth = rng.integers(50, 3000, (10, 60, 60)).astype(np.uint16)
    stored = truth.copy()
    stored[3:5] = truth[3:5] // 2  # declared at 0.0002
    stored[9] = truth[9] + 1000  # declared with an offset
    stored[9, 0, 0] = 65535  # declared nodata of that band
    href = providers.write(tmp_path / "all.tif", stored, grid)
    raster = [{"scale": 1e-4, "offset": 0.0, "nodata": 0} for _ in names]
    raster[3] = raster[4] = {"scale": 2e-4, "offset": 0.0, "nodata": 0}
    raster[9] = {"scale": 1e-4, "offset": -0.1, "nodata": 65535}
    entry = providers.item("x", {"data": {
        "href": href, "type": providers.COG, "eo:bands": [{"name": band} for band in names], "raster:bands": raster,
        "proj:shape": [60, 60], "proj:transform": list(grid.transform),
    }}, {"proj:epsg": 32631})  # fmt: skip
    series = read_site(record_of(tmp_path, entry), NATIVE).series["s2"]
    expected = truth.copy()
    expected[3:5] = stored[3:5] * 2
    assert series.mask_THW[0, 0, 0] == NODATA
    valid = series.mask_THW[0] != NODATA
    assert valid.sum() == 60 * 60 - 1
    assert (series.pixels_TCHW[0][:, valid] == expected[:, valid]).all()
    assert series.decisions[0]["per_band"]["B12"] == [1.0, -1000.0]


def test_stac_1_1_and_1_0_say_the_same(tmp_path):
    name = "planetary_computer_s2_l2a"
    old = providers.sentinel2(name, Scene.of(name, tmp_path))
    for asset in old["assets"].values():
        if "eo:bands" in asset:
            asset["raster:bands"] = [{"scale": 1e-4, "offset": -0.1, "nodata": 0}] * len(asset["eo:bands"])
    new = copy.deepcopy(old)
    for asset in new["assets"].values():
        if "eo:bands" in asset:
            raster = asset.pop("raster:bands")
            asset["bands"] = [
                {"name": band["name"], "raster:scale": r["scale"], "raster:offset": r["offset"], "nodata": r["nodata"]}
                for band, r in zip(asset.pop("eo:bands"), raster)
            ]
    assert item_assets(old) == item_assets(new)


def test_pixels_in_feet_and_stretched_metres_are_measured_on_the_ground():
    north = Grid("EPSG:3857", (10.0, 0.0, 1_000_000.0, 0.0, -10.0, 8_399_737.9), 64, 64)  # 60 degrees north
    assert north.gsd_m() == pytest.approx(5.0, rel=0.01)
    feet = Grid("EPSG:2263", (1.0, 0.0, 1_000_000.0, 0.0, -1.0, 200_000.0), 64, 64)
    assert feet.gsd_m() == pytest.approx(0.3048, rel=1e-3)
    assert Grid("EPSG:32633", (10.0, 0.0, 300000.0, 0.0, -10.0, 5e6), 8, 8).gsd_m() == 10.0


def test_a_site_in_web_mercator_is_placed_in_metres(tmp_path):
    grid = Grid("EPSG:3857", (1.2, 0.0, 1_000_000.0, 0.0, -1.2, 8_399_737.9), 400, 400)
    href = providers.write(tmp_path / "x.tif", np.full((3, 400, 400), 9, np.uint8), grid)
    entry = providers.item(
        "x", {"image": {"href": href, "type": providers.COG, "geoloom:modality": "hr"}}, {}, grid=grid
    )
    record = record_of(tmp_path, entry)
    assert record.crs.startswith("EPSG:326")
    assert record.footprint[2] - record.footprint[0] == pytest.approx(240, abs=4)
    assert read_site(record, NATIVE).series["hr"].gsd_m == pytest.approx(0.6, rel=0.02)


def test_a_box_may_cross_the_antimeridian():
    from data_prep.geo import boxes_meet

    fiji = (177.0, -19.0, -178.0, -15.0)
    assert boxes_meet((179.5, -17.0, -179.5, -16.0), fiji)
    assert boxes_meet((-178.5, -17.0, -178.2, -16.0), fiji)
    assert boxes_meet((178.0, -17.0, 178.5, -16.0), fiji)
    assert not boxes_meet((0.0, -17.0, 1.0, -16.0), fiji)
    assert boxes_meet((179.5, -17.0, -179.5, -16.0), (-180.0, -20.0, -170.0, 0.0))
    assert not boxes_meet((179.5, 17.0, -179.5, 18.0), fiji)
