"""Images as tables: of every STAC item the facts that choosing needs, beside the item itself.

Facts (columns `f_…`): id, collection, time (seconds since 1970, UTC), cloud (percent, NaN = not said), orbit (relative, -1 = not said),
pass (what tells overpasses of one day apart), version (later is better among twins), geometry (WKB in degrees).
The item itself: a JSON column `item` (from an API or a static catalog), or the columns of a stac-geoparquet dump as they are, which
costs no conversion of the many items that nobody chooses.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
import shapely.geometry

from data_prep.prepare.area import unwound
from data_prep.sources.stac_io import item_of_row, with_absolute_hrefs

FACTS = pa.schema(
    [
        ("f_id", pa.string()), ("f_collection", pa.string()), ("f_time", pa.int64()), ("f_cloud", pa.float32()),
        ("f_orbit", pa.int32()), ("f_pass", pa.string()), ("f_version", pa.string()), ("f_geometry", pa.binary()),
    ]
)  # fmt: skip
SCHEMA = pa.schema([*FACTS, ("item", pa.string())])


def table_of_items(items: Iterable[dict[str, Any]]) -> pa.Table:
    """STAC items (dicts with absolute hrefs) as facts and JSON. Items without a geometry or a time are left out."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for item in items:
        said = item.get("properties") or {}
        time = _seconds(said.get("datetime") or said.get("start_datetime"))
        if not item.get("geometry") or time is None:
            continue
        cloud, orbit = said.get("eo:cloud_cover"), said.get("sat:relative_orbit")
        values = (
            str(item["id"]), str(item.get("collection") or ""), time, float("nan") if cloud is None else float(cloud),
            -1 if orbit is None else int(orbit), f"{said.get('platform') or ''}|{said.get('sat:orbit_state') or ''}",
            f"{said.get('s2:processing_baseline') or said.get('processing:baseline') or ''}|{said.get('updated') or said.get('created') or ''}",
            shapely.to_wkb(shapely.geometry.shape(item["geometry"]), byte_order=1),
            json.dumps({key: value for key, value in item.items() if key not in ("links", "geometry")}, sort_keys=True),
        )  # fmt: skip
        for name, value in zip(SCHEMA.names, values):
            columns[name].append(value)
    return pa.table(columns, SCHEMA)


def table_of_dump(rows: pa.Table) -> pa.Table:
    """Rows of a stac-geoparquet dump with their facts in front. Items without a geometry or a time are left out."""
    count = rows.num_rows

    def column(*names: str, empty: Any = "") -> pa.ChunkedArray:
        found = [rows[name] for name in names if name in rows.column_names]
        texts = [_text(values) for values in found] if isinstance(empty, str) else found
        return pc.coalesce(*texts, pa.scalar(empty)) if texts else pa.chunked_array([pa.array([empty] * count)])

    times = [_times(rows[name]) for name in ("datetime", "start_datetime") if name in rows.column_names]
    if not times or "geometry" not in rows.column_names:
        return pa.table(
            {**{f.name: pa.array([], f.type) for f in FACTS}, **{n: rows[n][:0] for n in rows.column_names}}
        )
    facts = {
        "f_id": column("id"), "f_collection": column("collection"), "f_time": pc.coalesce(*times),
        "f_cloud": column("eo:cloud_cover", empty=float("nan")), "f_orbit": column("sat:relative_orbit", empty=-1),
        "f_pass": pc.binary_join_element_wise(column("platform"), column("sat:orbit_state"), "|"),
        "f_version": pc.binary_join_element_wise(
            column("s2:processing_baseline", "processing:baseline"), column("updated", "created"), "|"
        ),
        "f_geometry": rows["geometry"].cast(pa.binary()),
    }  # fmt: skip
    own = {name: rows[name] for name in rows.column_names if name not in ("geometry", "links", "stac_extensions")}
    table = pa.table({**{f.name: facts[f.name].cast(f.type) for f in FACTS}, **own})
    return table.filter(pc.and_(pc.is_valid(table["f_time"]), pc.is_valid(table["f_geometry"])))


def read_item(table: pa.Table, row: int, folder: str) -> dict[str, Any]:
    """The STAC item in a row; relative hrefs of a dump count from `folder`."""
    if "item" in table.column_names:
        return json.loads(table["item"][row].as_py())
    values = table.slice(row, 1).to_pylist()[0]
    return with_absolute_hrefs(item_of_row({k: v for k, v in values.items() if not k.startswith("f_")}), folder)


def placed(shapes: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Geometries of items; one that spans the world because it crosses the antimeridian uncut is cut there."""
    found = shapely.from_wkb(np.asarray(shapes, dtype=object))
    if not len(found):
        return found
    bounds = shapely.bounds(found)
    for i in np.flatnonzero((bounds[:, 2] - bounds[:, 0] > 180) & (shapely.get_type_id(found) == 3)):
        turned = shapely.transform(
            found[i], lambda xy: np.column_stack([np.where(xy[:, 0] < 0, xy[:, 0] + 360, xy[:, 0]), xy[:, 1]])
        )
        if shapely.bounds(turned)[2] - shapely.bounds(turned)[0] <= 180:
            found[i] = unwound(turned)
    invalid = ~shapely.is_valid(found)
    found[invalid] = shapely.make_valid(found[invalid])
    return found


def _seconds(text: Any) -> int | None:
    try:
        time = dt.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return int((time if time.tzinfo else time.replace(tzinfo=dt.UTC)).timestamp())


def _times(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("s", values.type.tz), safe=False).cast(pa.int64())
    if pa.types.is_null(values.type):
        return values.cast(pa.int64())
    return pa.chunked_array([pa.array([_seconds(text) for text in values.to_pylist()], pa.int64())])


def _text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(values.type):
        return values.cast(pa.timestamp("us", values.type.tz)).cast(pa.int64()).cast(pa.string())
    return values.cast(pa.string())
