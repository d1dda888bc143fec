"""Data sets of HDF5 files (OlmoEarth's one per sample, MMEarth's one for all), on small files made to the published layouts."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from cluster.errors import RunFailure
from data_prep.catalog import detect_layout, make_catalog
from data_prep.config import GridConfig
from data_prep.geo import centred_grid
from data_prep.schema import CLOUD, MODALITIES
from data_prep.sources import SourceFault, open_catalog, read_site
from data_prep.sources import mmearth as mmearth_module

NATIVE = GridConfig()


def test_a_grid_around_a_place_lies_on_whole_pixels():
    """The middle of zone 33 on the equator is easting 500 km; height and width are not mixed up."""
    grid = centred_grid("EPSG:32633", 15.0, 0.0, (4, 6), 10.0)
    assert grid.bounds == (499_970.0, -20.0, 500_030.0, 20.0)
    assert grid.shape == (4, 6)
    moved = centred_grid("EPSG:32633", 15.00005, 0.00001, (4, 6), 10.0)  # 5.6 m east, 1.1 m north
    assert moved.bounds == (499_980.0, -20.0, 500_040.0, 20.0)


def olmoearth(path, timestamps, seed=0, every_capture=False):
    """One sample as OlmoEarth's `convert_to_h5py` writes it: Zstandard, [H, W, T, C], months from 0; returns what lies in it."""
    import hdf5plugin

    rng = np.random.default_rng(seed)
    side, held = 16, np.ones(len(timestamps), bool)
    held[1] = every_capture
    s2 = rng.integers(20, 4000, (side, side, int(held.sum()), 12)).astype(np.uint16)
    s1 = rng.normal(-14, 2, (side, side, len(timestamps), 2)).astype(np.float32)
    zstd = hdf5plugin.Zstd(clevel=3)
    scl = np.full((side, side, len(timestamps), 1), 4, np.uint8)
    scl[2, 3, 1], scl[5, 6, 0] = 9, 8
    content = {
        "latlon": np.array([48.2, 16.4], np.float32),
        "sentinel2_l2a": s2,
        "sentinel1": s1,
        "worldcover": np.full((side, side, 1), 10, np.uint8),
    }
    if every_capture:
        dated = ("sentinel2_l2a", "sentinel1", "sentinel2_scl")
        content |= {"sentinel2_scl": scl, **{f"timestamps_{series}": np.array(timestamps) for series in dated}}
    else:
        content["timestamps"] = np.array(timestamps)
    with h5py.File(path, "w") as file:
        for name, values in content.items():  # everything but the masks
            file.create_dataset(name, data=values, chunks=values.shape, compression=zstd)
        if not every_capture:
            file["missing_timesteps_masks/sentinel2_l2a"] = held
            file["missing_timesteps_masks/sentinel1"] = np.ones(len(timestamps), bool)
    return s2, s1


def test_olmoearth_samples_one_hdf5_file_each(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    s2, s1 = olmoearth(source / "sample_2.h5", [[1, 0, 2021], [3, 5, 2021], [31, 11, 2021]])
    every = [[1, 0, 2021], [1, 0, 2021], [3, 5, 2021]]  # two captures of one day
    other, _ = olmoearth(source / "sample_10.h5", every, seed=1, every_capture=True)
    assert detect_layout(str(source)) == "olmoearth"
    make_catalog(str(source), str(tmp_path / "c.parquet"), "olmoearth")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [record.key for record in records] == ["sample_2", "sample_10"]
    assert records[0].crs == "EPSG:32633"
    west, south, east, north = records[0].bbox_wgs84
    assert west < 16.4 < east
    assert south < 48.2 < north
    assert records[0].cell == records[1].cell
    site = read_site(records[0], NATIVE)
    order = [
        ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12").index(b) for b in MODALITIES["s2"].bands
    ]
    series = site.series["s2"]
    assert series.datetimes == ["2021-01-01T00:00:00Z", "2021-12-31T00:00:00Z"]  # the second month has no image
    assert (series.pixels_TCHW == s2.transpose(2, 3, 0, 1)[:, order]).all()
    assert series.decisions[0]["position"].startswith("assumed")
    assert site.series["s1"].datetimes[1] == "2021-06-03T00:00:00Z"
    np.testing.assert_allclose(site.series["s1"].pixels_TCHW, s1.transpose(2, 3, 0, 1), atol=0.01)
    series = read_site(records[1], NATIVE).series["s2"]
    assert series.datetimes == ["2021-01-01T00:00:00Z", "2021-06-03T00:00:00Z"]  # tiles of one pass are one date
    assert (series.mask_THW[0] == CLOUD).sum() == 1
    assert series.mask_THW[0, 5, 6] == CLOUD
    assert (series.pixels_TCHW[1] == other[:, :, 2].transpose(2, 0, 1)[order]).all()


def test_olmoearth_samples_that_contradict_themselves_are_faults(tmp_path):
    (tmp_path / "set").mkdir()
    olmoearth(tmp_path / "set" / "sample_0.h5", [[1, 12, 2021], [3, 5, 2021]])
    with pytest.raises(RunFailure, match="day, month from 0, year"):
        make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "olmoearth")
    olmoearth(tmp_path / "set" / "sample_0.h5", [[1, 1, 2021], [3, 5, 2021]])
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "olmoearth")
    (record,) = open_catalog(str(tmp_path / "c.parquet"))
    with h5py.File(tmp_path / "set" / "sample_0.h5", "r+") as file:
        del file["missing_timesteps_masks"]
    with pytest.raises(SourceFault, match=r"sentinel2_l2a has shape .*, wanted .* by its dates"):
        read_site(record, NATIVE)


