"""`data_prep sites`: the squares of an area, their splits, as one GeoParquet file whose row groups are the slices of the plan.

A place's split depends on the place alone: its ground cell is drawn by hash, and a site nearer than `split.buffer_m` to *ground*
of an evaluation split (whether or not a site stands there) is left out. More sites, fewer sites, another order: nothing moves.
Sites come in blocks of 100 km, so that neighbours share images; memory holds a strip of blocks, or the sites that a limit keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cluster import storage
from cluster.errors import UsageError
from data_prep.config import SPLITS, BuildConfig, SplitConfig
from data_prep.geo import bbox_wgs84, transformer
from data_prep.index import geometry_wkb, with_geo_metadata
from data_prep.prepare.area import Strata, wanted_area
from data_prep.prepare.lattice import all_zones, centres, square_at, zone_boxes, zone_crs, zones_of
from data_prep.split import draw

BLOCK_M = 100_000
SHOWN = 200_000  # places on the map
CANDIDATES = 200_000  # squares looked at in one go
RADIUS_KM = 6378.137  # of `geo.ground_cell`
CELL_KM = 10.0
_BOX = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("cell", pa.string()), ("split", pa.string()), ("crs", pa.string()),
        ("footprint", pa.list_(pa.float64())), ("stratum", pa.string()), ("bbox", _BOX), ("geometry", pa.binary()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Squares:
    """Squares of one zone: rows, columns and their centres in degrees, [N] each."""

    zone: str
    rows: np.ndarray
    columns: np.ndarray
    lon: np.ndarray
    lat: np.ndarray
    stratum: np.ndarray

    def take(self, chosen: np.ndarray) -> Squares:
        return Squares(self.zone, *(a[chosen] for a in (self.rows, self.columns, self.lon, self.lat, self.stratum)))


@dataclass
class Layout:
    """What was laid: sites per split (and left out by the buffer), ground cells, strata; some centres for the map."""

    sites: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: int = 0
    slices: int = 0
    cells: set[int] = field(default_factory=set)
    strata: dict[str, int] = field(default_factory=dict)
    shown: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    stride: int = 1

    def show(self, lon: np.ndarray, lat: np.ndarray, splits: np.ndarray) -> None:
        """Keeps every `stride`-th place for the map, and thins what is kept when it grows past SHOWN."""
        self.shown.append((lon[:: self.stride], lat[:: self.stride], splits[:: self.stride]))
        if sum(len(lon) for lon, _, _ in self.shown) > SHOWN:
            joined = [np.concatenate(column)[::2] for column in zip(*self.shown)]
            self.shown, self.stride = [(joined[0], joined[1], joined[2])], 2 * self.stride


def lay_sites(config: BuildConfig) -> Layout:
    """Writes the sites file of a config; the file appears whole.

    Raises UsageError: no side, a side or spacing that does not fit the pixels, no ground, no square in it, a file that is there.
    """
    side = _side(config)
    url = config.sites.url
    if not url.endswith((".parquet", ".geoparquet")):
        raise UsageError(f"sites.url must name a .parquet file, found {url!r}")
    found = Layout()
    wanted = with_geo_metadata(SCHEMA, None)
    waiting: list[pa.Table] = []
    with storage.open_atomic(url) as stream, pq.ParquetWriter(stream, wanted, compression="zstd") as writer:
        for squares in _limited(config, side):
            table = _table(squares, side, config.split, found)
            waiting.append(table.cast(wanted))
            waiting = _write_full(writer, waiting, config.sites.sites_per_slice, found)
        rest = pa.concat_tables(waiting) if waiting else None
        if rest is not None and rest.num_rows:
            writer.write_table(rest)
            found.slices += 1
        if not sum(found.sites.values()):
            raise UsageError(
                f"no site: {found.left_out} squares lie within split.buffer_m of another split"
                if found.left_out
                else "no square of the lattice has its centre in that ground; a smaller grid.side_m or spacing_m, or another area"
            )
    return found


def _write_full(writer: pq.ParquetWriter, waiting: list[pa.Table], size: int, found: Layout) -> list[pa.Table]:
    joined = pa.concat_tables(waiting).combine_chunks()
    start = 0
    while joined.num_rows - start >= size:
        writer.write_table(joined.slice(start, size), row_group_size=size)
        start += size
        found.slices += 1
    return [joined.slice(start)] if joined.num_rows > start else []


def _side(config: BuildConfig) -> int:
    side, spacing = config.grid.side_m, config.sites.spacing_m
    if side is None:
        raise UsageError("sites need grid.side_m: the side of a site in metres")
    step = max(config.grid.series_gsd_m or 10.0, 10.0)
    if side % step or side > 20_000:
        raise UsageError(
            f"grid.side_m={side:g} must be a multiple of {step:g} m (so that pixels stay) and at most 20000"
        )
    if spacing is not None and (spacing % side or spacing < side):
        raise UsageError(f"sites.spacing_m={spacing:g} must be a multiple of grid.side_m={side:g}")
    return int(side)


def _limited(config: BuildConfig, side: int) -> Iterator[Squares]:
    """The wanted squares; with a limit only those with the lowest hashes, of all or of each stratum, in the same order."""
    strata = Strata(config.sites.strata, config.sites.strata_property) if config.sites.strata else None
    squares = _classed(_wanted(config, side), strata)
    for limit, by_stratum in ((config.sites.per_stratum, True), (config.sites.max_sites, False)):
        if limit is not None:
            squares = _lowest(squares, limit, by_stratum, config.split.seed)
    yield from squares


def _classed(squares: Iterator[Squares], strata: Strata | None) -> Iterator[Squares]:
    for its in squares:
        yield (
            its
            if strata is None
            else Squares(its.zone, its.rows, its.columns, its.lon, its.lat, strata.of(its.lon, its.lat))
        )


def _lowest(squares: Iterator[Squares], limit: int, by_stratum: bool, seed: int) -> Iterator[Squares]:
    parts: list[tuple[Squares, np.ndarray]] = []
    count = since = 0

    def thinned() -> list[tuple[Squares, np.ndarray]]:
        numbers = np.concatenate([n for _, n in parts])
        classes = np.concatenate([s.stratum for s, _ in parts]) if by_stratum else np.full(len(numbers), "", object)
        keep = np.zeros(len(numbers), bool)
        for name in dict.fromkeys(classes.tolist()):
            members = np.flatnonzero(classes == name)
            keep[members[np.argsort(numbers[members], kind="stable")[:limit]]] = True
        out, start = [], 0
        for its, own in parts:
            chosen = keep[start : start + len(own)]
            start += len(own)
            if chosen.any():
                out.append((its.take(chosen), own[chosen]))
        return out

    for its in squares:
        parts.append((its, _numbers(its, seed)))
        count += len(its.rows)
        since += len(its.rows)
        if since > max(4 * limit, 1_000_000):
            parts, since = thinned(), 0
    yield from (its for its, _ in (thinned() if parts else []))


def _numbers(squares: Squares, seed: int) -> np.ndarray:
    """A hash of every place (splitmix64): the same on every machine, whatever else is chosen."""
    zone = np.uint64(all_zones().index(squares.zone))
    with np.errstate(over="ignore"):
        value = np.full(len(squares.rows), np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + zone)
        for part in (squares.rows, squares.columns):
            value = value ^ (part.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


def _wanted(config: BuildConfig, side: int) -> Iterator[Squares]:
    area, points = wanted_area(config.sites)
    step = int((config.sites.spacing_m or side) // side)
    named = _point_squares(points, side)
    for zone in all_zones():
        own = named.get(zone, set())
        if area is not None:
            for squares in _zone_squares(zone, side, step, area):
                if own:
                    own -= set(zip(squares.rows.tolist(), squares.columns.tolist()))
                yield squares
        if own:
            block = BLOCK_M // side or 1
            order = sorted(own, key=lambda place: (place[0] // block, place[1] // block, place))
            rows, columns = np.array(order).T
            lon, lat = centres(zone, side, rows, columns)
            yield Squares(zone, rows, columns, lon, lat, np.full(len(rows), "", object))


def _point_squares(points: np.ndarray, side: int) -> dict[str, set[tuple[int, int]]]:
    found: dict[str, set[tuple[int, int]]] = {}
    for lon, lat in points:
        square = square_at(float(lon), float(lat), side)
        found.setdefault(square.zone, set()).add((square.row, square.column))
    return found


def _zone_squares(zone: str, side: int, step: int, area: Any) -> Iterator[Squares]:
    """Squares that the zone owns and whose centre lies in the area, in the order of blocks."""
    clip = shapely.intersection(area, shapely.union_all([shapely.box(*box) for box in zone_boxes(zone)]))
    if shapely.is_empty(clip):
        return
    shapely.prepare(area)
    grown = shapely.buffer(clip, 0.1)  # degrees: a block's box is only nearly its outline
    shapely.prepare(grown)
    crs, block = zone_crs(zone), max(BLOCK_M // side, 1)
    (x0, x1), (y0, y1) = _reach(zone, shapely.bounds(clip))
    first, last = math.floor(y0 / side / block), math.ceil(y1 / side / block)
    columns = np.arange(math.floor(x0 / side) + -math.floor(x0 / side) % step, math.ceil(x1 / side) + 1, step)
    height = max(CANDIDATES * step // max(len(columns) * block, 1), 1)  # in blocks: few squares, many rows at once
    for low in range(first, last, height):
        high = min(low + height, last)  # beyond the zone's own reach a projection may come round again
        bounds = (columns[0] * side, low * block * side, columns[-1] * side, high * block * side)
        _, south, _, north = bbox_wgs84(crs, bounds)
        if np.isfinite([south, north]).all() and not shapely.intersects(grown, shapely.box(-180, south, 180, north)):
            continue
        rows = np.arange(low * block + -(low * block) % step, high * block, step)
        row, column = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
        lon, lat = centres(zone, side, row, column)
        inside = np.flatnonzero((zones_of(lon, lat) == zone) & shapely.intersects_xy(area, lon, lat))
        order = inside[np.lexsort((column[inside], row[inside], column[inside] // block, row[inside] // block))]
        if len(order):
            yield Squares(zone, row[order], column[order], lon[order], lat[order], np.full(len(order), "", object))


def _reach(zone: str, bounds: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of x and y in the zone's CRS that its part of an area can lie in."""
    if zone.startswith("UPS"):
        radius = 700_000.0 if zone == "UPSN" else 1_150_000.0
        return (2e6 - radius, 2e6 + radius), (2e6 - radius, 2e6 + radius)
    project = transformer("EPSG:4326", zone_crs(zone)).transform
    west, east = (boxes := zone_boxes(zone))[0][0], boxes[0][2]
    _, ys = project([west, (west + east) / 2] * 2, [bounds[1], bounds[1], bounds[3], bounds[3]])
    return (100_000.0, 900_000.0), (min(ys) - 20_000, max(ys) + 20_000)


