"""Scenes cut into squares: one lattice for all of them, no ground twice, and few reads and openings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_prep.config import GridConfig
from data_prep.geo import centre_wgs84
from data_prep.harmonise import Claim
from data_prep.prepare.lattice import square_at, squares_within, zones_of
from data_prep.schema import MODALITIES
from data_prep.sources import Asset, SiteRecord, evidence, open_catalog, raster, read_site, split_site
from data_prep.sources.evidence import EvidenceCache
from data_prep.sources.raster import RasterCube
from data_prep.sources.sites import Cutter
from tests import providers
from tests.scenes import s2_item, write_items, write_tiff

TILED = GridConfig(side_m=5120, tile=True)


def scene(key, footprint, crs="EPSG:32631", moment="2023-07-01T10:36:31Z", **more):
    asset = Asset(f"{key}/data", "s2", f"{key}.tif", bands=MODALITIES["s2"].bands, datetime=moment)
    return SiteRecord(key, "", crs, footprint, (0, 0, 1, 1), (asset,), (moment,), (key,), **more)


def tile(column, row, side=109_800.0):
    """Footprint of an MGRS tile: 109.8 km wide, 100 km from the next."""
    return (
        400_000.0 + 100_000 * column,
        5_690_220.0 + 100_000 * row,
        400_000.0 + 100_000 * column + side,
        5_690_220.0 + 100_000 * row + side,
    )


def test_overlapping_tiles_share_the_squares_of_one_lattice():
    tiles = [scene(f"t{i}{j}", tile(i, j)) for i, j in itertools.product((0, 1), (0, 1))]
    cutter = Cutter(TILED)
    for one in tiles:
        cutter.add(one)
    sites = cutter.sites([])
    corners = {site.footprint[:2] for site in sites}
    assert len(corners) == len(sites)
    assert all(x % 5120 == 0 and y % 5120 == 0 for x, y in corners)
    assert sum(len(split_site(one, TILED)) for one in tiles) > len(sites)  # what used to stand twice
    assert max(len(site.assets) for site in sites) == 4
    # the same squares whatever else is in the catalog, each named by its place
    alone = {part.key: part.footprint for part in split_site(tiles[0], TILED)}
    assert alone.items() <= {site.key: site.footprint for site in sites}.items()
    site = sites[0]
    assert square_at(*centre_wgs84(site.crs, site.footprint), 5120).key == site.key


def test_dates_of_one_tile_are_one_site_without_anybody_grouping_them():
    cutter = Cutter(TILED)
    for day in (3, 1, 2):
        cutter.add(scene(f"d{day}", tile(0, 0), moment=f"2023-07-0{day}T10:36:31Z", scalars={"zone": 4}))
    sites = cutter.sites([])
    assert [site.datetimes for site in sites] == [tuple(f"2023-07-0{day}T10:36:31Z" for day in (1, 2, 3))] * len(sites)
    cutter.add(scene("d4", tile(0, 0), scalars={"zone": 5}))
    faults = []
    assert cutter.sites(faults) == []
    assert "label zone is 4 in one scene and 5 in another" in faults[0].why


def test_a_square_belongs_to_one_zone_only():
    """At a zone's edge the same ground is delivered in both zones' projections."""
    west = squares_within((700_000.0, 5_600_000.0, 809_800.0, 5_709_800.0), "EPSG:32631", 640)
    east = squares_within((200_000.0, 5_600_000.0, 309_800.0, 5_709_800.0), "EPSG:32632", 640)
    for squares, zone in ((west, "31N"), (east, "32N")):
        lon, lat = np.array(
            [centre_wgs84(square.crs, square.bounds) for square in squares[:: max(len(squares) // 50, 1)]]
        ).T
        assert set(zones_of(lon, lat)) == {zone}
    assert len(west) < (109_800 // 640) ** 2  # what lies beyond 6 degrees east is the other zone's


def test_scenes_end_at_the_equator_unless_they_count_the_south_in_the_northern_code():
    north = squares_within((500_000.0, -9_760.0, 609_800.0, 100_040.0), "EPSG:32631", 640)
    south = squares_within((500_000.0, 9_890_200.0, 609_800.0, 10_000_000.0), "EPSG:32731", 640)
    assert min(square.row for square in north) == 0
    assert {square.zone for square in south} == {"31S"}
    landsat = squares_within((500_000.0, -4_821_585.0, 520_000.0, -4_801_585.0), "EPSG:32631", 640)
    assert len(landsat) in range(29 * 29, 31 * 31 + 1)


def test_a_scene_that_holds_no_whole_square_of_the_lattice_is_not_lost():
    parts = split_site(
        scene("s", (405_120.0, 5_690_220.0, 418_120.0, 5_703_220.0)), GridConfig(side_m=10_240, tile=True)
    )
    assert [part.key for part in parts] == ["s"]


def test_small_footprints_and_pixels_off_the_lattice_stay_as_they_are():
    assert [part.key for part in split_site(scene("s", (3.0, 4.0, 11_003.0, 5_124.0), "EPSG:32631"), TILED)] == [
        "s_0_0",
        "s_0_1",
    ]
    odd = scene("odd", (600_003.0, 5_690_220.0, 709_803.0, 5_800_020.0))
    assert split_site(odd, TILED)[0].key == "odd_0_0"
    assert split_site(scene("laea", tile(0, 0), "EPSG:3035"), TILED)[0].key == "laea_0_0"


def test_a_square_of_two_tiles_holds_the_pixels_of_one(tmp_path):
    """Two tiles of one datatake, each with part of the ground: one site, one date, the pixels of a tile that has it all."""
    rng = np.random.default_rng(0)
    whole = rng.integers(30, 4000, (10, 64, 1536)).astype(np.uint16)
    corner = (599_680.0, 5_800_320.0)
    entries = []
    for number, (first, last) in enumerate(((0, 1300), (200, 1536))):
        grid = providers.Grid(
            "EPSG:32631", (10.0, 0.0, corner[0] + 10 * first, 0.0, -10.0, corner[1]), last - first, 64
        )
        entry = s2_item(
            tmp_path, f"t{number}", whole[:, :, first:last], grid, datetime=f"2023-07-01T10:36:{31 + number}Z"
        )
        entry["properties"].pop("geoloom:site")
        entries.append(entry)
    grid = GridConfig(side_m=640, tile=True)
    cutter = Cutter(grid)
    for record in open_catalog(write_items(tmp_path / "items", entries)):
        cutter.add(record)
    both = [site for site in cutter.sites([]) if len(site.assets) == 2]
    assert len(both) == 16  # whole squares of the 1,100 pixels that both show
    for site in both[::5]:
        series = read_site(site, grid).series["s2"]
        column = round((site.footprint[0] - corner[0]) / 10)
        assert series.datetimes == ["2023-07-01T10:36:31Z"]
        assert (series.pixels_TCHW[0] == whole[:, :, column : column + 64]).all()


@pytest.fixture
def pixels_read(monkeypatch):
    """Pixels that the raster reader asks of its files."""
    read, asked = raster._read, []

    def counted(asset, indices, **options):
        out = read(asset, indices, **options)
        asked.append(out.size)
        return out

    monkeypatch.setattr(raster, "_read", counted)
    return asked


def test_evidence_of_a_declared_baseline_reads_the_overviews_of_two_bands(tmp_path, monkeypatch, pixels_read):
    monkeypatch.setattr(evidence, "WHOLE_PIXELS", 10_000)
    grid = providers.grid_of(10, side_m=5120)
    values = np.random.default_rng(0).integers(1030, 5000, (1, 512, 512)).astype(np.uint16)
    cubes = []
    for date, band in itertools.product(range(3), ("B02", "B03", "B04", "B12")):
        path = tmp_path / f"{date}_{band}.tif"
        write_tiff(path, values, grid, nodata=0, tiled=True, blockxsize=128, blockysize=128)
        with raster.rasterio.open(path, "r+") as dataset:
            dataset.build_overviews([2, 4, 8])
        cubes.append(
            Asset(f"i{date}/{band}", "s2", str(path), bands=(band,), datetime=f"2023-07-0{date + 1}T10:00:00Z")
        )
    declared, silent = Claim(-1000.0, "baseline 05.09"), Claim(None, "nothing declared")
    for claim, most in ((declared, 3 * 2 * 64 * 64), (silent, 3 * 4 * 16 * 256 * 256)):
        pixels_read.clear()
        cache = EvidenceCache()
        for date in range(3):
            assets = tuple(cubes[4 * date : 4 * date + 4])
            cube = RasterCube(list(assets), ("B02", "B03", "B04", "B12"))
            (floors,) = cache.floors(assets, cube, [0], (0,), claim).values()
            assert floors.judge().verdict == "present"
        assert sum(pixels_read) == most
    # metadata that the overviews contradict is judged by the whole sample
    pixels_read.clear()
    cube = RasterCube(cubes[:4], ("B02", "B03", "B04", "B12"))
    EvidenceCache().floors(tuple(cubes[:4]), cube, [0], (0,), Claim(0.0, "baseline 02.14"))
    assert sum(pixels_read) == 2 * 64 * 64 + 4 * 16 * 256 * 256


def test_files_of_a_long_series_are_opened_once_for_all_its_sites(tmp_path, monkeypatch):
    opened = []
    real = raster._as_pixels
    monkeypatch.setattr(raster, "_as_pixels", lambda path, **options: opened.append(path) or real(path, **options))
    grid = providers.grid_of(10, side_m=160)
    items = []
    for date in range(12):
        assets = {}
        for band in (*MODALITIES["s2"].bands, "SCL"):
            values = np.full((1, 16, 16), 4, np.uint8) if band == "SCL" else np.full((1, 16, 16), 400 + date, np.uint16)
            href = write_tiff(tmp_path / f"{date}_{band}.tif", values, grid, nodata=0)
            assets[band] = {
                "href": href,
                "type": providers.COG,
                "roles": ["data"],
                "proj:shape": [16, 16],
                "proj:transform": list(grid.transform),
            }
        about = {
            "proj:epsg": 32631,
            "geoloom:site": "here",
            "datetime": f"2023-{date + 1:02d}-01T10:00:00Z",
            "constellation": "sentinel-2",
        }
        items.append(providers.item(f"d{date}", assets, about, grid=grid))
    (record,) = open_catalog(write_items(tmp_path / "items", items))
    parts = split_site(record, GridConfig(side_m=80, tile=True))
    for part in parts:
        assert read_site(part, GridConfig()).series["s2"].pixels_TCHW.shape == (12, 10, 8, 8)
    assert len(parts) == 4
    assert len(opened) == len(set(opened)) == 12 * 11
