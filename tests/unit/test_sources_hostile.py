"""Strangers' files: what claims too much or points elsewhere is refused in little memory; damage of any kind is a fault, no crash."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from data_prep.config import GridConfig
from data_prep.geo import Grid
from data_prep.sources import ReadFault, SourceFault, open_catalog, read_site
from data_prep.sources.guard import Hostile, hdf5_dataset, zstd_content_size
from data_prep.sources.items import AssetFields
from data_prep.sources.mesh import MeshCube
from data_prep.sources.open import open_cube
from data_prep.sources.raster import open_raster
from data_prep.sources.records import Asset
from tests.scenes import GRID, S2_BANDS, item, s2_pixels, write_cube, write_items, write_tiff

NATIVE = GridConfig()


def refused(call, *words):
    """The fault of a call that is refused without much memory."""
    tracemalloc.start()
    try:
        with pytest.raises(SourceFault) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert all(word in str(caught.value) for word in words), caught.value
    return caught.value


def zarr_asset(path):
    return Asset("i/s2", "s2", str(path), "zarr", S2_BANDS)


def read_all(asset):
    cube = open_cube([asset], S2_BANDS)
    return cube.read(0, 0, (0, 16, 0, 16))


def test_a_vrt_named_tif_reads_nobody_elses_file(tmp_path):
    secret = write_tiff(tmp_path / "secret.tif", s2_pixels()[0], GRID)
    (tmp_path / "x.tif").write_text(
        f"""<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32633</SRS>
        <GeoTransform>500000, 10, 0, 5300000, 0, -10</GeoTransform><VRTRasterBand dataType="UInt16" band="1">
        <SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"""
    )
    fault = refused(lambda: open_raster(str(tmp_path / "x.tif"), "x"), "cannot be read as a raster")
    assert isinstance(fault, ReadFault)


def test_hdf5_external_links_storage_and_virtual_sets_are_refused(tmp_path):
    (tmp_path / "secret.txt").write_bytes(b"password " * 100)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["sen-2-data"] = np.zeros((1, 10, 6, 6), np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("other.h5", "sen-2-data")
        file["group"] = h5py.ExternalLink("other.h5", "/")
        file["soft"] = h5py.SoftLink("/group/sen-2-data")
        file.create_dataset("stored", (100,), "u1", external=[(str(tmp_path / "secret.txt"), 0, 100)])
        layout = h5py.VirtualLayout((1, 10, 6, 6), np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "sen-2-data", (1, 10, 6, 6))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("huge", (10**6, 10**6), "f4", chunks=(100, 100))
        file.create_dataset("chunk", (10**5, 10**5), "u1", chunks=(40_000, 20_000))
        file["plain"] = np.arange(3)
    with h5py.File(tmp_path / "x.h5") as file:
        for name in ("linked", "group/sen-2-data", "soft", "stored", "virtual", "huge", "chunk"):
            with pytest.raises(Hostile):
                hdf5_dataset(file, name)
        assert hdf5_dataset(file, "plain")[:].tolist() == [0, 1, 2]


def test_a_chunk_of_a_thousand_million_pixels_is_not_allocated(tmp_path):
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=3)
    group.create_array("data", shape=(1, 10, 10**9, 10**9), chunks=(1, 10, 10**5, 10**5), dtype="u2")
    group.attrs.update(
        {
            "crs": "EPSG:32633",
            "transform": list(GRID.transform),
            "bands": list(S2_BANDS),
            "datetimes": ["2021-01-01T00:00:00Z"],
        }
    )
    refused(lambda: read_all(zarr_asset(tmp_path / "x.zarr")), "claims blocks")


@pytest.mark.parametrize("codec", ["blosc", "zstd", "gzip"])
def test_chunks_that_unpack_to_more_than_their_array_says(tmp_path, codec):
    compressors = {"blosc": zarr.codecs.BloscCodec(), "zstd": zarr.codecs.ZstdCodec(), "gzip": zarr.codecs.GzipCodec()}[
        codec
    ]
    pixels = s2_pixels(1, 1)
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=3)
    group.create_array("data", data=pixels, chunks=(1, 10, 16, 16), compressors=compressors)
    group.attrs.update(
        {
            "crs": "EPSG:32633",
            "transform": list(GRID.transform),
            "bands": list(S2_BANDS),
            "datetimes": ["2021-01-01T00:00:00Z"],
        }
    )
    assert (read_all(zarr_asset(tmp_path / "x.zarr")) == pixels[0]).all()
    chunk = tmp_path / "x.zarr" / "data" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    if codec == "blosc":
        data[4:8] = struct.pack("<I", 2**31 - 17)
    elif codec == "zstd":
        data = bytearray(b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 300 << 30) + bytes(data[8:]))
    else:
        data = bytearray(gzip_of_zeros(1 << 28))
    chunk.write_bytes(data)
    fault = refused(lambda: read_all(zarr_asset(tmp_path / "x.zarr")), "decodes to")
    assert "its array's chunks have" in str(fault)


def test_zip_bombs_are_counted_before_they_are_unpacked(tmp_path):
    path = tmp_path / "x.zarr.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(".zgroup", json.dumps({"zarr_format": 2}))
        with archive.open("bands/0.0.0", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
    assert path.stat().st_size < 400_000
    refused(lambda: MeshCube(Asset("i/S2L2A", "s2", str(path), "mesh", S2_BANDS), S2_BANDS), "claims to unpack")


def test_pickled_objects_are_never_loaded(tmp_path):
    """Zarr refuses object arrays by itself; this pins it."""
    folder = tmp_path / "x.zarr"
    (folder / "data").mkdir(parents=True)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / "data" / ".zarray").write_text(json.dumps({
        "zarr_format": 2, "shape": [1, 10, 16, 16], "chunks": [1, 10, 16, 16], "dtype": "|O", "compressor": None, "fill_value": None,
        "order": "C", "filters": [{"id": "pickle", "protocol": 5}],
    }))  # fmt: skip
    target = tmp_path / "ran"
    (folder / "data" / "0.0.0.0").write_bytes(f"cos\nsystem\n(S'touch {target}'\ntR.".encode())
    refused(lambda: read_all(zarr_asset(folder)))
    assert not target.exists()


def test_coordinates_that_claim_too_much(tmp_path):
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=2)
    group.create_array("data", data=s2_pixels(1, 1))
    group.create_array("time", shape=(10**11,), chunks=(10**6,), dtype="f8")
    group.create_array("band", data=np.array(S2_BANDS, "S3"))
    refused(lambda: read_all(zarr_asset(tmp_path / "x.zarr")), "claims shape")


def test_zstd_headers():
    import numcodecs

    assert zstd_content_size(numcodecs.Zstd().encode(bytes(1000))) == 1000
    assert zstd_content_size(numcodecs.Zstd().encode(bytes(100_000))) == 100_000
    assert zstd_content_size(b"no frame at all") is None


def samples(folder) -> dict[str, tuple[Path, Asset]]:
    """One small intact file per format."""
    tiff = Path(
        write_tiff(
            folder / "a.tif",
            s2_pixels()[0],
            GRID,
            nodata=0,
            compress="deflate",
            tiled=True,
            blockxsize=16,
            blockysize=16,
        )
    )
    write_cube(folder / "b.zarr", s2_pixels(1, 1), GRID, S2_BANDS, ["2021-01-01T00:00:00Z"], fmt=2)
    packed = folder / "b.zarr.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((folder / "b.zarr").rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder / "b.zarr").as_posix())
    h5 = folder / "c.h5"
    with h5py.File(h5, "w") as file:
        file["sen-2-data"] = np.full((1, 10, 6, 6), 500, np.float32)
        file["sen-2-products"] = np.array([b"S2A_MSIL2A_20200706T085611_N0214_R007_T33NZA_20200706T153419"])
    six = Grid(GRID.crs, GRID.transform, 6, 6)
    return {
        "tiff": (tiff, Asset("i/a", "s2", str(tiff), bands=S2_BANDS)),
        "zarr.zip": (packed, Asset("i/b", "s2", str(packed), "zarr", S2_BANDS)),
        "hdf5": (
            h5,
            Asset(
                "i/c",
                "s2",
                str(h5),
                "treesatai",
                S2_BANDS,
                crs=six.crs,
                transform=six.transform,
                shape=(6, 6),
                member="sen-2",
            ),
        ),
    }


@pytest.mark.parametrize("kind", ["tiff", "zarr.zip", "hdf5"])
def test_damaged_files_are_faults_whatever_the_damage(tmp_path, kind):
    path, asset = samples(tmp_path)[kind]
    intact = path.read_bytes()
    rng = np.random.default_rng(5)
    outcomes = set()
    for round_ in range(36):
        data = bytearray(intact)
        if round_ % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for at in rng.integers(0, len(data), 1 + round_ % 8):
                data[at] = rng.integers(0, 256)
        damaged = path.with_name(f"{round_}_{path.name}")
        damaged.write_bytes(data)
        try:
            cube = open_cube([type(asset)(**{**asset.__dict__, "href": str(damaged)})], S2_BANDS)
            side = cube.layers[0].grid.width
            cube.read(0, 0, (0, side, 0, side))
            outcomes.add("read")
        except SourceFault:
            outcomes.add("fault")
    assert "fault" in outcomes


def gzip_of_zeros(size: int, part: int = 1 << 24) -> bytes:
    """So many zeros as one gzip stream, compressed once per `part`: pieces that end in a full flush can be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = packer.compress(bytes(part)) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = functools.reduce(lambda crc, _: zlib.crc32(bytes(part), crc), range(size // part), 0)
    head = gzip.compress(b"")[:10]
    return head + piece * (size // part) + packer.flush() + struct.pack("<II", crc, size)


def test_a_bomb_is_a_whole_gzip_stream():
    assert gzip.decompress(gzip_of_zeros(1 << 16, 1 << 12)) == bytes(1 << 16)


def test_a_worker_that_meets_bombs_stays_small(tmp_path):
    """The peak of a whole process, libraries' own allocations included."""
    path = tmp_path / "x.zarr.zip"
    pixels = s2_pixels(1, 1)
    write_cube(tmp_path / "b.zarr", pixels, GRID, S2_BANDS, ["2021-01-01T00:00:00Z"], fmt=2)
    bomb = gzip_of_zeros(1 << 29)
    chunk = next(file for file in (tmp_path / "b.zarr" / "data").iterdir() if not file.name.startswith("."))
    meta = json.loads((tmp_path / "b.zarr" / "data" / ".zarray").read_text())
    meta["compressor"] = {"id": "gzip", "level": 9}
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "b.zarr").rglob("*")):
            if file.is_file() and file != chunk and file.name != ".zarray":
                archive.write(file, file.relative_to(tmp_path / "b.zarr").as_posix())
        archive.writestr("data/.zarray", json.dumps(meta))
        archive.writestr(f"data/{chunk.name}", bomb)
    members = tmp_path / "m.zarr.zip"  # all of it in the zip's own compression
    with zipfile.ZipFile(members, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(".zgroup", json.dumps({"zarr_format": 2}))
        for number in range(3):
            archive.writestr(f"bands/{number}.0.0", bytes(100 << 20))
    code = (
        "import resource\n"
        "from data_prep.sources.mesh import MeshCube\nfrom data_prep.sources.records import Asset\n"
        "from tests.unit.test_sources_hostile import read_all, zarr_asset\nfrom data_prep.sources import SourceFault\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try:\n    read_all(zarr_asset({str(path)!r}))\nexcept SourceFault as fault:\n    assert 'decodes to more' in str(fault), fault\n"
        f"try:\n    MeshCube(Asset('i/S2L2A', 's2', {str(members)!r}, 'mesh', ('B02',)), ('B02',))\n"
        "except SourceFault as fault:\n    assert 'claims to unpack' in str(fault), fault\n"
        "else:\n    raise AssertionError('read')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64  # MB, of a bomb of 512


def test_a_site_of_a_hostile_file_is_a_named_fault(tmp_path):
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="w", zarr_format=3)
    group.create_array("data", shape=(1, 10, 10**6, 10**6), chunks=(1, 10, 10**5, 10**5), dtype="u2")
    group.attrs.update(
        {
            "crs": GRID.crs,
            "transform": list(GRID.transform),
            "bands": list(S2_BANDS),
            "datetimes": ["2021-01-01T00:00:00Z"],
        }
    )
    entry = item("site", {"s2": AssetFields("s2", str(tmp_path / "x.zarr"), "application/vnd+zarr", S2_BANDS, GRID)})
    (record,) = open_catalog(write_items(tmp_path / "items", [entry]))
    refused(lambda: read_site(record, NATIVE), "site/s2", "claims blocks")
