"""One global lattice of square sites: every place on Earth belongs to exactly one square, whatever area is asked for.

Squares of `side_m` stand at multiples of their side in the UTM zone of their centre, by the rules of Sentinel-2's own tiling
(MGRS, with its exceptions around Norway and Svalbard), and in polar stereographic north of 84° N and south of 80° S. A side that is
a multiple of 10 m thus keeps Sentinel-2's and Sentinel-1's pixels. A square belongs to the lattice if its centre lies in the zone
that it is drawn in, so overlapping zones, and overlapping product tiles, never repeat ground but for slivers at a zone's edge.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from data_prep.geo import Bounds, bbox_wgs84, transformer

NORTH_POLAR, SOUTH_POLAR = "EPSG:5041", "EPSG:5042"  # UPS with axes east, north
LIMITS = (-80.0, 84.0)  # of UTM
# (south, north, [(west, east, zone), …]) where zones are wider or absent: 32V, and 31X to 37X without the even ones
_EXCEPTIONS = (
    (56.0, 64.0, ((0.0, 3.0, 31), (3.0, 12.0, 32))),
    (72.0, 84.0, ((0.0, 9.0, 31), (9.0, 21.0, 33), (21.0, 33.0, 35), (33.0, 42.0, 37))),
)


@dataclass(frozen=True, order=True)
class Square:
    """A square of the lattice. zone: `33N`, `20S`, `UPSN`, `UPSS`; row, column: multiples of the side, from the CRS's origin."""

    zone: str
    side_m: int
    row: int
    column: int

    @property
    def key(self) -> str:
        """A shard key: says all there is to say about the place."""
        return f"{self.zone}{self.side_m}_{self.row}_{self.column}"

    @property
    def crs(self) -> str:
        return zone_crs(self.zone)

    @property
    def bounds(self) -> Bounds:
        x, y, side = self.column * self.side_m, self.row * self.side_m, self.side_m
        return float(x), float(y), float(x + side), float(y + side)

    @property
    def bbox(self) -> Bounds:
        """West, south, east, north in degrees; west > east across the antimeridian; all longitudes around a pole."""
        return bbox_wgs84(self.crs, self.bounds)


def zone_crs(zone: str) -> str:
    """EPSG code of a zone."""
    if zone.startswith("UPS"):
        return NORTH_POLAR if zone == "UPSN" else SOUTH_POLAR
    return f"EPSG:{(32600 if zone.endswith('N') else 32700) + int(zone[:-1])}"


def zone_of_crs(crs: str) -> str | None:
    """The zone whose CRS this is (its half by the code: `EPSG:327nn` is south); None for every other CRS."""
    if match := re.fullmatch(r"EPSG:32([67])(0[1-9]|[1-5]\d|60)", crs):
        return f"{match[2]}{'N' if match[1] == '6' else 'S'}"
    return {NORTH_POLAR: "UPSN", SOUTH_POLAR: "UPSS"}.get(crs)


def squares_within(bounds: Bounds, crs: str, side_m: int) -> list[Square]:
    """Squares of a zone's lattice that lie whole inside `bounds` (in that zone's CRS) and are the zone's own, from the top left, rows
    downward. Raises KeyError for a CRS of no zone.

    Landsat counts the southern hemisphere in the northern code, below zero: bounds whose middle lies there keep their code, others end
    at the equator.
    """
    zone = zone_of_crs(crs)
    if zone is None:
        raise KeyError(crs)
    xmin, ymin, xmax, ymax = bounds
    columns = np.arange(math.ceil(xmin / side_m - 1e-6), math.floor(xmax / side_m + 1e-6))
    rows = np.arange(math.floor(ymax / side_m + 1e-6) - 1, math.ceil(ymin / side_m - 1e-6) - 1, -1)
    if not (columns.size and rows.size):
        return []
    row_N, column_N = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    names = zones_of(*centres(zone, side_m, row_N, column_N))
    (middle,) = zones_of(*transformer(crs, "EPSG:4326").transform([(xmin + xmax) / 2], [(ymin + ymax) / 2]))
    across = middle != zone and str(middle)[:-1] == zone[:-1]
    own = np.char.rstrip(names, "NS") == zone.rstrip("NS") if across else names == zone
    return [Square(zone, side_m, int(row), int(column)) for row, column in zip(row_N[own], column_N[own])]


def zones_of(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Zone names of points in degrees, as an array of text."""
    lon = (np.asarray(lon, float) + 180) % 360 - 180
    lat = np.asarray(lat, float)
    number = np.clip(np.floor((lon + 180) / 6).astype(int) + 1, 1, 60)
    for south, north, bands in _EXCEPTIONS:
        for west, east, zone in bands:
            number[(lat >= south) & (lat < north) & (lon >= west) & (lon < east)] = zone
    names = np.char.add(np.char.zfill(number.astype(str), 2), np.where(lat >= 0, "N", "S"))
    return np.where(lat >= LIMITS[1], "UPSN", np.where(lat < LIMITS[0], "UPSS", names))


def square_at(lon: float, lat: float, side_m: int) -> Square:
    """The lattice's square at a point; at the very edge of a zone, the nearest one whose centre its zone owns."""
    for _ in range(4):
        zone = str(zones_of(np.array([lon]), np.array([lat]))[0])
        x, y = transformer("EPSG:4326", zone_crs(zone)).transform(lon, lat)
        square = Square(zone, side_m, math.floor(y / side_m), math.floor(x / side_m))
        lon, lat = centres(zone, side_m, np.array([square.row]), np.array([square.column]))[:, 0]
        if zones_of(np.array([lon]), np.array([lat]))[0] == zone:
            return square
    raise ValueError(f"no square of {side_m} m at {lon:g}, {lat:g}")  # a side as wide as a zone


def centres(zone: str, side_m: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Longitudes and latitudes [2, N] of squares' centres."""
    x, y = (np.asarray(columns) + 0.5) * side_m, (np.asarray(rows) + 0.5) * side_m
    return np.stack(transformer(zone_crs(zone), "EPSG:4326").transform(x, y))


@functools.lru_cache(maxsize=256)
def zone_boxes(zone: str) -> tuple[Bounds, ...]:
    """Boxes in degrees that hold every point a zone owns (Norway's and Svalbard's extensions included)."""
    if zone.startswith("UPS"):
        return ((-180.0, LIMITS[1], 180.0, 90.0),) if zone == "UPSN" else ((-180.0, -90.0, 180.0, LIMITS[0]),)
    number, south, north = int(zone[:-1]), *((0.0, LIMITS[1]) if zone.endswith("N") else (LIMITS[0], 0.0))
    west = number * 6.0 - 186
    boxes = [(west, south, west + 6, north)]
    if zone.endswith("N"):
        boxes += [(w, s, e, n) for s, n, bands in _EXCEPTIONS for w, e, its in bands if its == number]
    return tuple(boxes)


def all_zones() -> list[str]:
    """Zone names in a fixed order: north from west to east, south likewise, the poles."""
    return [f"{n:02d}{half}" for half in "NS" for n in range(1, 61)] + ["UPSN", "UPSS"]
