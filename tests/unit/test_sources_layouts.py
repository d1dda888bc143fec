"""Layouts people have, on real pixels: what is read equals what an independent reader finds in the files."""

from __future__ import annotations

import json
import shutil

import geopandas
import h5py
import numpy as np
import pystac
import pytest
import rasterio

from cluster.errors import RunFailure, UsageError
from data_prep.audit import audit, figures
from data_prep.catalog import detect_layout, make_catalog
from data_prep.commands.catalog import LAYOUTS
from data_prep.config import BuildConfig, GridConfig, QualityConfig, SourceConfig
from data_prep.geo import Grid
from data_prep.plan import make_plan
from data_prep.schema import CLEAR, CLOUD, MODALITIES
from data_prep.sources import open_catalog, read_site, split_site
from data_prep.sources.names import s1_datetime
from tests.data_folder import real_data
from tests.scenes import s2_item, write_items, write_tiff

NATIVE = GridConfig()
CORRECT = QualityConfig(on_contradiction="correct")
# layout of each folder of real imagery
FOLDERS = {
    "terramind": "terramind", "treesatai": "treesatai", "ssl4eo": "ssl4eo", "majortom": "majortom",
    "bigearthnet": "geotiff", "naip": "geotiff",
}  # fmt: skip


def catalogued(tmp_path, folder):
    out = str(tmp_path / "catalog.parquet")
    make_catalog(str(real_data(folder)), out, FOLDERS[folder])
    return open_catalog(out), out


def bands(path, *indices):
    with rasterio.open(path) as dataset:
        return dataset.read(list(indices) or None), tuple(dataset.transform)[:6]


@pytest.mark.parametrize("folder", FOLDERS)
def test_catalogs_open_with_public_tools(tmp_path, folder):
    records, out = catalogued(tmp_path, folder)
    table = geopandas.read_parquet(out)
    assert len(table) >= len(records) >= 1
    assert table.crs.to_epsg() == 4326
    assert {"proj:transform", "proj:shape", "geoloom:site"} <= set(table.columns)
    import pyarrow.parquet
    import stac_geoparquet.arrow

    for entry in stac_geoparquet.arrow.stac_table_to_items(pyarrow.parquet.read_table(out)):
        item = pystac.Item.from_dict(json.loads(json.dumps(entry, default=str)))
        assert item.assets
        assert item.bbox == pytest.approx(list(item.geometry["coordinates"] and _box(item.geometry)))


