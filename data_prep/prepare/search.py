"""Where items come from: a STAC API, searched once per slice; a stac-geoparquet dump or a static catalog, read once in all.

A dump is streamed: pyarrow reads only row groups and columns that the time, the collections and the ground of the sites leave over.
What meets a slice is spilled in runs sorted by slice, `_items/SENSOR/…`; a slice then reads its own rows of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import shapely

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep.config import SensorConfig
from data_prep.prepare.choose import seconds_of
from data_prep.prepare.items import SCHEMA, placed, table_of_dump, table_of_items
from data_prep.sources.stac_io import read_items

RUN_BYTES = 128 << 20
BATCH_ROWS = 4096
PAGE = 250
UNUSED = ("links", "stac_extensions")


def is_api(source: str) -> bool:
    """Whether a source is a STAC API (and not a file that some web server holds)."""
    return source.startswith(("http://", "https://")) and not source.endswith(
        (".parquet", ".geoparquet", ".json", ".geojson")
    )


def search_api(sensor: SensorConfig, ground: shapely.Geometry) -> pa.Table:
    """Items that meet the ground within the sensor's time. Raises RunFailure if the API cannot be reached or refuses."""
    import pystac_client
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO

    try:
        client = pystac_client.Client.open(sensor.source, stac_io=StacApiIO(max_retries=5, timeout=60))
        found = client.search(
            collections=list(sensor.collections) or None,
            intersects=shapely.geometry.mapping(ground),
            datetime=interval(sensor),
            limit=PAGE,
        )
        table = table_of_items(found.items_as_dicts())
    except (APIError, OSError, ValueError, KeyError, TypeError) as error:  # requests' errors are OSErrors
        text = " ".join(str(error).split())[:300]
        raise RunFailure(
            f"{sensor.source}: {type(error).__name__}: {text}; finished slices are kept: run the command again"
        ) from None
    return _once(in_window(table, sensor))


def interval(sensor: SensorConfig) -> str | None:
    """The time as a STAC search takes it."""
    if not sensor.start and not sensor.end:
        return None
    return (
        f"{sensor.start + 'T00:00:00Z' if sensor.start else '..'}/{sensor.end + 'T23:59:59Z' if sensor.end else '..'}"
    )


def in_window(table: pa.Table, sensor: SensorConfig) -> pa.Table:
    """Items of the sensor's time and collections (an API may be lax about either)."""
    keep = pc.is_valid(table["f_time"])
    if sensor.start:
        keep = pc.and_(keep, pc.greater_equal(table["f_time"], seconds_of(sensor.start)))
    if sensor.end:
        keep = pc.and_(keep, pc.less(table["f_time"], seconds_of(sensor.end) + 86_400))
    if sensor.collections:
        keep = pc.and_(keep, pc.is_in(table["f_collection"], pa.array([*sensor.collections, ""])))
    return table.filter(keep)


@dataclass
class Ground:
    """The ground of every slice, as few boxes in degrees."""

    boxes: list[shapely.Geometry] = field(default_factory=list)
    slices: list[int] = field(default_factory=list)

    def add(self, number: int, bbox: np.ndarray) -> None:
        """bbox: [N, 4] of a slice's sites; they are joined per tile of two degrees."""
        for box in tiles(bbox):
            self.boxes.append(box)
            self.slices.append(number)


def tiles(bbox: np.ndarray) -> list[shapely.Geometry]:
    """Boxes over sites' boxes [N, 4], one per tile of two degrees that has any; those across the antimeridian are cut."""
    split = bbox[:, 0] > bbox[:, 2]
    west, east = bbox[split].copy(), bbox[split].copy()
    west[:, 2], east[:, 0] = 180.0, -180.0
    bbox = np.concatenate([bbox[~split], west, east])
    code = np.floor(bbox[:, 0] / 2) * 1000 + np.floor(bbox[:, 1] / 2)
    found = []
    for own in np.unique(code):
        its = bbox[code == own]
        found.append(shapely.box(its[:, 0].min(), its[:, 1].min(), its[:, 2].max(), its[:, 3].max()))
    return found


def spill(url: str, name: str, sensor: SensorConfig, ground: Ground) -> None:
    """Reads a dump or a static catalog once and leaves each slice's items under `url`; done again it finds that and does nothing."""
    folder = storage.join(url, "_items", name)
    if storage.exists(storage.join(folder, "runs.json")):
        return
    runs: list[dict[str, Any]] = []
    tree, slices = shapely.STRtree(ground.boxes), np.array(ground.slices)
    waiting: list[pa.Table] = []
    size = rows = 0
    for table in _tables(sensor, shapely.total_bounds(ground.boxes)):
        table = in_window(table, sensor)
        item, box = tree.query(placed(table["f_geometry"].to_numpy(zero_copy_only=False)), predicate="intersects")
        pairs = np.unique(np.stack([slices[box], item]), axis=1) if len(item) else np.empty((2, 0), int)
        if not pairs.shape[1]:
            continue
        waiting.append(table.take(pa.array(pairs[1])).append_column("f_slice", pa.array(pairs[0], pa.int32())))
        size, rows = size + waiting[-1].nbytes, rows + waiting[-1].num_rows
        if size > RUN_BYTES:
            runs.append(_write_run(folder, len(runs), waiting))
            waiting, size = [], 0
    if waiting:
        runs.append(_write_run(folder, len(runs), waiting))
    storage.write_atomic(storage.join(folder, "runs.json"), json.dumps({"runs": runs, "rows": rows}).encode())


