"""Reading STAC items: stac-geoparquet, item JSON, ItemCollections, folders of them. What their fields mean: `stac.py`."""

from __future__ import annotations

import datetime
import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
import shapely
import shapely.geometry

from cluster.errors import UsageError
from cluster.storage import exists, filesystem, is_local, read_bytes

COLLECTION_FILES = ("catalog.json", "collection.json")
# fields of an item itself; every other column of a stac-geoparquet file is one of its properties
ITEM_FIELDS = ("type", "stac_version", "stac_extensions", "id", "geometry", "bbox", "links", "assets", "collection")
BATCH_ROWS = 1024


def read_items(url: str, whole: bool = False) -> Iterator[dict[str, Any]]:
    """STAC items of a catalog, with absolute hrefs, in a stable order (parquet: row order; folder: sorted by path).

    Args:
        whole: with geometry, links and the like, to write the items again; of a parquet file they are left out otherwise.

    Raises:
        UsageError: nothing there, or not a STAC catalog.
    """
    if url.endswith((".parquet", ".geoparquet")):
        yield from _parquet_items(url, whole)
        return
    if url.endswith((".json", ".geojson")):
        yield from _json_items(url)
        return
    fs, path = filesystem(url)
    if not exists(url):
        raise UsageError(f"{url} does not exist")
    names = [name for name in sorted(fs.find(path)) if name.endswith((".json", ".geojson"))]
    found = False
    for name in names:
        if posixpath.basename(name) in COLLECTION_FILES or "/.z" in name or name.endswith("/zarr.json"):
            continue
        for item in _json_items(name if is_local(url) else fs.unstrip_protocol(name), strict=False):
            found = True
            yield item
    if not found:
        raise UsageError(
            f"{url} holds no STAC items: {len(names)} JSON files, none of type Feature; see --layout for other layouts"
        )


def _json_items(url: str, strict: bool = True) -> Iterator[dict[str, Any]]:
    try:
        tree = json.loads(read_bytes(url))
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist") from None
    except OSError as error:
        raise UsageError(f"{url} cannot be read: {error}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{url} is not valid JSON: {error}") from None
    kind = tree.get("type") if isinstance(tree, dict) else None
    if kind == "FeatureCollection":
        items = tree.get("features", [])
    elif kind == "Feature" and "assets" in tree:
        items = [tree]
    elif strict:
        raise UsageError(f"{url} is no STAC item (type Feature with assets)")
    else:
        return
    for item in items:
        yield with_absolute_hrefs(item, posixpath.dirname(url))


def _parquet_items(url: str, whole: bool) -> Iterator[dict[str, Any]]:
    try:
        source = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(read_bytes(url)))
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{url} is not a Parquet file: {str(error).splitlines()[0]}") from None
    names = source.schema_arrow.names
    if "assets" not in names or "id" not in names:
        raise UsageError(
            f"{url} is no stac-geoparquet catalog (no columns id and assets); make one with data_prep catalog"
        )
    columns = [name for name in names if whole or name not in ITEM_FIELDS or name in ("id", "assets")]
    try:
        # without threads: Arrow 22's pool aborts a process that ends while it starts up
        for batch in source.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                yield with_absolute_hrefs(item_of_row(row), posixpath.dirname(url))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{url} is damaged: {str(error).splitlines()[0]}") from None


def item_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """A stac-geoparquet row as a STAC item: properties stand beside the item's own fields, absent values are null."""
    item = {name: row.pop(name) for name in ITEM_FIELDS if name in row}
    item["assets"] = {name: without_nulls(asset) for name, asset in (item["assets"] or {}).items() if asset is not None}
    item["properties"] = {name: _text_times(without_nulls(value)) for name, value in row.items() if value is not None}
    item["properties"].setdefault("datetime", None)
    if item.get("geometry") is not None:
        item["geometry"] = shapely.geometry.mapping(shapely.from_wkb(item["geometry"]))
    if isinstance(item.get("bbox"), dict):
        item["bbox"] = [item["bbox"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
    if "links" in item:
        item["links"] = [without_nulls(link) for link in item["links"] or []]
    return item


def _text_times(value: Any) -> Any:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime.datetime) else value


def without_nulls(value: Any) -> Any:
    """Drops null fields and null assets: a table gives every row every column."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == "datetime"}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def with_absolute_hrefs(item: dict[str, Any], folder: str) -> dict[str, Any]:
    assets = {
        name: {**asset, "href": absolute(asset["href"], folder)}
        for name, asset in (item.get("assets") or {}).items()
        if isinstance(asset, dict) and asset.get("href")
    }
    return {**item, "assets": assets}


def absolute(href: str, folder: str) -> str:
    """`href` seen from `folder`, `..` resolved, whatever the protocol."""
    if "://" in href or href.startswith("/"):
        return href
    protocol, separator, path = folder.partition("://")
    if not separator:
        protocol, path = "", folder
    return protocol + separator + posixpath.normpath(posixpath.join(path, href))


def unique_ids(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a list. Raises UsageError for an id that stands twice."""
    out, seen = [], set()
    for item in items:
        if item["id"] in seen:
            raise UsageError(f"item id {item['id']} stands twice in the catalog")
        seen.add(item["id"])
        out.append(item)
    return out