def _box(geometry):
    points = np.array(geometry["coordinates"][0])
    return [*points.min(axis=0), *points.max(axis=0)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_layouts_are_recognised(folder):
    assert detect_layout(str(real_data(folder))) == FOLDERS[folder]


def test_terramind_pixels_dates_labels(tmp_path):
    root = real_data("terramind")
    records, _ = catalogued(tmp_path, "terramind")
    assert [r.key for r in records] == ["38D_378R_2_3", "433D_629L_3_1", "609U_541L_3_0"]
    for record in records:
        site = read_site(record, NATIVE, CORRECT)
        assert set(site.series) == {"s2", "s1"}
        assert site.cell == "_".join(record.key.split("_")[:2])
        raw, transform = bands(root / "S2L2A" / f"{record.key}.tif", 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)
        s2 = site.series["s2"]
        # one of the three still carries the offset that its provider says is gone
        left_in = record.key == "433D_629L_3_1"
        assert (s2.pixels_TCHW[0] == np.clip(raw.astype(int) - 1000 * left_in, 1, None)).all()
        assert (s2.decisions[0].get("corrected", False), bool(s2.decisions[0]["flags"])) == (left_in, left_in)
        kept = read_site(record, NATIVE)
        assert ("s2" in kept.series) is not left_in
        assert [loss["modality"] for loss in kept.losses] == ["s2"] * left_in
        assert s2.transform == transform
        db, _ = bands(root / "S1RTC" / f"{record.key}.tif")
        assert (site.series["s1"].pixels_TCHW[0] == db.astype(np.float16)).all()
        cover, _ = bands(root / "LULC" / f"{record.key}.tif")
        assert (site.rasters["lulc"] == np.where(cover[0] == 0, -1, cover[0].astype(int))).all()
        assert len(site.classes["lulc"]) == 10
    assert read_site(records[0], NATIVE).series["s2"].datetimes == ["2023-06-10T07:46:21Z"]


def test_treesatai_three_modalities_both_orbits_and_cloud_masks(tmp_path):
    root = real_data("treesatai")
    (record,), _ = catalogued(tmp_path, "treesatai")
    site = read_site(record, NATIVE)
    stem = next(root.glob("*.tif"))
    rgb, transform = bands(stem, 4, 2, 3)  # near infrared, green, blue, red: test_aerial_bands.py
    hr = site.series["hr"]
    assert (hr.pixels_TCHW[0] == rgb[:, 2:302, 2:302]).all()
    assert hr.transform[2] == pytest.approx(transform[2] + 2 * 0.2)
    with h5py.File(stem.with_suffix(".h5")) as file:
        dn, probability = file["sen-2-data"][:], file["sen-2-masks"][:, 1]
        up, down = file["sen-1-asc-data"][:], file["sen-1-des-data"][:]
        products = [name.decode() if isinstance(name, bytes) else str(name) for name in file["sen-1-des-products"][:]]
    s2, s1 = site.series["s2"], site.series["s1"]
    assert (s2.pixels_TCHW == dn).all()
    assert ((s2.mask_THW == CLOUD) == (probability >= 50)).all()
    assert (s2.mask_THW == CLOUD).any()
    assert (s2.mask_THW == CLEAR).any()
    assert sorted(s1.datetimes) == s1.datetimes
    # 25 descending passes were delivered as two products each, with the very same pixels
    assert len(s1.datetimes) == 146 - 25
    ascending = np.array([orbit == "ascending" for orbit in s1.orbits])
    once = sorted(
        {name.split("_")[0] + s1_datetime(name)[:10]: i for i, name in reversed(list(enumerate(products)))}.values()
    )
    for raw, mine in ((up, s1.pixels_TCHW[ascending]), (down[once], s1.pixels_TCHW[~ascending])):
        valid = np.isfinite(mine.astype(float))
        assert valid.mean() > 0.999
        np.testing.assert_allclose(mine[valid].astype(float), 10 * np.log10(raw[valid]), atol=0.02)
    assert all("assumed" in decision["position"] for decision in s2.decisions)
    assert all(decision["source_unit"] == "linear" for decision in s1.decisions)
    assert site.footprint[2] - site.footprint[0] == pytest.approx(60)
    assert site.classes["species"][site.scalars["species"]] == "Abies_alba"


def test_majortom_offset_is_removed_and_native_bands_meet(tmp_path):
    root = real_data("majortom")
    (record,), _ = catalogued(tmp_path, "majortom")
    site = read_site(record, NATIVE)
    s2 = site.series["s2"]
    assert s2.pixels_TCHW.shape == (1, 10, 1068, 1068)
    raw, transform = bands(next(root.rglob("B04.tif")))
    assert (s2.pixels_TCHW[0, 2] == np.clip(raw[0].astype(int) - 1000, 1, None)).all()
    assert s2.transform == transform
    coarse, _ = bands(next(root.rglob("B11.tif")))
    fine = s2.pixels_TCHW[0, MODALITIES["s2"].bands.index("B11")].astype(float)
    means = fine.reshape(534, 2, 534, 2).mean(axis=(1, 3))
    assert np.abs(means - (coarse[0].astype(float) - 1000)).mean() < 25  # smooth upsampling keeps the local mean
    assert s2.decisions[0]["offset_applied"] == -1000
    assert s2.decisions[0]["flags"] == []
    assert (record.cell, s2.datetimes[0]) == ("0U_199R", "2022-07-06T08:56:11Z")
    tile = split_site(record, GridConfig(side_m=2560, tile=True))
    assert len(tile) == 16
    part = read_site(tile[5], NATIVE).series["s2"]
    assert (part.pixels_TCHW == s2.pixels_TCHW[:, :, 256:512, 256:512]).all()


def test_ssl4eo_reprojects_degrees_to_metres_and_keeps_orbits(tmp_path):
    records, _ = catalogued(tmp_path, "ssl4eo")
    (record,) = records
    site = read_site(record, NATIVE)
    assert site.crs == "EPSG:32643"
    assert site.footprint[0] % 10 == site.footprint[3] % 10 == 0
    s2, s1 = site.series["s2"], site.series["s1"]
    assert s2.pixels_TCHW.shape[-2:] == s1.pixels_TCHW.shape[-2:]
    assert s2.datetimes == ["2020-06-04T05:46:39Z", "2020-08-13T05:46:39Z"]
    assert s1.orbits == ["descending", "ascending"]
    assert (s2.mask_THW == CLEAR).all()
    assert all(decision["baseline"] == "02.14" for decision in s2.decisions)
    raw, _ = bands(next(real_data("ssl4eo").glob("s2a/*/20200604*/B4.tif")))
    assert abs(np.median(s2.pixels_TCHW[0, 2]) - np.median(raw)) < 20


def test_plain_geotiffs_bigearthnet_and_naip(tmp_path):
    records, _ = catalogued(tmp_path, "bigearthnet")
    by_modality = {record.modalities: record for record in records}
    s1 = read_site(by_modality[("s1",)], NATIVE).series["s1"]
    raw, transform = bands(next(real_data("bigearthnet").rglob("*_VH.tif")))
    assert (s1.pixels_TCHW[0, 1] == raw[0].astype(np.float16)).all()
    assert s1.transform == transform
    s2 = read_site(by_modality[("s2",)], NATIVE).series["s2"]
    raw, _ = bands(next(real_data("bigearthnet").rglob("*_B08.tif")))
    assert (s2.pixels_TCHW[0, 6] == raw[0]).all()
    (naip,), _ = catalogued(tmp_path, "naip")
    hr = read_site(naip, NATIVE).series["hr"]
    raw, transform = bands(next(real_data("naip").glob("*.tif")), 1, 2, 3)
    assert (hr.pixels_TCHW[0] == raw).all()
    np.testing.assert_allclose(hr.transform, transform, rtol=1e-12)
    assert hr.datetimes == ["2020-04-15T00:00:00Z"]


def test_audit_of_real_imagery_flags_exactly_the_known_contradictions():
    found = figures(audit(str(real_data("terramind"))))
    flagged = {entry["asset"] for entry in found["contradictions"]}
    assert flagged == {"433D_629L_3_1/S2L2A", "433D_629L_3_1/S2L1C", "609U_541L_3_0/S2L1C"}
    assert found["assets"] == 9
    assert found["faults"] == []


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name != "terramind"])
def test_audit_of_the_other_folders_finds_nothing(folder):
    rows = audit(str(real_data(folder)))
    assert [row.contradictions for row in rows if row.contradictions] == []
    assert [row.fault for row in rows if row.fault] == []
    if folder == "majortom":
        assert [row.applied for row in rows] == ["-1000"]
    if folder == "treesatai":
        assert [row.pixels for row in rows if row.modality == "s1"] == ["linear", "linear"]


