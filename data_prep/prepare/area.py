"""What ground is wanted: a box, polygons or points, in degrees; and which class (stratum) a place belongs to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely

from cluster.errors import UsageError
from cluster.storage import read_bytes
from data_prep.config import SitesConfig

WORLD = shapely.box(-180, -90, 180, 90)


def wanted_area(config: SitesConfig) -> tuple[Any, np.ndarray]:
    """(polygons as one geometry, or None; points [N, 2]) of what the config asks for; longitudes in -180…180.

    Raises UsageError: nothing asked for, an unreadable file, one without polygon or point.
    """
    if config.points:
        return None, np.array(config.points, float)
    if config.bbox is not None:
        return box(config.bbox), np.empty((0, 2))
    if config.area is None:
        raise UsageError(
            "sites: no ground is named; give sites.area=FILE.geojson, sites.bbox=[W,S,E,N] or sites.points=[[LON,LAT],…]"
        )
    geometries = [geometry for geometry, _ in read_features(config.area)]
    points = [point for g in geometries if "Point" in g.geom_type for point in shapely.get_coordinates(g)]
    polygons = [g for g in geometries if "Polygon" in g.geom_type]
    if not points and not polygons:
        raise UsageError(f"{config.area} holds no polygon and no point")
    joined = shapely.union_all([shapely.make_valid(unwound(g)) for g in polygons]) if polygons else None
    return joined, np.array(points, float).reshape(-1, 2)[:, :2]


def box(bbox: Sequence[float]) -> Any:
    """A box in degrees as polygons; west > east crosses the antimeridian."""
    west, south, east, north = bbox
    if west <= east:
        return shapely.box(west, south, east, north)
    return shapely.union_all([shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)])


def unwound(geometry: Any) -> Any:
    """A polygon drawn past 180° (a common way to cross the antimeridian) cut and moved to where it lies."""
    west, _, east, _ = shapely.bounds(geometry)
    if west >= -180 and east <= 180:
        return geometry
    pieces = []
    for turn in (-360.0, 0.0, 360.0):
        moved = shapely.transform(geometry, lambda xy, turn=turn: xy + np.array([turn, 0.0]))
        pieces.append(shapely.intersection(shapely.make_valid(moved), WORLD))
    return shapely.union_all(pieces)


def read_features(url: str) -> list[tuple[Any, dict[str, Any]]]:
    """(geometry in degrees, properties) of a GeoJSON or GeoParquet file. Raises UsageError."""
    import geopandas

    try:
        data = read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UsageError(f"{url} does not exist") from None
    try:
        if url.endswith((".parquet", ".geoparquet")):
            frame = geopandas.read_parquet(io.BytesIO(data))
            frame = frame.to_crs("EPSG:4326") if frame.crs is not None else frame
            geometries, rows = list(frame.geometry), frame.drop(columns=frame.geometry.name).to_dict("records")
        else:
            geometries, rows = _geojson(data)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{url} is neither GeoJSON nor GeoParquet: {' '.join(str(error).split())}") from None
    found = [(g, row) for g, row in zip(geometries, rows) if g is not None and not shapely.is_empty(g)]
    if any(not np.isfinite(shapely.bounds(g)).all() or abs(shapely.bounds(g)[[1, 3]]).max() > 90 for g, _ in found):
        raise UsageError(f"{url} is not in degrees (longitude, latitude): GeoJSON is WGS84 by its standard")
    return found


def _geojson(data: bytes) -> tuple[list[Any], list[dict[str, Any]]]:
    import json

    tree = json.loads(data)
    if tree.get("type") == "FeatureCollection":
        features = tree["features"]
    elif tree.get("type") == "Feature":
        features = [tree]
    else:
        features = [{"geometry": tree, "properties": {}}]
    shapes = [shapely.from_geojson(json.dumps(f["geometry"])) if f.get("geometry") else None for f in features]
    return shapes, [f.get("properties") or {} for f in features]


class Strata:
    """The class of places: polygons with a property, or an integer raster. A place in none has the class ""."""

    def __init__(self, url: str, name: str) -> None:
        """Raises UsageError: unreadable, or polygons without the property."""
        self._url, self._raster = url, url.endswith((".tif", ".tiff"))
        if self._raster:
            return
        features = [(g, row) for g, row in read_features(url) if "Polygon" in g.geom_type]
        if not features or any(name not in row for _, row in features):
            raise UsageError(f"{url}: not every polygon has the property {name!r} (sites.strata_property)")
        self._tree = shapely.STRtree([unwound(g) for g, _ in features])
        self._classes = np.array([str(row[name]) for _, row in features])

    def of(self, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        """Classes of points, as text."""
        if self._raster:
            return self._sampled(lon, lat)
        found = np.full(len(lon), "", dtype=object)
        points, polygons = self._tree.query(shapely.points(lon, lat), predicate="intersects")
        order = np.lexsort((-polygons, points))  # the first polygon of the file wins
        found[points[order]] = self._classes[polygons[order]]
        return found

    def _sampled(self, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        from data_prep.geo import transformer
        from data_prep.sources.raster import open_raster, raster_grid

        with open_raster(self._url, "sites.strata") as dataset:
            grid = raster_grid(dataset, "sites.strata")
            xs, ys = transformer("EPSG:4326", grid.crs).transform(lon, lat)
            values = np.array([v[0] for v in dataset.sample(zip(xs, ys), masked=True)], dtype=object)
        return np.array(["" if np.ma.is_masked(v) or v is np.ma.masked else str(int(v)) for v in values], dtype=object)
