"""Data sets as their authors publish them (TerraMesh, SSL4EO-S12 v1.1, Major-TOM Parquet, Copernicus-Pretrain), on small files made
to the published layouts.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from data_prep.audit import audit, figures
from data_prep.catalog import detect_layout, make_catalog
from data_prep.config import GridConfig
from data_prep.geo import Grid
from data_prep.schema import CLOUD, MODALITIES
from data_prep.sources import SourceFault, open_catalog, read_site
from data_prep.sources.names import L2A_ORDER
from tests.scenes import write_tiff

NATIVE = GridConfig()
GRID = Grid("EPSG:32633", (10.0, 0.0, 600000.0, 0.0, -10.0, 5300000.0), 24, 24)
STAMP = np.datetime64("2021-06-01T10:10:31", "ns").astype(np.int64)
TEN = [L2A_ORDER.index(band) for band in MODALITIES["s2"].bands]


def write_mesh(path: Path, values: np.ndarray, bands, times, cloud=None, samples=None) -> bytes:
    """A `.zarr.zip` as published: format 2, one chunk per sample, dims by attribute."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_suffix(".folder")
    group = zarr.open_group(str(folder), mode="w", zarr_format=2)
    lead = [] if samples is None else ["sample"]
    count = len(samples or [1])

    def put(name, data, dims):
        array = group.create_array(name, data=np.asarray(data))
        array.attrs["_ARRAY_DIMENSIONS"] = dims

    xs = GRID.transform[2] + 10 * (np.arange(24) + 0.5)
    ys = GRID.transform[5] - 10 * (np.arange(24) + 0.5)
    put("bands", values, [*lead, "time", "band", "y", "x"])
    put("band", np.array(bands, dtype="S4"), ["band"])
    put("x", np.stack([xs] * count) if lead else xs, [*lead, "x"])
    put("y", np.stack([ys] * count) if lead else ys, [*lead, "y"])
    put("time", times, [*lead, "time"])
    put("crs", np.full(count, 32633) if lead else np.array([32633]), lead or ["one"])
    if cloud is not None:
        put("cloud_mask", cloud, [*lead, "time", "y", "x"])
    if samples is not None:
        put("sample", np.array(samples, dtype="S12"), ["sample"])
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path.read_bytes()


def test_terramesh_tars_one_per_modality(tmp_path):
    rng = np.random.default_rng(0)
    truth = {}
    for folder, bands in (("S2L2A", L2A_ORDER), ("S1RTC", ("vv", "vh"))):
        shard = tmp_path / "set" / "train" / folder / "majortom_shard_000001.tar"
        shard.parent.mkdir(parents=True)
        with tarfile.open(shard, "w") as tar:
            for stem in ("100U_20L_0_1", "101U_20L_2_2"):
                s2 = folder == "S2L2A"
                values = (
                    rng.integers(50, 4000, (1, 12, 24, 24)).astype(np.int16)
                    if s2
                    else rng.normal(-14, 3, (1, 2, 24, 24)).astype(np.float16)
                )
                cloud = (rng.random((1, 24, 24)) < 0.2).astype(np.uint8) if s2 else None
                data = write_mesh(tmp_path / "x.zarr.zip", values, bands, [STAMP], cloud)
                info = tarfile.TarInfo(f"{stem}.zarr.zip")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                truth[stem, folder] = (values, cloud)
    root = str(tmp_path / "set")
    assert detect_layout(root) == "terramind"
    make_catalog(root, str(tmp_path / "c.parquet"), "terramind")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [r.key for r in records] == ["100U_20L_0_1", "101U_20L_2_2"]
    for record in records:
        site = read_site(record, NATIVE)
        s2, s1 = site.series["s2"], site.series["s1"]
        values, cloud = truth[record.key, "S2L2A"]
        assert (s2.pixels_TCHW == values[:, TEN]).all()
        assert ((s2.mask_THW == CLOUD) == (cloud == 1)).all()
        assert s2.transform == GRID.transform
        assert s2.datetimes == ["2021-06-01T10:10:31Z"]
        assert (s1.pixels_TCHW == truth[record.key, "S1RTC"][0]).all()
        assert site.cell == "_".join(record.key.split("_")[:2])
    assert figures(audit(root)) == {"assets": 4, "contradictions": [], "faults": []}
    shard = tmp_path / "set" / "train" / "S2L2A" / "majortom_shard_000001.tar"
    damaged = bytearray(shard.read_bytes())
    middle = int(records[0].of("s2")[0].member.split(":")[0]) + 3000
    damaged[middle : middle + 400] = b"\0" * 400
    shard.write_bytes(damaged)
    rest = read_site(records[0], NATIVE)
    assert set(rest.series) == {"s1"}
    assert [(loss["modality"], loss["asset"]) for loss in rest.losses] == [("s2", "100U_20L_0_1/S2L2A")]
    with pytest.raises(SourceFault, match="100U_20L_0_1/S2L2A"):
        read_site(records[0], NATIVE, modalities=("s2",))
    read_site(records[1], NATIVE)