def test_level_1c_files_per_band_are_top_of_atmosphere(tmp_path):
    """OSCD: `S2A_OPER_MSI_L1C_TL_…_B01.tif`, catalogued band by band; the stamp in the names is of the processing, no date."""
    city = next(real_data("labelled/oscd").glob("*Images")) / "nantes" / "imgs_1"
    make_catalog(str(city), str(tmp_path / "c.parquet"), "geotiff")
    (record,) = open_catalog(str(tmp_path / "c.parquet"))
    assert {asset.modality for asset in record.assets} == {"s2_l1c"}
    assert record.datetimes == ()
    with pytest.raises(UsageError, match=r"s2_l1c.*source\.modalities=\[s2_l1c\] builds it"):
        make_plan([record], BuildConfig())
    plan = make_plan([record], BuildConfig(source=SourceConfig(modalities=("s2_l1c",))))
    assert plan.num_sites == 1
    (part,) = split_site(record, GridConfig(side_m=640))
    series = read_site(part, NATIVE, modalities=("s2_l1c",)).series["s2_l1c"]
    assert series.pixels_TCHW.shape[:2] == (1, 13)
    assert (series.mask_THW == CLEAR).all()
    assert not series.decisions[0]["flags"]


# --- no real data needed


def test_empty_folders_and_wrong_layouts_are_usage_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for layout in LAYOUTS:
        for name in ("empty", "other", "absent"):
            with pytest.raises(UsageError) as caught:
                make_catalog(str(tmp_path / name), str(tmp_path / "c.parquet"), layout)
            assert name in str(caught.value)
    assert not (tmp_path / "c.parquet").exists()
    with pytest.raises(UsageError, match=r"no layout recognised.* without georeference become a catalog"):
        detect_layout(str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"\.parquet"):
        make_catalog(str(tmp_path), str(tmp_path / "c.csv"), "geotiff")


