"""`index.parquet`: one row per sample, in shard order. GeoParquet 1.1 and stac-geoparquet: each row is also a STAC item.

Columns for readers: `key, shard, row, offset, length, members` (name = member suffix; offset and length of the member's *data*
in the tar; sha256, crc32c), `split, cell, place` ("none": crs, footprint and geometry are made up, see `geo.NO_PLACE`; else
null), `modalities, cloud, datetime_start/end, product_ids, offset_applied, flagged_dates` (whose metadata the
pixels contradicted), per modality m `<m>_datetimes, <m>_shape, <m>_gsd_m,
<m>_clear, <m>_product_ids, <m>_orbits, <m>_decisions` (JSON), per scalar label `label_<name>`; `rasters` names the label
rasters. The rest is STAC's: `id, geometry, bbox, datetime, assets, links, …`.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely

from data_prep.geo import has_place
from data_prep.sample import dump_json
from data_prep.schema import MODALITIES
from data_prep.tar import Entry

LABEL_PREFIX = "label_"

MEMBERS = pa.list_(
    pa.struct(
        [
            ("name", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("sha256", pa.string()),
            ("crc32c", pa.uint32()),
        ]
    )
)
_BBOX = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
_TEXTS = pa.list_(pa.string())
_ASSET = pa.struct([("href", pa.string()), ("type", pa.string()), ("title", pa.string()), ("roles", _TEXTS)])
_LINK = pa.struct([("href", pa.string()), ("rel", pa.string()), ("type", pa.string()), ("title", pa.string())])
_TIME = pa.timestamp("us", tz="UTC")
_LIST_LEVEL = re.compile(r"\.list\.(element|item)\b")  # what Parquet calls the inside of a list


def schema(labels: Iterable[str] = ()) -> pa.Schema:
    """The Arrow schema of an index whose samples have these scalar labels (metadata apart, see `with_geo_metadata`)."""
    fields: list[tuple[str, pa.DataType]] = [
        ("type", pa.string()), ("stac_version", pa.string()), ("stac_extensions", _TEXTS), ("id", pa.string()),
        ("geometry", pa.binary()), ("bbox", _BBOX), ("links", pa.list_(_LINK)), ("assets", pa.struct([("shard", _ASSET)])),
        ("datetime", _TIME), ("start_datetime", _TIME), ("end_datetime", _TIME),
        ("key", pa.string()), ("shard", pa.string()), ("row", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()),
        ("members", MEMBERS), ("split", pa.string()), ("cell", pa.string()), ("place", pa.string()), ("crs", pa.string()),
        ("footprint", pa.list_(pa.float64())), ("modalities", _TEXTS), ("cloud", pa.float32()),
        ("datetime_start", pa.string()), ("datetime_end", pa.string()), ("product_ids", _TEXTS),
        ("offset_applied", pa.list_(pa.float32())), ("flagged_dates", pa.int32()), ("rasters", _TEXTS),
    ]  # fmt: skip
    for name in MODALITIES:
        fields += [
            (f"{name}_datetimes", _TEXTS), (f"{name}_shape", pa.list_(pa.int32())), (f"{name}_gsd_m", pa.float64()),
            (f"{name}_clear", pa.list_(pa.float32())), (f"{name}_product_ids", _TEXTS), (f"{name}_orbits", _TEXTS),
            (f"{name}_decisions", _TEXTS),
        ]  # fmt: skip
    return pa.schema([*fields, *((f"{LABEL_PREFIX}{name}", pa.int32()) for name in sorted(labels))])


def row_of(info: Mapping[str, Any], clouds: float | None, shard: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """One index row from a sample's JSON and its tar entries (`row`, the global number, is given by the merge).

    clouds: mean share of cloudy among valid s2 pixels; None without s2.
    """
    key, modalities = info["key"], info["modalities"]
    dates = sorted(text for entry in modalities.values() for text in entry["datetimes"] if text)
    products = [text for entry in modalities.values() for text in entry["product_ids"] if text]
    west, south, east, north = info["bbox_wgs84"]
    row: dict[str, Any] = {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": key,
        "geometry": geometry_wkb(info["crs"], tuple(info["footprint"]), tuple(info["bbox_wgs84"])),
        "bbox": {"xmin": west, "ymin": south, "xmax": east, "ymax": north},
        "links": [],
        "assets": {"shard": {"href": shard, "type": "application/x-tar", "title": None, "roles": ["data"]}},
        "datetime": _time(dates[0]) if dates else None,
        "start_datetime": _time(dates[0]) if dates else None,
        "end_datetime": _time(dates[-1]) if dates else None,
        "key": key, "shard": shard, "offset": entries[0].header, "length": span(entries),
        "members": [
            {"name": e.name.partition(".")[2], "offset": e.offset, "length": e.length, "sha256": e.sha256, "crc32c": e.crc32c}
            for e in entries
        ],
        "split": info["split"], "cell": info["cell"],
        "place": None if has_place(info["crs"]) else "none", "crs": info["crs"], "footprint": info["footprint"],
        "modalities": list(modalities), "cloud": clouds,
        "datetime_start": dates[0] if dates else None, "datetime_end": dates[-1] if dates else None,
        "product_ids": list(dict.fromkeys(products)),
        "offset_applied": [decision.get("offset_applied") for decision in modalities.get("s2", {}).get("decisions", [])],
        "flagged_dates": sum(bool(d.get("flags")) for entry in modalities.values() for d in entry["decisions"]),
        "rasters": list(info["labels"]),
    }  # fmt: skip
    for name, entry in modalities.items():
        row |= {
            f"{name}_datetimes": entry["datetimes"], f"{name}_shape": entry["shape"], f"{name}_gsd_m": entry["gsd_m"],
            f"{name}_clear": entry["clear_fraction"], f"{name}_product_ids": entry["product_ids"],
            f"{name}_orbits": entry["orbits"], f"{name}_decisions": [dump_json(d).decode() for d in entry["decisions"]],
        }  # fmt: skip
    return row | {f"{LABEL_PREFIX}{name}": value for name, value in info["scalars"].items()}


def span(entries: Sequence[Entry]) -> int:
    """Bytes from the first header of a sample to the end of its last member's padding."""
    last = entries[-1]
    return last.offset + last.length + -last.length % 512 - entries[0].header