def test_ssl4eo_v11_files_of_many_locations_and_dates(tmp_path):
    rng = np.random.default_rng(1)
    stamps = STAMP + np.arange(4)[None] * 90 * 86_400 * 10**9 + np.array([[0], [3]]) * 86_400 * 10**9
    values = rng.integers(50, 4000, (2, 4, 12, 24, 24)).astype(np.int16)
    write_mesh(
        tmp_path / "set" / "S2L2A" / "ssl4eos12_val_000001.zarr.zip",
        values,
        L2A_ORDER,
        stamps,
        samples=["0000173", "0000200"],
    )
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "ssl4eo")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [r.key for r in records] == ["0000173", "0000200"]
    for number, record in enumerate(records):
        s2 = read_site(record, NATIVE).series["s2"]
        assert (s2.pixels_TCHW == values[number][:, TEN]).all()
        assert s2.datetimes[0] == ("2021-06-01T10:10:31Z", "2021-06-04T10:10:31Z")[number]


def test_majortom_parquet_rows_with_geotiff_bytes(tmp_path):
    rng = np.random.default_rng(2)
    rows, truth = [], {}
    for cell in ("10U_5R", "11U_5R"):
        product = f"S2A_MSIL2A_20220706T085611_N0400_R007_T33NZA_20220706T153419_{cell}"
        row = {"grid_cell": cell, "product_id": product}
        for band in MODALITIES["s2"].bands:
            pixels = rng.integers(1010, 5000, (1, 24, 24)).astype(np.uint16)
            row[band] = Path(write_tiff(tmp_path / "b.tif", pixels, GRID)).read_bytes()
            truth[cell, band] = pixels[0]
        row["cloud_mask"] = Path(write_tiff(tmp_path / "b.tif", np.zeros((1, 24, 24), np.uint8), GRID)).read_bytes()
        rows.append(row)
    (tmp_path / "set" / "images").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "images" / "part_00001.parquet", row_group_size=1)
    assert detect_layout(str(tmp_path / "set")) == "majortom"
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "majortom")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [r.cell for r in records] == ["10U_5R", "11U_5R"]
    for record in records:
        s2 = read_site(record, NATIVE).series["s2"]
        for number, band in enumerate(MODALITIES["s2"].bands):
            assert (s2.pixels_TCHW[0, number] == np.clip(truth[record.cell, band].astype(int) - 1000, 1, None)).all()
        assert s2.decisions[0]["baseline"] == "04.00"


def test_copernicus_tensors_are_read_without_touching_their_pickle(tmp_path):
    rng = np.random.default_rng(3)
    names = {
        "s1_grd": [
            [f"0772176_-96.00_44.00/086583{p}_-95.95_43.{99 - 3 * p}/2021{m:02d}05" for m in (3, 9)] for p in range(2)
        ],
        "s2_toa": [
            [f"0772176_-96.00_44.00/086583{p}_-95.95_43.{99 - 3 * p}/2021{m:02d}11" for m in (3, 9)] for p in range(2)
        ],
    }
    s1 = rng.normal(-14, 3, (2, 2, 2, 264, 264)).astype(np.float32)
    s2 = rng.integers(5, 3000, (2, 2, 13, 264, 264)).astype(np.int16)
    (tmp_path / "set").mkdir()
    shard = tmp_path / "set" / "example-000000.tar"
    with tarfile.open(shard, "w") as tar:
        for member, values in (("s1_grd", s1), ("s2_toa", s2)):
            stored = io.BytesIO()
            with zipfile.ZipFile(stored, "w") as archive:
                archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'exit 9'\ntR.")  # never looked at
                archive.writestr("archive/byteorder", b"little")
                archive.writestr("archive/data/0", values.tobytes())
            _add(tar, f"0772176.{member}.pth", stored.getvalue())
        _add(tar, "0772176.json", json.dumps(names).encode())
    assert detect_layout(str(tmp_path / "set")) == "copernicus"
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "copernicus")
    records = open_catalog(str(tmp_path / "c.parquet"))
    assert [(r.key, r.modalities) for r in records] == [(f"0772176_{p}", ("s1", "s2_l1c")) for p in range(2)]
    for number, record in enumerate(records):
        site = read_site(record, NATIVE)
        assert set(site.series) == {"s1"}  # the other half is top of atmosphere, read when asked for
        asked = read_site(record, NATIVE, modalities=("s2_l1c",)).series["s2_l1c"]
        assert (asked.pixels_TCHW == s2[number]).all()
        assert (site.series["s1"].pixels_TCHW == s1[number].astype(np.float16)).all()
        assert site.series["s1"].datetimes == ["2021-03-05T00:00:00Z", "2021-09-05T00:00:00Z"]
        assert site.series["s1"].decisions[0]["position"].startswith("assumed")
        west, south, east, north = site.bbox_wgs84
        assert west < -95.95 < east
        assert south < 43.99 - 0.03 * number < north
    assert figures(audit(str(tmp_path / "set")))["contradictions"] == []
    names["s1_grd"][0].append("0772176_-96.00_44.00/0865830_-95.95_43.99/20211205")
    with tarfile.open(shard, "a") as tar:
        _add(tar, "0772177.json", json.dumps(names).encode())
        _add(tar, "0772177.s1_grd.pth", b"no zip")
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "copernicus")
    broken = next(r for r in open_catalog(str(tmp_path / "c.parquet")) if r.key == "0772177_0")
    with pytest.raises(SourceFault, match="not as its JSON says"):
        read_site(broken, NATIVE)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