def ground_cells(lon: np.ndarray, lat: np.ndarray, size_km: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the ground cells of points; `geo.ground_cell` for arrays."""
    rows = math.ceil(math.pi * RADIUS_KM / size_km)
    row = np.floor((lat + 90) / 180 * rows).astype(np.int64) - rows // 2
    latitude = (row + rows // 2) / rows * 180 - 90
    columns = np.maximum(np.ceil(2 * math.pi * RADIUS_KM * np.cos(np.radians(latitude)) / size_km), 1).astype(np.int64)
    return row, np.floor((lon + 180) / 360 * columns).astype(np.int64) - columns // 2


def cell_name(row: int, column: int) -> str:
    return f"{row}U_" * (row >= 0) + f"{-row}D_" * (row < 0) + (f"{column}R" if column >= 0 else f"{-column}L")


def place_splits(squares: Squares, side: int, config: SplitConfig) -> tuple[np.ndarray, np.ndarray]:
    """(cell names, splits) of squares, "" where the buffer leaves one out; a function of each place alone."""
    size_km = (config.cell_m or CELL_KM * 1000) / 1000
    row, column = ground_cells(squares.lon, squares.lat, size_km)
    own = _drawn(row, column, config)
    names = np.array([cell_name(r, c) for r, c in zip(row.tolist(), column.tolist())], dtype=object)
    rank = np.array([SPLITS.index(split) for split in own])
    x, y = (squares.columns + 0.5) * side, (squares.rows + 0.5) * side
    worst = rank.copy()
    edge = _at_edge(squares, side)
    for reach, chosen in ((config.buffer_m, np.full(len(rank), config.buffer_m > 0)), (2.0 * side, edge)):
        if not chosen.any():
            continue
        half = side / 2 + reach
        steps = np.linspace(-half, half, max(math.ceil(2 * half / (size_km * 500)), 1) + 1)
        offsets = {(float(a), b) for a in steps for b in (-half, half)} | {
            (b, float(a)) for a in steps for b in (-half, half)
        }
        for dx, dy in sorted(offsets):
            lon, lat = transformer(zone_crs(squares.zone), "EPSG:4326").transform(x[chosen] + dx, y[chosen] + dy)
            near = _drawn(*ground_cells(np.asarray(lon), np.asarray(lat), size_km), config)
            worst[chosen] = np.maximum(worst[chosen], [SPLITS.index(split) for split in near])
    return names, np.where(worst > rank, "", own)


def _at_edge(squares: Squares, side: int) -> np.ndarray:
    """Squares that may overlap one of another zone: their surroundings are not all their own zone's."""
    edge = np.zeros(len(squares.rows), bool)
    x, y = (squares.columns + 0.5) * side, (squares.rows + 0.5) * side
    for dx, dy in ((-side, -side), (-side, side), (side, -side), (side, side)):
        lon, lat = transformer(zone_crs(squares.zone), "EPSG:4326").transform(x + dx, y + dy)
        edge |= zones_of(np.asarray(lon), np.asarray(lat)) != squares.zone
    return edge


def _drawn(row: np.ndarray, column: np.ndarray, config: SplitConfig) -> np.ndarray:
    code = row * (1 << 32) + column
    unique, inverse = np.unique(code, return_inverse=True)
    first = np.zeros(len(unique), np.int64)
    first[inverse] = np.arange(len(code))
    return np.array([draw(cell_name(int(row[i]), int(column[i])), config) for i in first], dtype=object)[inverse]


def _table(squares: Squares, side: int, split: SplitConfig, found: Layout) -> pa.Table:
    """Rows of the sites file; counts go to `found`."""
    cells, splits = place_splits(squares, side, split)
    kept = splits != ""
    found.left_out += int((~kept).sum())
    squares, cells, splits = squares.take(kept), cells[kept], splits[kept]
    for name in SPLITS:
        found.sites[name] += int((splits == name).sum())
    for name in squares.stratum:
        found.strata[name] = found.strata.get(name, 0) + 1
    found.cells.update(hash(cell) for cell in cells)  # counted only
    found.show(squares.lon, squares.lat, splits)
    count = len(splits)
    x, y = squares.columns * float(side), squares.rows * float(side)
    footprints = np.column_stack([x, y, x + side, y + side]) if count else np.empty((0, 4))
    boxes, shapes = _outlines(squares.zone, footprints)
    columns = {
        "key": [f"{squares.zone}{side}_{r}_{c}" for r, c in zip(squares.rows.tolist(), squares.columns.tolist())],
        "cell": cells.tolist(), "split": splits.tolist(), "crs": [zone_crs(squares.zone)] * count,
        "footprint": footprints.tolist(), "stratum": [str(name) for name in squares.stratum],
        "bbox": pa.StructArray.from_arrays([pa.array(side_) for side_ in boxes.T], fields=list(_BOX)), "geometry": shapes,
    }  # fmt: skip
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMA}, SCHEMA)


