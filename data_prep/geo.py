"""Ground geometry: pixel grids, footprints, cells. Affine transforms count from pixel *corners*; axis order is x, y always."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyproj

Bounds = tuple[float, float, float, float]
Transform = tuple[float, float, float, float, float, float]
Window = tuple[int, int, int, int]  # row0, row1, col0, col1, half open

METRES_PER_DEGREE = 111_320.0
# Two grids count as the same when they differ by less than this share of a pixel over the whole extent: GeoTIFF stores
# doubles, STAC JSON often six decimals.
ALIGNMENT_TOLERANCE_PX = 1e-3
SCALE_TOLERANCE = 0.02  # of a projection's scale: UTM stays within 0.1 %, national and polar grids within 2 %
# CRS of patches without georeference: metres around 0° N 0° E, open sea. Its name goes wherever a CRS goes, so that nobody takes
# their coordinates for a place; `has_place` asks for it.
NO_PLACE = "no place: made-up coordinates"
_NO_PLACE_WKT = f'''PROJCRS["{NO_PLACE}",BASEGEOGCRS["WGS 84",DATUM["World Geodetic System 1984",ELLIPSOID["WGS 84",6378137,
298.257223563]]],CONVERSION["no place",METHOD["Transverse Mercator",ID["EPSG",9807]],PARAMETER["Latitude of natural origin",0,
ANGLEUNIT["degree",0.0174532925199433]],PARAMETER["Longitude of natural origin",0,ANGLEUNIT["degree",0.0174532925199433]],
PARAMETER["Scale factor at natural origin",1,SCALEUNIT["unity",1]],PARAMETER["False easting",0,LENGTHUNIT["metre",1]],
PARAMETER["False northing",0,LENGTHUNIT["metre",1]]],CS[Cartesian,2],AXIS["easting",east],AXIS["northing",north],
LENGTHUNIT["metre",1]]'''


@dataclass(frozen=True)
class Grid:
    """A pixel grid: CRS (`EPSG:n` or WKT), affine (a, b, c, d, e, f) from (column, row) corners, size in pixels."""

    crs: str
    transform: Transform
    width: int
    height: int

    @property
    def bounds(self) -> Bounds:
        """xmin, ymin, xmax, ymax of the outer pixel edges, also for rotated grids."""
        return self.window_bounds((0, self.height, 0, self.width))

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def is_north_up(self) -> bool:
        a, b, _, d, e, _ = self.transform
        return b == 0 and d == 0 and a > 0 and e < 0

    def window_bounds(self, window: Window) -> Bounds:
        row0, row1, col0, col1 = window
        a, b, c, d, e, f = self.transform
        xs = [a * col + b * row + c for row in (row0, row1) for col in (col0, col1)]
        ys = [d * col + e * row + f for row in (row0, row1) for col in (col0, col1)]
        return min(xs), min(ys), max(xs), max(ys)

    def sub(self, window: Window) -> Grid:
        """The grid of a window (which may reach outside)."""
        row0, row1, col0, col1 = window
        a, b, c, d, e, f = self.transform
        moved = (a, b, a * col0 + b * row0 + c, d, e, d * col0 + e * row0 + f)
        return Grid(self.crs, moved, col1 - col0, row1 - row0)

    def gsd_m(self) -> float:
        """Metres per pixel on the ground (geometric mean of the two directions), whatever the unit of the CRS."""
        a, b, _, d, e, _ = self.transform
        size = math.sqrt(abs(a * e - b * d))
        if is_geographic(self.crs):
            latitude = (self.bounds[1] + self.bounds[3]) / 2
            return size * METRES_PER_DEGREE * math.sqrt(max(math.cos(math.radians(latitude)), 1e-6))
        return size * metres_per_unit(self.crs, self.bounds)


def grid_over(crs: str, bounds: Bounds, gsd: float, gsd_y: float | None = None) -> Grid:
    """The north-up grid that covers `bounds` exactly with pixels of about `gsd` (exactly, when the side is a multiple)."""
    xmin, ymin, xmax, ymax = bounds
    width = max(round((xmax - xmin) / gsd), 1)
    height = max(round((ymax - ymin) / (gsd_y or gsd)), 1)
    return Grid(crs, ((xmax - xmin) / width, 0.0, xmin, 0.0, -(ymax - ymin) / height, ymax), width, height)


def centred_grid(crs: str, lon: float, lat: float, shape: tuple[int, int], gsd_m: float) -> Grid:
    """The north-up grid of `shape` (height, width) around a place (degrees), its edges on multiples of `gsd_m` of the CRS (metres): up to
    half a pixel off the middle. Raises pyproj.exceptions.CRSError; OverflowError for a place that the CRS does not reach."""
    x, y = transformer("EPSG:4326", crs).transform(lon, lat)
    height, width = shape
    left, top = (round(edge / gsd_m) * gsd_m for edge in (x - width * gsd_m / 2, y + height * gsd_m / 2))
    return Grid(crs, (gsd_m, 0.0, left, 0.0, -gsd_m, top), width, height)


@functools.lru_cache(maxsize=256)
def crs_of(text: str) -> pyproj.CRS:
    """Parses a CRS. Raises pyproj.exceptions.CRSError."""
    return pyproj.CRS.from_user_input(text)


@functools.lru_cache(maxsize=256)
def crs_name(text: str) -> str:
    """`EPSG:n` where the CRS is exactly that one, else WKT2: some real files have a CRS without an EPSG code."""
    crs = crs_of(text)
    authority = crs.to_authority(min_confidence=100)
    return f"EPSG:{authority[1]}" if authority and authority[0] == "EPSG" else crs.to_wkt()


@functools.cache
def no_place_crs() -> str:
    """WKT2 of the CRS of patches that have no place; see `NO_PLACE`."""
    return crs_name(_NO_PLACE_WKT)


@functools.lru_cache(maxsize=256)
def has_place(crs: str) -> bool:
    """Whether coordinates in this CRS say where on Earth something is; an empty text (not said yet) counts as yes."""
    return not crs or crs_of(crs).name != NO_PLACE


@functools.lru_cache(maxsize=1024)
def same_crs(one: str, other: str) -> bool:
    return one == other or crs_of(one).equals(crs_of(other), ignore_axis_order=True)


def is_geographic(crs: str) -> bool:
    return bool(crs_of(crs).is_geographic)


def metres_per_unit(crs: str, bounds: Bounds) -> float:
    """Metres on the ground per unit of a projected CRS in the middle of `bounds`: its unit (feet), and its scale where that is no
    map's small distortion (Web Mercator stretches by 1 / cos latitude). Up to 2 % off the unit is the unit: UTM is 1.0."""
    return _metres_per_unit(crs, round((bounds[0] + bounds[2]) / 2, -3), round((bounds[1] + bounds[3]) / 2, -3))


