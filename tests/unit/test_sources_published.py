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
from tests.providers import published
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

    xs = GRID.transform[2] + 10 * (np.arange(values.shape[-1]) + 0.5)
    ys = GRID.transform[5] - 10 * (np.arange(values.shape[-2]) + 0.5)
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


def write_ssl4eo_v11(path: Path, values, bands, seconds, places, samples) -> None:
    """A 64 x 4 file as its README lists it: `x`, `y`, `time` count, `x_`, `y_`, `time_` say; CF times as xarray writes them."""
    count, times = values.shape[:2]
    folder = path.with_suffix(".folder")
    group = zarr.open_group(str(folder), mode="w", zarr_format=2)

    def put(name, data, dims, **attributes):
        array = group.create_array(name, data=np.asarray(data))
        array.attrs.update({"_ARRAY_DIMENSIONS": dims, **attributes})

    height, width = values.shape[-2:]
    put("bands", values, ["sample", "time", "band", "y", "x"])
    put("band", np.array(bands, dtype="U3"), ["band"])
    put("sample", np.array(samples, dtype="U7"), ["sample"])
    for name, size in (("time", times), ("x", width), ("y", height)):
        put(name, np.arange(size), [name])
    put("time_", seconds, ["sample", "time"], units="seconds since 2020-01-01", calendar="proleptic_gregorian")
    put("x_", np.stack([x + 10 * (np.arange(width) + 0.5) for _, x, _ in places]), ["sample", "x"])
    put("y_", np.stack([y - 10 * (np.arange(height) + 0.5) for _, _, y in places]), ["sample", "y"])
    put("crs", np.array([epsg for epsg, _, _ in places]), ["sample"])
    put("cloud_mask", np.zeros((count, times, height, width), np.uint8), ["sample", "time", "y", "x"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())


def test_ssl4eo_v11_files_of_many_locations_and_dates(tmp_path):
    """A site in Korea lies in Korea, in its year; and the offset that this edition left in is taken out."""
    rng = np.random.default_rng(1)
    truth = rng.integers(50, 4000, (2, 4, 12, 24, 24)).astype(np.int16)
    days = np.array([[320, 20, 110, 200], [323, 23, 113, 203]]) * 86400 + 36_631
    places = [(32652, 714_900.0, 4_728_000.0), (32751, 300_000.0, 6_600_000.0)]
    path = tmp_path / "set" / "S2L2A" / "ssl4eos12_val_seasonal_data_000001.zarr.zip"
    write_ssl4eo_v11(path, truth + np.int16(1000), L2A_ORDER, days, places, ["0080717", "0060573"])
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "ssl4eo")
    records = {r.key: r for r in open_catalog(str(tmp_path / "c.parquet"))}
    for number, key in enumerate(("0080717", "0060573")):
        site = read_site(records[key], NATIVE)
        s2 = site.series["s2"]
        order = np.argsort(days[number])
        assert (s2.pixels_TCHW == truth[number][order][:, TEN]).all()
        assert s2.datetimes[-1] == ("2020-11-16T10:10:31Z", "2020-11-19T10:10:31Z")[number]
        assert s2.transform[2:6:3] == places[number][1:]
        assert not any(decision["flags"] for decision in s2.decisions)
    assert 130 < records["0080717"].bbox_wgs84[0] < 133
    assert 42 < records["0080717"].bbox_wgs84[1] < 43


def eopf(folder: Path, offset_dn: int = 1000) -> tuple[dict, dict]:
    """A published item of ESA's EOPF samples, its product written small: a variable per band, a group per resolution; and the bands'
    reflectances."""
    rng = np.random.default_rng(4)
    entry = published("eopf_s2_l2a")
    product = entry["id"]
    root = zarr.open_group(str(folder / f"{product}.zarr"), mode="w", zarr_format=2)
    root.attrs.update({
        "stac_discovery": {"type": "Feature", "properties": {"proj:epsg": 32632, "platform": "sentinel-2b"}},
        "other_metadata": {"horizontal_CRS_code": "EPSG:32632"},
    })  # fmt: skip
    truth = {}
    groups = {
        10: ("b02", "b03", "b04", "b08"),
        20: ("b01", "b02", "b03", "b04", "b05", "b06", "b07", "b8a", "b11", "b12"),
        60: ("b01", "b02", "b03", "b04", "b05", "b06", "b07", "b8a", "b09", "b11", "b12"),
    }
    for gsd, bands in groups.items():
        group = root.create_group(f"measurements/reflectance/r{gsd}m")
        side = 240 // gsd
        for name, values in (
            ("x", 300_000 + gsd * (np.arange(side) + 0.5)),
            ("y", 5_000_040 - gsd * (np.arange(side) + 0.5)),
        ):
            group.create_array(name, data=values.astype(np.int64)).attrs["_ARRAY_DIMENSIONS"] = [name]
        for band in bands:
            values = rng.integers(20, 4000, (side, side)).astype(np.uint16)
            native = gsd == min(g for g, names in groups.items() if band in names)
            truth |= {band.upper(): values} if native else {}
            about = {
                "scale_factor": 0.0001,
                "add_offset": -offset_dn / 10_000,
                "fill_value": 0,
                "dtype": "<u2",
                "units": "digital_counts",
            }
            array = group.create_array(band, data=values + np.uint16(offset_dn), chunks=(side, side))
            array.attrs.update({"_ARRAY_DIMENSIONS": ["y", "x"], "_eopf_attrs": about, **about, "proj:epsg": 32632})
    mask = root.create_group("conditions/mask/l2a_classification/r20m")
    mask.create_array("x", data=(300_000 + 20 * (np.arange(12) + 0.5)).astype(np.int64))
    mask.create_array("y", data=(5_000_040 - 20 * (np.arange(12) + 0.5)).astype(np.int64))
    scl = np.full((12, 12), 4, np.uint8)
    scl[2, 3] = 9
    mask.create_array("scl", data=scl).attrs["_ARRAY_DIMENSIONS"] = ["y", "x"]
    for asset in entry["assets"].values():
        inner = asset["href"].partition(".zarr")[2]
        asset["href"] = f"{folder}/{product}.zarr{inner}"
    return entry, truth