def test_an_unreadable_file_stops_the_catalog_unless_allowed(tmp_path):
    source = tmp_path / "tiles"
    s2_item(source, "good_20210601")
    (source / "bad_20210601_s2.tif").write_bytes(b"no raster")
    out = tmp_path / "c.parquet"
    with pytest.raises(RunFailure, match="bad_20210601"):
        make_catalog(str(source), str(out), "geotiff")
    assert not out.exists()
    found = make_catalog(str(source), str(out), "geotiff", max_faults=1)
    assert len(found.faults) == 1
    assert len(open_catalog(str(out))) == 1


def test_a_stac_folder_can_be_catalogued_and_reads_the_same(tmp_path):
    folder = write_items(tmp_path / "items", [s2_item(tmp_path, "a"), s2_item(tmp_path, "b")])
    make_catalog(folder, str(tmp_path / "c.parquet"), "stac")
    assert open_catalog(str(tmp_path / "c.parquet")) == open_catalog(folder)
    shutil.copy(tmp_path / "items" / "a.json", tmp_path / "items" / "again.json")
    with pytest.raises(UsageError, match="stands twice"):
        open_catalog(folder)


def test_flair_images_and_their_masks_meet_by_number(tmp_path):
    """Aerial RGB, near infrared and a height band in bytes at 0.2 m; the mask stands in another folder under the same number."""
    rng = np.random.default_rng(0)
    grid = Grid("EPSG:2154", (0.2, 0.0, 650_000.0, 0.0, -0.2, 6_860_000.0), 50, 50)
    pixels = rng.integers(0, 255, (5, 50, 50)).astype(np.uint8)
    mask = np.full((1, 50, 50), 7, np.uint8)
    place = tmp_path / "set"
    write_tiff(place / "flair_aerial_train" / "D012_2019" / "Z1_AA" / "img" / "IMG_012345.tif", pixels, grid)
    write_tiff(place / "flair_labels_train" / "D012_2019" / "Z1_AA" / "msk" / "MSK_012345.tif", mask, grid)
    make_catalog(str(place), str(tmp_path / "c.parquet"), "geotiff")
    (record,) = open_catalog(str(tmp_path / "c.parquet"))
    site = read_site(record, NATIVE)
    assert (site.series["hr"].pixels_TCHW[0] == pixels[:3]).all()
    assert site.series["hr"].gsd_m == 0.2
    assert (site.rasters["landcover"] == 7).all()
    assert site.rasters["landcover"].shape == (1, 1)  # the 10 m of all label rasters


@pytest.mark.parametrize(
    ("key", "who"), [("sentinel2_l2a", "OlmoEarth"), ("sentinel2", "MMEarth"), ("weights", "do not know")]
)
def test_hdf5_files_are_told_by_what_they_hold(tmp_path, key, who):
    with h5py.File(tmp_path / "sample_1.h5", "w") as file:
        file[key] = np.zeros((4, 4, 12, 12), np.uint16)
    with pytest.raises(UsageError, match=rf"{who}.*no layout here reads"):
        detect_layout(str(tmp_path))
    with h5py.File(tmp_path / "sample_1.h5", "w") as file:
        file["sen-2-data"] = np.zeros((4, 10, 6, 6), np.float32)
    assert detect_layout(str(tmp_path)) == "treesatai"