@functools.lru_cache(maxsize=4096)
def _metres_per_unit(crs: str, x: float, y: float) -> float:
    parsed = crs_of(crs)
    unit = float(parsed.axis_info[0].unit_conversion_factor) if parsed.axis_info else 1.0
    step = 100.0 / unit
    lon, lat = transformer(crs, "EPSG:4326").transform([x - step, x + step, x, x], [y, y, y - step, y + step])
    if not np.isfinite([*lon, *lat]).all():
        return unit
    geod = pyproj.Geod(ellps="WGS84")
    across, along = geod.inv(lon[0], lat[0], lon[1], lat[1])[2], geod.inv(lon[2], lat[2], lon[3], lat[3])[2]
    scale = math.sqrt(across * along) / 200.0
    return unit if abs(scale - 1) <= SCALE_TOLERANCE or not scale > 0 else unit * scale


def is_metric(crs: str, bounds: Bounds) -> bool:
    """Whether one unit of the CRS is a metre on the ground there, so that a site's side can be measured in it."""
    return not is_geographic(crs) and metres_per_unit(crs, bounds) == 1.0


@functools.lru_cache(maxsize=256)
def transformer(source: str, target: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(crs_of(source), crs_of(target), always_xy=True)


def bbox_wgs84(crs: str, bounds: Bounds) -> Bounds:
    """West, south, east, north of the densified outline in degrees."""
    west, south, east, north = transformer(crs, "EPSG:4326").transform_bounds(*bounds, densify_pts=21)
    return float(west), float(south), float(east), float(north)


def centre_wgs84(crs: str, bounds: Bounds) -> tuple[float, float]:
    """Longitude, latitude of the centre."""
    lon, lat = transformer(crs, "EPSG:4326").transform((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
    return float(lon), float(lat)


def utm_code(lon: float, lat: float) -> str:
    """EPSG code of the WGS84 UTM zone of a point (polar regions: the nearest zone, distorted but metric)."""
    zone = min(int((lon + 180) // 6) + 1, 60)
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def inner_bounds(crs: str, bounds: Bounds, target: str) -> Bounds:
    """The largest upright rectangle, edge by edge, that lies inside `bounds` when both are seen in `target`."""
    if same_crs(crs, target):
        return bounds
    xmin, ymin, xmax, ymax = bounds
    steps = np.linspace(0, 1, 21)
    project = transformer(crs, target).transform
    left, _ = project(np.full(21, xmin), ymin + steps * (ymax - ymin))
    right, _ = project(np.full(21, xmax), ymin + steps * (ymax - ymin))
    _, bottom = project(xmin + steps * (xmax - xmin), np.full(21, ymin))
    _, top = project(xmin + steps * (xmax - xmin), np.full(21, ymax))
    return float(np.max(left)), float(np.max(bottom)), float(np.min(right)), float(np.min(top))


def intersection(boxes: Iterable[Bounds]) -> Bounds | None:
    """What all boxes share, or None."""
    array = np.array(list(boxes), dtype=float)
    xmin, ymin = array[:, :2].max(axis=0)
    xmax, ymax = array[:, 2:].min(axis=0)
    return (float(xmin), float(ymin), float(xmax), float(ymax)) if xmin < xmax and ymin < ymax else None


def boxes_meet(one: Bounds, other: Bounds) -> bool:
    """Whether two boxes in degrees share ground; either may cross the antimeridian (west > east)."""
    if one[3] < other[1] or other[3] < one[1]:
        return False
    (west, east), (w, e) = ((box[0], box[2] + (360 if box[2] < box[0] else 0)) for box in (one, other))
    return any(west + turn <= e and w <= east + turn for turn in (-360, 0, 360))


def snap_inward(bounds: Bounds, grid: Grid, tolerance_px: float = 0.02) -> Bounds | None:
    """`bounds` shrunk to whole pixels of a north-up grid; overshoot below `tolerance_px` counts as whole. None if empty."""
    a, _, c, _, e, f = grid.transform
    col0 = math.ceil((bounds[0] - c) / a - tolerance_px)
    col1 = math.floor((bounds[2] - c) / a + tolerance_px)
    row0 = math.ceil((bounds[3] - f) / e - tolerance_px)
    row1 = math.floor((bounds[1] - f) / e + tolerance_px)
    if col1 <= col0 or row1 <= row0:
        return None
    return grid.window_bounds((row0, row1, col0, col1))


def aligned_offset(source: Grid, target: Grid) -> tuple[int, int] | None:
    """(row, column) of the target's first pixel in the source when both share one grid, so that copying is exact; else None."""
    if not same_crs(source.crs, target.crs):
        return None
    a, b, c, d, e, f = source.transform
    ta, tb, tc, td, te, tf = target.transform
    span = max(target.width, target.height)
    pixel = math.sqrt(abs(a * e - b * d))
    drift = max(abs(a - ta), abs(b - tb), abs(d - td), abs(e - te)) * span / pixel
    if drift > ALIGNMENT_TOLERANCE_PX:
        return None
    determinant = a * e - b * d
    col = (e * (tc - c) - b * (tf - f)) / determinant
    row = (a * (tf - f) - d * (tc - c)) / determinant
    if abs(col - round(col)) > ALIGNMENT_TOLERANCE_PX or abs(row - round(row)) > ALIGNMENT_TOLERANCE_PX:
        return None
    return round(row), round(col)


def covering_window(source: Grid, target: Grid, margin_px: int) -> Window | None:
    """The source window that the target needs, with a margin for the kernel, clipped to the source; None if apart."""
    # a densified outline of the target, seen in source pixels
    steps = np.linspace(0, 1, 21)
    height, width = target.shape
    cols = np.concatenate([steps * width, steps * width, np.zeros(21), np.full(21, width)])
    rows = np.concatenate([np.zeros(21), np.full(21, height), steps * height, steps * height])
    ta, tb, tc, td, te, tf = target.transform
    xs, ys = ta * cols + tb * rows + tc, td * cols + te * rows + tf
    if not same_crs(source.crs, target.crs):
        xs, ys = transformer(target.crs, source.crs).transform(xs, ys)
    a, b, c, d, e, f = source.transform
    determinant = a * e - b * d
    src_cols = (e * (xs - c) - b * (ys - f)) / determinant
    src_rows = (a * (ys - f) - d * (xs - c)) / determinant
    if not (np.isfinite(src_cols).all() and np.isfinite(src_rows).all()):
        return None
    if src_cols.max() <= 0 or src_rows.max() <= 0 or src_cols.min() >= source.width or src_rows.min() >= source.height:
        return None
    row0 = max(math.floor(src_rows.min()) - margin_px, 0)
    row1 = min(math.ceil(src_rows.max()) + margin_px, source.height)
    col0 = max(math.floor(src_cols.min()) - margin_px, 0)
    col1 = min(math.ceil(src_cols.max()) + margin_px, source.width)
    return (row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None


def ground_cell(lon: float, lat: float, size_km: float = 10.0) -> str:
    """Name of the ground cell of a point in a Major-TOM style grid: rows of `size_km`, columns as wide at the row's latitude.

    Rows count from the equator (U up, D down), columns from Greenwich (R right, L left), as in `433D_629L`.
    """
    rows = math.ceil(math.pi * 6378.137 / size_km)
    row = math.floor((lat + 90) / 180 * rows) - rows // 2
    row_latitude = (row + rows // 2) / rows * 180 - 90
    columns = max(math.ceil(2 * math.pi * 6378.137 * math.cos(math.radians(row_latitude)) / size_km), 1)
    column = math.floor((lon + 180) / 360 * columns) - columns // 2
    vertical = f"{row}U" if row >= 0 else f"{-row}D"
    horizontal = f"{column}R" if column >= 0 else f"{-column}L"
    return f"{vertical}_{horizontal}"