@pytest.mark.parametrize("form", ["published", "arrays", "product"])
def test_eopf_zarr_with_a_variable_per_band_and_a_group_per_resolution(tmp_path, form):
    """The item lists groups (`SR_10m`), arrays (`B02_10m`) and the product; its `proj:bbox` is in degrees beside a UTM code."""
    entry, truth = eopf(tmp_path)
    if form == "arrays":
        entry["assets"] = {name: asset for name, asset in entry["assets"].items() if not name.startswith("SR_")}
    if form == "product":  # the product itself, as an xarray tree
        href = next(iter(entry["assets"].values()))["href"].split(".zarr/")[0] + ".zarr"
        entry["assets"] = {"product": {"href": href, "type": "application/vnd+zarr", "geoloom:modality": "s2"}}
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "x.json").write_text(json.dumps(entry))
    (record,) = open_catalog(str(tmp_path / "items"))
    assert record.footprint == (300000.0, 4999800.0, 300240.0, 5000040.0)
    s2 = read_site(record, NATIVE).series["s2"]
    bands = MODALITIES["s2"].bands
    clear = s2.mask_THW[0] == 1
    for band in ("B02", "B03", "B04", "B08"):
        assert (s2.pixels_TCHW[0, bands.index(band)][clear] == truth[band][clear]).all()
    assert abs(s2.pixels_TCHW[0, bands.index("B11")].mean() - truth["B11"].mean()) < 60
    cloudy = np.zeros((24, 24), bool)
    cloudy[4:6, 6:8] = True
    assert ((s2.mask_THW[0] == CLOUD) == cloudy).all()
    assert s2.decisions[0]["offset_applied"] == -1000
    assert s2.datetimes == ["2025-11-13T10:23:11Z"]


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


def test_copernicus_repeats_and_names_in_lists_of_one(tmp_path):
    """A short season is padded with repeats of an image; some names stand alone in a list."""
    rng = np.random.default_rng(6)
    images = rng.normal(-14, 3, (1, 2, 2, 264, 264)).astype(np.float32)
    padded = images[:, [0, 1, 1, 0]]
    name = "0772176_-96.00_44.00/0865830_-95.95_43.99/2021{:02d}05"
    names = {"s1_grd": [[[name.format(3)], [name.format(9)], [name.format(9)], [name.format(3)]]]}
    (tmp_path / "set").mkdir()
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", padded.tobytes())
    with tarfile.open(tmp_path / "set" / "example-000000.tar", "w") as tar:
        _add(tar, "0772176.s1_grd.pth", stored.getvalue())
        _add(tar, "0772176.json", json.dumps(names).encode())
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "copernicus")
    (record,) = open_catalog(str(tmp_path / "c.parquet"))
    s1 = read_site(record, NATIVE).series["s1"]
    assert s1.datetimes == ["2021-03-05T00:00:00Z", "2021-09-05T00:00:00Z"]
    assert (s1.pixels_TCHW == images[0].astype(np.float16)).all()


def test_cataloguing_reads_coordinates_and_no_image(tmp_path, monkeypatch):
    from data_prep.sources import zarr_store

    rng = np.random.default_rng(0)
    shard = tmp_path / "set" / "S2L2A" / "majortom_shard_000001.tar"
    shard.parent.mkdir(parents=True)
    data = write_mesh(
        tmp_path / "x.zarr.zip", rng.integers(50, 4000, (1, 12, 264, 264)).astype(np.int16), L2A_ORDER, [STAMP]
    )
    with tarfile.open(shard, "w") as tar:
        _add(tar, "100U_20L_0_1.zarr.zip", data)
    read = []
    plain = zarr_store.read_source
    monkeypatch.setattr(
        zarr_store, "read_source", lambda href, start, end: read.append(end - start) or plain(href, start, end)
    )
    make_catalog(str(tmp_path / "set"), str(tmp_path / "c.parquet"), "terramind")
    assert len(data) > 1_000_000
    assert sum(read) <= 4 * zarr_store.PAGE
