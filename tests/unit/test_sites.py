"""Sites on the global lattice: one square per place, everywhere on Earth; splits that depend on the place alone."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UsageError
from data_prep.config import BuildConfig, GridConfig, SitesConfig, SplitConfig
from data_prep.geo import boxes_meet, ground_cell, transformer
from data_prep.prepare.lattice import Square, all_zones, centres, square_at, zone_boxes, zones_of
from data_prep.prepare.layout import ground_cells, lay_sites
from data_prep.split import draw

PLACES = {
    "Graz": (15.44, 47.07), "equator": (-60.0, 0.0), "antimeridian": (180.0, -17.0), "its other side": (-179.999, 65.0), "north pole": (0.0, 90.0),
    "south pole": (12.0, -90.0), "Norway": (5.2, 60.4), "Svalbard": (15.6, 78.2), "edge of UTM": (30.0, 83.9999), "zone edge": (5.99999, 45.0),
}  # fmt: skip


def lay(folder, sites: dict, side_m: float = 640.0, **split) -> dict:
    """The rows that a config gives, by key."""
    config = BuildConfig(
        sites=SitesConfig(url=f"{folder}/s.parquet", **sites),
        grid=GridConfig(side_m=side_m),
        split=SplitConfig(**split),
    )
    lay_sites(config)
    return {row["key"]: row for row in pq.read_table(f"{folder}/s.parquet").to_pylist()}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_has_its_square(place):
    lon, lat = PLACES[place]
    square = square_at(lon, lat, 640)
    (own_lon,), (own_lat,) = centres(square.zone, 640, np.array([square.row]), np.array([square.column]))
    assert zones_of(np.array([own_lon]), np.array([own_lat]))[0] == square.zone
    x, y = transformer("EPSG:4326", square.crs).transform(lon, lat)
    distance = max(abs(x - sum(square.bounds[::2]) / 2), abs(y - sum(square.bounds[1::2]) / 2))
    assert distance <= 640 * 1.5
    assert square_at(own_lon, own_lat, 640) == square
    assert all(value % 10 == 0 for value in square.bounds)


def test_zones_are_those_of_sentinel_2():
    lon = np.array([5.2, 2.9, 15.6, 20.9, 21.1, 0.0, 179.999, -180.0, 180.0])
    lat = np.array([60.4, 60.4, 78.2, 78.2, 78.2, 84.0, -10.0, -10.0, -80.5])
    assert zones_of(lon, lat).tolist() == ["32N", "31N", "33N", "33N", "35N", "UPSN", "60S", "01S", "UPSS"]


@given(st.floats(-180, 180), st.floats(-90, 90))
def test_a_zone_owns_its_points_and_no_other(lon, lat):
    zone = str(zones_of(np.array([lon]), np.array([lat]))[0])
    turned = (lon + 180) % 360 - 180
    assert zone in all_zones()
    assert any(w <= turned <= e and s <= lat <= n for w, s, e, n in zone_boxes(zone))


@given(st.floats(-180, 179.99), st.floats(-89.9, 89.9), st.sampled_from([5.0, 10.0, 37.0]))
def test_cells_of_arrays_are_those_of_points(lon, lat, size):
    from data_prep.prepare.layout import cell_name

    row, column = ground_cells(np.array([lon]), np.array([lat]), size)
    assert cell_name(int(row[0]), int(column[0])) == ground_cell(lon, lat, size)


def test_an_area_gives_the_squares_whose_centres_it_holds(tmp_path):
    rows = lay(tmp_path, {"bbox": (5.9, 45.0, 6.1, 45.1)})
    zones = {row["crs"] for row in rows.values()}
    assert zones == {"EPSG:32631", "EPSG:32632"}
    shapes = {crs: [shapely.box(*row["footprint"]) for row in rows.values() if row["crs"] == crs] for crs in zones}
    for own in shapes.values():  # inside a zone the squares share edges, no ground
        tree = shapely.STRtree(own)
        first, second = tree.query(own, predicate="intersects")
        assert max(shapely.area(shapely.intersection(own[i], own[j])) for i, j in zip(first, second) if i != j) == 0
    ground = sum(shapely.area(shape) for own in shapes.values() for shape in own)
    assert ground == pytest.approx(0.2 * 111_320 * np.cos(np.radians(45.05)) * 0.1 * 111_132, rel=0.06)
    for row in rows.values():
        west, south, east, north = (row["bbox"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
        assert 5.9 <= (west + east) / 2 <= 6.1
        assert 45.0 <= (south + north) / 2 <= 45.1


def test_part_of_an_area_is_part_of_its_sites(tmp_path):
    whole = lay(tmp_path, {"bbox": (15.0, 46.5, 15.2, 46.6)}, buffer_m=1500.0)
    part = lay(tmp_path, {"bbox": (15.1, 46.5, 15.2, 46.55)}, buffer_m=1500.0)
    assert 0 < len(part) < len(whole)
    assert part.items() <= whole.items()  # the same squares, cells and splits


def test_across_the_antimeridian(tmp_path):
    rows = lay(tmp_path, {"bbox": (179.98, -17.5, -179.98, -17.0)})
    assert {row["crs"] for row in rows.values()} == {"EPSG:32760", "EPSG:32701"}
    across = [row for row in rows.values() if row["bbox"]["xmin"] > row["bbox"]["xmax"]]
    assert across
    assert all(shapely.get_type_id(shapely.from_wkb(row["geometry"])) == 6 for row in across)
    drawn = {
        "type": "Polygon",
        "coordinates": [[[179.98, -17.5], [180.02, -17.5], [180.02, -17.0], [179.98, -17.0], [179.98, -17.5]]],
    }
    (tmp_path / "a.geojson").write_text(json.dumps(drawn))
    assert lay(tmp_path, {"area": f"{tmp_path}/a.geojson"}) == rows


def test_around_a_pole(tmp_path):
    rows = lay(tmp_path, {"bbox": (-180.0, -90.0, 180.0, -89.98)}, side_m=500.0)
    assert len(rows) == pytest.approx(np.pi * (0.02 * 111_694) ** 2 / 500**2, rel=0.15)
    assert any(row["bbox"]["ymin"] <= -89.9999 for row in rows.values())


def test_points_choose_their_squares_once(tmp_path):
    rows = lay(tmp_path, {"points": ((15.44, 47.07), (15.4401, 47.07), (-70.0, -33.0))})
    assert set(rows) == {square_at(15.44, 47.07, 640).key, square_at(-70.0, -33.0, 640).key}


def test_limits_draw_by_place(tmp_path):
    box = {"bbox": (15.0, 46.5, 15.2, 46.6)}
    whole, few = lay(tmp_path, box), lay(tmp_path, {**box, "max_sites": 7})
    assert len(few) == 7
    assert few.items() <= whole.items()
    classes = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"class": name},
                "geometry": shapely.geometry.mapping(shapely.box(w, 46, e, 47)),
            }
            for name, w, e in (("alpine", 14.0, 15.02), ("plain", 15.02, 16.0))
        ],
    }
    (tmp_path / "strata.geojson").write_text(json.dumps(classes))
    even = lay(tmp_path, {**box, "strata": f"{tmp_path}/strata.geojson", "per_stratum": 5})
    counts = [row["stratum"] for row in even.values()]
    assert (counts.count("alpine"), counts.count("plain")) == (5, 5)


def test_the_buffer_keeps_train_from_ground_of_other_splits(tmp_path):
    fractions = {"train": 0.5, "val": 0.5}
    rows = lay(tmp_path, {"bbox": (15.0, 46.5, 15.3, 46.7)}, fractions=fractions, buffer_m=2000.0)
    config = SplitConfig(fractions=fractions)
    project = transformer("EPSG:32633", "EPSG:4326").transform
    checked = 0
    for row in rows.values():
        assert row["split"] == draw(row["cell"], config)
        if row["split"] == "train" and row["crs"] == "EPSG:32633":
            x, y = (row["footprint"][0] + row["footprint"][2]) / 2, (row["footprint"][1] + row["footprint"][3]) / 2
            for dx, dy in ((2300, 0), (-2300, 0), (0, 2300), (0, -2300), (2300, 2300)):
                assert draw(ground_cell(*project(x + dx, y + dy)), config) == "train"
                checked += 1
    assert checked > 100
    assert len(lay(tmp_path, {"bbox": (15.0, 46.5, 15.3, 46.7)}, fractions=fractions)) > len(rows)


@pytest.mark.parametrize(
    ("sites", "side", "words"),
    [
        ({}, 640.0, "no ground is named"), ({"bbox": (0, 0, 1, 1)}, 645.0, "multiple of 10"), ({"bbox": (0, 0, 1e-5, 1e-5)}, 640.0, "no square"),
        ({"bbox": (0, 0, 1, 1), "spacing_m": 1000.0}, 640.0, "multiple of grid.side_m"), ({"area": "/nowhere.geojson"}, 640.0, "does not exist"),
    ],
)  # fmt: skip
def test_bad_wishes_are_explained(tmp_path, sites, side, words):
    with pytest.raises(UsageError, match=words):
        lay(tmp_path, sites, side)
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ((179, 0, -179, 1), (-179.5, 0, -179.2, 1), True), ((179, 0, -179, 1), (178, 0, 178.5, 1), False),
        ((179, 0, -179, 1), (179.5, 0, -179.5, 1), True), ((-180, -90, 180, 90), (179, 0, -179, 1), True), ((0, 0, 1, 1), (0, 2, 1, 3), False),
    ],
)  # fmt: skip
def test_boxes_meet_across_the_antimeridian(one, other, meet):
    assert boxes_meet(one, other) == boxes_meet(other, one) == meet


def test_a_square_says_where_it_is():
    square = Square("33N", 640, 8125, 781)
    assert (square.key, square.crs, square.bounds) == (
        "33N640_8125_781",
        "EPSG:32633",
        (499_840.0, 5_200_000.0, 500_480.0, 5_200_640.0),
    )