def labels_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the scalar labels that any row has."""
    return sorted({name[len(LABEL_PREFIX) :] for row in rows for name in row if name.startswith(LABEL_PREFIX)})


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows to a table with every column of `schema`; absent values are null."""
    wanted = schema(labels_of(rows))
    return pa.table({f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in wanted}, wanted)


def read_parquet(data: bytes, columns: Iterable[str] | None = None) -> pa.Table:
    """A Parquet file in memory as a table, without threads: Arrow 22's pool aborts a process that ends while it starts up."""
    names = None if columns is None else list(columns)
    return pq.ParquetFile(pa.BufferReader(data)).read(names, use_threads=False)


def read_batches(file: pq.ParquetFile, columns: Iterable[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows of the columns that are there; `members.offset` is one field of the members alone.
    Without threads, as in `read_parquet`."""
    wanted = set(columns)
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    found = [leaf for leaf in leaves if leaf.partition(".")[0] in wanted or _LIST_LEVEL.sub("", leaf) in wanted]
    yield from file.iter_batches(rows, columns=found, use_threads=False)


def conform(table: pa.Table, wanted: pa.Schema, first_row: int) -> pa.Table:
    """A part's table with the columns of the whole set (labels it lacks are null) and global row numbers."""
    columns = {}
    for field in wanted:
        if field.name == "row":
            columns["row"] = pa.array(range(first_row, first_row + table.num_rows), pa.int64())
        elif field.name in table.column_names:
            columns[field.name] = table[field.name]
        else:
            columns[field.name] = pa.nulls(table.num_rows, field.type)
    return pa.table(columns, wanted)


def label_names(wanted: pa.Schema) -> list[str]:
    """Scalar labels an index has columns for."""
    return [name[len(LABEL_PREFIX) :] for name in wanted.names if name.startswith(LABEL_PREFIX)]


def with_geo_metadata(wanted: pa.Schema, bounds: Sequence[float] | None) -> pa.Schema:
    """Adds what makes the file GeoParquet (CRS84, bbox covering) and stac-geoparquet."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon", "MultiPolygon"],
        "edges": "planar",
        "covering": {"bbox": {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}},
    }  # fmt: skip  (no "crs": GeoParquet then means OGC:CRS84, longitude and latitude)
    if bounds is not None:
        column["bbox"] = list(bounds)
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return wanted.with_metadata(
        {b"geo": json.dumps(geo).encode(), b"stac-geoparquet": json.dumps({"version": "1.0.0"}).encode()}
    )


def geometry_wkb(crs: str, footprint: tuple[float, ...], bbox_wgs84: tuple[float, ...]) -> bytes:
    """The footprint in WGS84 as WKB; a site across the antimeridian becomes two polygons, one on either side."""
    west, south, east, north = bbox_wgs84
    if west > east:
        halves = [shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)]
        return shapely.to_wkb(shapely.MultiPolygon(halves), byte_order=1)
    xmin, ymin, xmax, ymax = footprint
    try:
        x, y = _to_wgs84(crs).transform([xmin, xmax, xmax, xmin], [ymin, ymin, ymax, ymax], errcheck=True)
        polygon = shapely.Polygon([(round(a, 9), round(b, 9)) for a, b in zip(x, y)])
    except pyproj.exceptions.ProjError:
        polygon = shapely.box(west, south, east, north)
    return shapely.to_wkb(polygon, byte_order=1)


@functools.lru_cache(maxsize=64)
def _to_wgs84(crs: str) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)


def _time(text: str) -> dt.datetime:
    """ISO 8601 text as a UTC time; raises ValueError."""
    time = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC)