def _outlines(zone: str, footprints: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """(bboxes [N, 4] in degrees, WKB) of footprints; those at the antimeridian and the poles one by one."""
    if not len(footprints):
        return np.empty((0, 4)), []
    xmin, ymin, xmax, ymax = footprints.T
    middle_x, middle_y = (xmin + xmax) / 2, (ymin + ymax) / 2
    xs = np.stack([xmin, xmax, xmax, xmin, middle_x, xmax, middle_x, xmin])
    ys = np.stack([ymin, ymin, ymax, ymax, ymin, middle_y, ymax, middle_y])
    lon, lat = transformer(zone_crs(zone), "EPSG:4326").transform(xs, ys)
    boxes = np.stack([lon.min(0), lat.min(0), lon.max(0), lat.max(0)], axis=1)
    polygons = shapely.polygons(np.round(np.moveaxis(np.stack([lon[:4], lat[:4]], axis=-1), 0, 1), 9))
    shapes = shapely.to_wkb(polygons, byte_order=1).tolist()
    single = boxes[:, 2] - boxes[:, 0] > 180
    for i in np.flatnonzero(single):
        boxes[i] = bbox_wgs84(zone_crs(zone), tuple(footprints[i]))
        polar = boxes[i, 2] - boxes[i, 0] >= 359.9
        shapes[i] = (
            shapely.to_wkb(shapely.box(*boxes[i]), byte_order=1)
            if polar
            else geometry_wkb(zone_crs(zone), tuple(footprints[i]), tuple(boxes[i]))
        )
    return boxes, shapes