def spilled(url: str, name: str, number: int) -> pa.Table:
    """A slice's items of a sensor that was spilled. Raises RunFailure if a run is gone."""
    folder = storage.join(url, "_items", name)
    tables = []
    try:
        for run in json.loads(storage.read_bytes(storage.join(folder, "runs.json")))["runs"]:
            if run["first"] <= number <= run["last"]:
                tables += _rows_of(storage.join(folder, run["file"]), number)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunFailure(f"{folder} is damaged ({error}); remove it and run the command again") from None
    joined = pa.concat_tables(tables, promote_options="permissive") if tables else SCHEMA.empty_table()
    return _once(joined)


def _rows_of(url: str, number: int) -> list[pa.Table]:
    source = storage.local_path(url) if storage.is_local(url) else pa.BufferReader(storage.read_bytes(url))
    with pq.ParquetFile(source) as file:
        column = file.schema_arrow.names.index("f_slice")
        leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == "f_slice")
        assert column >= 0
        groups = []
        for group in range(file.num_row_groups):
            bounds = file.metadata.row_group(group).column(leaf).statistics
            if bounds is None or bounds.min <= number <= bounds.max:
                groups.append(group)
        if not groups:
            return []
        table = file.read_row_groups(groups, use_threads=False)
    return [table.filter(pc.equal(table["f_slice"], number)).drop_columns(["f_slice"])]


def _write_run(folder: str, number: int, waiting: list[pa.Table]) -> dict[str, Any]:
    table = pa.concat_tables(waiting, promote_options="permissive")
    table = table.take(
        pc.sort_indices(table, [("f_slice", "ascending"), ("f_time", "ascending"), ("f_id", "ascending")])
    )
    name = f"run-{number:05d}.parquet"
    with storage.open_atomic(storage.join(folder, name)) as stream:
        pq.write_table(table, stream, compression="zstd", row_group_size=2048)
    slices = table["f_slice"]
    return {"file": name, "first": slices[0].as_py(), "last": slices[-1].as_py(), "rows": table.num_rows}


def _once(table: pa.Table) -> pa.Table:
    """Items sorted by time and id, each once: an API may repeat one on its next page."""
    table = table.take(
        pc.sort_indices(table, [("f_time", "ascending"), ("f_id", "ascending"), ("f_collection", "ascending")])
    )
    ids, names = table["f_id"].to_pylist(), table["f_collection"].to_pylist()
    new = [i == 0 or (ids[i], names[i]) != (ids[i - 1], names[i - 1]) for i in range(len(ids))]
    return table if all(new) else table.filter(pa.array(new))


def _tables(sensor: SensorConfig, bounds: np.ndarray) -> Iterator[pa.Table]:
    """Items of a dump or a static catalog, some thousand at a time."""
    if sensor.source.endswith((".json", ".geojson")) or not _parquet_files(sensor.source):
        yield from map(table_of_items, _chunks(read_items(sensor.source, whole=True)))
        return
    files = _parquet_files(sensor.source)
    fs, _ = storage.filesystem(sensor.source)
    try:
        data = ds.dataset(files, format="parquet", filesystem=fs)
        columns = [name for name in data.schema.names if name not in UNUSED]
        if "assets" not in columns or "id" not in columns:
            raise UsageError(f"{sensor.source} is no stac-geoparquet dump (no columns id and assets)")
        scan = data.scanner(
            columns=columns, filter=_pushdown(data.schema, sensor, bounds), batch_size=BATCH_ROWS, use_threads=False
        )
        for batch in scan.to_batches():
            if batch.num_rows:
                yield table_of_dump(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{sensor.source} cannot be read: {str(error).splitlines()[0]}") from None


def _pushdown(schema: pa.Schema, sensor: SensorConfig, bounds: np.ndarray) -> Any:
    """What Parquet's statistics can rule out: time, ground, collection, cloud."""
    wanted: Any = None

    def need(expression: Any) -> None:
        nonlocal wanted
        wanted = expression if wanted is None else wanted & expression

    if "datetime" in schema.names and pa.types.is_timestamp(kind := schema.field("datetime").type):
        unknown = ds.field("datetime").is_null()
        if sensor.start:
            need(
                unknown
                | (ds.field("datetime") >= pa.scalar(seconds_of(sensor.start), pa.timestamp("s", kind.tz)).cast(kind))
            )
        if sensor.end:
            need(
                unknown
                | (
                    ds.field("datetime")
                    < pa.scalar(seconds_of(sensor.end) + 86_400, pa.timestamp("s", kind.tz)).cast(kind)
                )
            )
    if "bbox" in schema.names and pa.types.is_struct(schema.field("bbox").type):
        west, south, east, north = (float(v) for v in bounds)
        box = {side: ds.field("bbox", side) for side in ("xmin", "ymin", "xmax", "ymax")}
        across = box["xmin"] > box["xmax"]
        need(
            (box["ymax"] >= south) & (box["ymin"] <= north) & (across | ((box["xmax"] >= west) & (box["xmin"] <= east)))
        )
    if sensor.collections and "collection" in schema.names:
        need(ds.field("collection").isin(list(sensor.collections)) | ds.field("collection").is_null())
    if sensor.max_cloud < 100 and "eo:cloud_cover" in schema.names:
        need(ds.field("eo:cloud_cover").is_null() | (ds.field("eo:cloud_cover") <= sensor.max_cloud))
    return wanted


def _parquet_files(source: str) -> list[str]:
    if source.endswith((".parquet", ".geoparquet")):
        if not storage.exists(source):
            raise UsageError(f"{source} does not exist")
        return [storage.filesystem(source)[1]]
    if not storage.exists(source):
        raise UsageError(f"{source} does not exist")
    fs, path = storage.filesystem(source)
    return sorted(name for name in fs.find(path) if name.endswith((".parquet", ".geoparquet")))


def _chunks(items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) >= BATCH_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
