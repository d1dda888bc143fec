"""Shard sets: round trip, deterministic bytes, an index that tells the truth, public tools open all of it."""

from __future__ import annotations

import io
import json
import tarfile

import geopandas
import numpy as np
import pyarrow.fs  # noqa: F401  (stac_geoparquet needs it imported)
import pyarrow.parquet as pq
import pystac
import pytest
import webdataset

from cluster import storage
from cluster.errors import UsageError
from data_prep import statistics
from data_prep.codec import MemberError, open_member
from data_prep.config import CodecsConfig
from data_prep.schema import CLEAR, MODALITIES, default_modalities
from data_prep.shards import ShardSet
from data_prep.tar import TarWriter, walk
from tests.sites import make_site, write_shard_set


def same(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def sites():
    return [
        make_site("a_0", 0), make_site("a_1", 1, ("s2",), place=(200, 0)), make_site("a_2", 2, ("hr",), labels=False, place=(400, 0)),
        make_site("a_3", 3, ("s1", "s2"), dates=5, place=(600, 0)), make_site("a_4", 4, place=(800, 0)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "codecs", [CodecsConfig(), CodecsConfig("npy", "zarr.zip", "b2nd-zstd", "npy", "zarr.zip", 32)]
)
def test_round_trip(sites, tmp_path, codecs):
    shards = ShardSet.open(write_shard_set(str(tmp_path), sites, ["train"] * 4 + ["val"], 3, codecs))
    assert shards.num_samples == 5
    assert shards.index["shard"].to_pylist() == ["train-000000.tar"] * 3 + ["train-000001.tar", "val-000000.tar"]
    assert shards.index["row"].to_pylist() == list(range(5))
    for row, site in enumerate(sites):
        got = shards.read_sample(row)
        assert (got.key, got.crs, got.cell, got.scalars, got.classes) == (
            site.key,
            site.crs,
            site.cell,
            site.scalars,
            site.classes,
        )
        assert got.footprint == pytest.approx(site.footprint, abs=0)
        assert got.bbox_wgs84 == site.bbox_wgs84
        assert list(got.series) == [name for name in MODALITIES if name in site.series]
        for name, series in site.series.items():
            other = got.series[name]
            assert same(other.pixels_TCHW, series.pixels_TCHW)
            assert same(other.mask_THW, series.mask_THW)
            for field in ("datetimes", "transform", "gsd_m", "product_ids", "orbits", "decisions"):
                assert getattr(other, field) == getattr(series, field)
        for name, raster in site.rasters.items():
            assert same(got.rasters[name], raster)


def test_same_bytes_again(sites, tmp_path):
    for name in ("x", "y"):
        write_shard_set(str(tmp_path / name), sites, per_shard=2)
    files = sorted(p.relative_to(tmp_path / "x") for p in (tmp_path / "x").rglob("*") if p.is_file())
    assert len(files) == 3 + 3 * 3 + 4
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes(), file


def test_index_offsets_point_at_members(sites, tmp_path):
    shards = ShardSet.open(write_shard_set(str(tmp_path), sites))
    for row in shards.index.to_pylist():
        tar = (tmp_path / row["shard"]).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            mine = [m for m in archive.getmembers() if m.name.partition(".")[0] == row["key"]]
        assert [m.name for m in mine] == [f"{row['key']}.{m['name']}" for m in row["members"]]
        assert [(m.offset_data, m.size) for m in mine] == [(m["offset"], m["length"]) for m in row["members"]]
        assert row["offset"] == mine[0].offset
        assert row["offset"] + row["length"] == mine[-1].offset_data + mine[-1].size + -mine[-1].size % 512
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in mine} == {(0, 0, 0, 0o644, "")}


def test_index_row_tells_what_the_sample_holds(sites, tmp_path):
    shards = ShardSet.open(write_shard_set(str(tmp_path), sites))
    row = shards.index.to_pylist()[3]
    s2 = sites[3].series["s2"]
    assert row["modalities"] == ["s2", "s1"]
    assert row["s2_datetimes"] == s2.datetimes
    assert row["s2_shape"] == list(s2.pixels_TCHW.shape)
    assert row["s2_clear"] == pytest.approx((s2.mask_THW == CLEAR).mean(axis=(1, 2)), abs=1e-6)
    assert row["offset_applied"] == [-1000.0] * 5
    assert [json.loads(text)["basis"] for text in row["s2_decisions"]] == ["baseline 05.09"] * 5
    assert row["hr_shape"] is None
    assert row["label_scene"] == sites[3].scalars["scene"]
    assert shards.index.to_pylist()[2]["label_scene"] is None


def test_stock_webdataset_reads_the_tars(sites, tmp_path):
    url = write_shard_set(str(tmp_path), sites, per_shard=3)
    names = ShardSet.open(url).manifest["shards"]
    got = list(webdataset.WebDataset([f"{url}/{s['name']}" for s in names], shardshuffle=False))
    assert [sample["__key__"] for sample in got] == [site.key for site in sites]
    for sample, site in zip(got, sites):
        assert json.loads(sample["json"])["key"] == site.key
        for name, series in site.series.items():
            assert same(open_member(sample[f"{name}.b2nd"], "b2nd").read_all(), series.pixels_TCHW)


def test_index_is_geoparquet_and_stac(sites, tmp_path):
    url = write_shard_set(str(tmp_path), sites)
    frame = geopandas.read_parquet(f"{url}/index.parquet")
    assert frame.crs.equals("OGC:CRS84")
    assert frame.geometry.is_valid.all()
    for polygon, site in zip(frame.geometry, sites):
        assert polygon.bounds == pytest.approx(site.bbox_wgs84, abs=2e-4)
    assert len(geopandas.read_parquet(f"{url}/index.parquet", bbox=(14.9999, 46.9, 15.0001, 47))) == 1
    import stac_geoparquet

    items = list(stac_geoparquet.arrow.stac_table_to_items(pq.read_table(f"{url}/index.parquet")))
    assert [item["id"] for item in items] == [site.key for site in sites]
    for item, row in zip(items, frame.to_dict("records")):
        stac = pystac.Item.from_dict(item)
        assert stac.assets["shard"].href == row["shard"]
        assert stac.datetime.isoformat().startswith(row["datetime_start"][:19])
        assert stac.geometry["type"] == "Polygon"


@pytest.mark.parametrize("piece", [7, statistics.PIECE])  # 7: several pieces, bytes in pairs
def test_statistics_are_those_of_all_clear_pixels(piece, sites, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "PIECE", piece)
    shards = ShardSet.open(write_shard_set(str(tmp_path), sites, per_shard=2))
    for name, spec in ((name, MODALITIES[name]) for name in default_modalities()):
        for band in range(len(spec.bands)):
            values = np.concatenate([
                s.series[name].pixels_TCHW[:, band][s.series[name].mask_THW == CLEAR] for s in sites if name in s.series
            ]).astype(np.float64)  # fmt: skip
            found = shards.statistics[name]
            assert found.count[band] == len(values)
            assert found.mean[band] == pytest.approx(values.mean(), rel=1e-12)
            assert found.std[band] == pytest.approx(values.std(), rel=1e-12)
            assert found.percentiles[band] == tuple(np.percentile(values, [1, 2, 50, 98, 99], method="inverted_cdf"))


def test_damage_is_named(sites, tmp_path):
    url = write_shard_set(str(tmp_path), sites)
    shards = ShardSet.open(url)
    member = shards.index["members"][1].as_py()[1]
    tar = bytearray((tmp_path / "train-000000.tar").read_bytes())
    tar[member["offset"] + 20] ^= 1
    (tmp_path / "train-000000.tar").write_bytes(tar)
    shards.read_sample(0)
    with pytest.raises(MemberError, match=r"train-000000.tar: a_1: s2.b2nd does not match its checksum"):
        shards.read_sample(1)


def test_not_a_shard_set(tmp_path):
    with pytest.raises(UsageError, match="not a shard set"):
        ShardSet.open(str(tmp_path))
    with pytest.raises(UsageError, match="not a shard set"):
        ShardSet.open(str(tmp_path / "absent"))
    storage.write_atomic(str(tmp_path / "manifest.json"), b"{")
    with pytest.raises(UsageError, match="damaged"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1023, 1024, 1500])
def test_walk_refuses_a_cut_tar(cut):
    stream = io.BytesIO()
    tar = TarWriter(stream)
    tar.add("a.json", b"x" * 700)
    tar.add("a.npy", b"y" * 10)
    tar.close()
    assert [e.name for e, _ in walk(io.BytesIO(stream.getvalue()))] == ["a.json", "a.npy"]
    with pytest.raises(ValueError, match="cut short"):
        list(walk(io.BytesIO(stream.getvalue()[:-cut])))