def mmearth(folder):
    """Three tiles as MMEarth's `convert_to_h5` writes them: L2A with both orbits, L1C with one, L2A with HH only."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    info, side = {}, 32
    s2 = rng.integers(20, 4000, (3, 13, side, side)).astype(np.uint16)
    s2[[0, 2], 10] = 0
    s1 = rng.normal(-14, 2, (3, 8, side, side)).astype(np.float32)
    s1[0, [2, 3, 6, 7]] = s1[1, [2, 3, 4, 5, 6, 7]] = s1[2, [0, 1, 3, 4, 5, 6, 7]] = -np.inf
    scl = np.full((3, 1, side, side), 4, np.uint8)
    scl[1], scl[0, 0, 4, 5] = 255, 9
    types = ("l2a", "l1c", "l2a")
    radar = ((["VV", "VH"], ["VV", "VH"]), (["VV", "VH"], None), (["HH"], None))
    for number, (kind, (asc, desc)) in enumerate(zip(types, radar)):
        info[f"tile{number}"] = {
            "S2_DATE": f"2019-0{number + 4}-11", "S2_type": kind, "CRS": "EPSG:32632", "lat": 46.5 + number / 10, "lon": 9.25,
            "biome": 3, "eco_region": 1, "BANDS": {"sentinel2": [], "sentinel1_asc": asc, "sentinel1_desc": desc},
        }  # fmt: skip
    with h5py.File(folder / "data_100k_v001.h5", "w") as file:
        for name, values in (("sentinel2", s2), ("sentinel1", s1), ("sentinel2_scl", scl)):
            file.create_dataset(name, data=values, compression="gzip", chunks=(1, *values.shape[1:]))
        rows = np.array([(f"tile{n}", kind) for n, kind in enumerate(types)], [("tile_id", "S100"), ("S2_type", "S10")])
        file.create_dataset("metadata", data=rows, compression="gzip", chunks=(1,))
    (folder / "data_100k_v001_tile_info.json").write_text(json.dumps(info))
    return s2, s1


def test_mmearth_tiles_of_one_hdf5_file(tmp_path):
    s2, s1 = mmearth(tmp_path / "set")
    assert detect_layout(str(tmp_path / "set")) == "mmearth"
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "mmearth")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [record.modalities for record in records] == [("s2", "s1"), ("s1", "s2_l1c"), ("s2",)]
    order = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B8A", "B08", "B09", "B10", "B11", "B12")
    site = read_site(records[0], NATIVE)
    bands = [order.index(band) for band in MODALITIES["s2"].bands]
    assert (site.series["s2"].pixels_TCHW[0] == s2[0, bands]).all()
    assert site.series["s2"].datetimes == ["2019-04-11T00:00:00Z"]
    assert (site.series["s2"].mask_THW[0] == CLOUD).sum() == 1
    assert site.series["s2"].decisions[0]["offset_applied"] == 0
    np.testing.assert_allclose(site.series["s1"].pixels_TCHW, s1[0].reshape(2, 4, 32, 32)[:, :2], atol=0.01)
    assert site.series["s1"].orbits == ["ascending", "descending"]
    assert site.series["s1"].datetimes == ["", ""]  # the file does not say
    assert site.series["s1"].decisions[0]["calibration"] == "sigma0 GRD"
    west, south, east, north = records[0].bbox_wgs84
    assert west < 9.25 < east
    assert south < 46.5 < north
    assert records[0].footprint[2] - records[0].footprint[0] == 320
    l1c = read_site(records[1], NATIVE, modalities=("s2_l1c", "s1"))
    places = [order.index(band) for band in MODALITIES["s2_l1c"].bands]
    assert (l1c.series["s2_l1c"].pixels_TCHW[0] == s2[1, places]).all()
    assert l1c.series["s1"].orbits == ["ascending"]


def test_mmearth_tiles_that_nobody_knows_are_faults(tmp_path):
    mmearth(tmp_path / "set")
    path = tmp_path / "set" / "data_100k_v001_tile_info.json"
    info = json.loads(path.read_text())
    info["tile1"]["S2_type"] = "l2a"
    del info["tile2"]
    path.write_text(json.dumps(info))
    mmearth_module._infos.cache_clear()
    with pytest.raises(RunFailure, match=r"S2_type is 'l1c' in data_100k_v001.h5 and 'l2a'.*tile tile2 is not in"):
        make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "mmearth")
