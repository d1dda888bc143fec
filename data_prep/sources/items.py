"""Writing STAC items: what every layout hands over, in the standard's own field names (see `stac.py` for the reading side)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import shapely
import shapely.geometry

from data_prep.geo import Grid, bbox_wgs84, centre_wgs84, ground_cell
from data_prep.sources.raster import open_raster, raster_grid
from data_prep.sources.records import MASKS

STAC_VERSION = "1.0.0"
# declared where their fields are used: a schema refuses an item that declares it and has none of its fields
EXTENSIONS = {
    "proj": "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "raster": "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "eo": "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "sat": "https://stac-extensions.github.io/sat/v1.0.0/schema.json",
}
COG = "image/tiff; application=geotiff"
ROLES = {**{mask: ["cloud"] for mask in MASKS}, "label": ["labels"]}


@dataclass(frozen=True)
class AssetFields:
    """One asset as a layout knows it. `grid` None: the reader will ask the file."""

    modality: str
    href: str
    type: str = COG
    bands: Sequence[str] = ()
    grid: Grid | None = None
    datetime: str = ""
    product_id: str = ""
    baseline: str = ""
    level: str = ""
    orbit: str = ""
    unit: str = ""
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None
    data_type: str = ""
    cloud_cover: float | None = None
    member: str = ""
    note: str = ""
    format: str = ""
    calibration: str = ""
    relative_orbit: int = 0


@dataclass(frozen=True)
class RasterFields:
    grid: Grid
    count: int
    data_type: str
    nodata: float | None
    tags: Mapping[str, str]
    descriptions: tuple[str | None, ...] = ()


def raster_fields(href: str, name: str) -> RasterFields:
    """Header of a raster file. Raises SourceFault."""
    with open_raster(href, name) as dataset:
        grid = raster_grid(dataset, name)
        return RasterFields(
            grid, dataset.count, dataset.dtypes[0], dataset.nodata, dict(dataset.tags()), dataset.descriptions
        )


def make_item(
    item_id: str,
    assets: Mapping[str, AssetFields],
    *,
    times: Sequence[str] = (),
    site: str = "",
    cell: str = "",
    scalars: Mapping[str, int] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A STAC item with the geometry of its largest asset. `times` ascending; none: the assets' own dates.

    Raises:
        ValueError: no asset has a grid.
    """
    grids = [asset.grid for asset in assets.values() if asset.grid is not None]
    if not grids:
        raise ValueError(f"item {item_id}: no asset has a pixel grid")
    boxes = [bbox_wgs84(grid.crs, grid.bounds) for grid in grids]
    west, south, east, north = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    main = grids[0]
    stamps = sorted(filter(None, times or [asset.datetime for asset in assets.values()]))
    properties: dict[str, Any] = {"datetime": stamps[0] if len(set(stamps)) == 1 else None}
    if properties["datetime"] is None:
        # STAC wants a date; sources without one get the open interval's least surprising form
        properties["start_datetime"] = stamps[0] if stamps else "1970-01-01T00:00:00Z"
        properties["end_datetime"] = stamps[-1] if stamps else "1970-01-01T00:00:00Z"
        if not stamps:
            properties["geoloom:date_unknown"] = True
    properties |= _projection(main)
    properties["geoloom:site"] = site or item_id
    properties["geoloom:cell"] = cell or ground_cell(*centre_wgs84(main.crs, main.bounds))
    if scalars:
        properties["geoloom:labels"] = dict(scalars)
    if classes:
        properties["label:classes"] = [{"name": name, "classes": list(names)} for name, names in classes.items()]
    properties |= _summary(list(assets.values()))
    properties |= extra or {}
    described = {name: asset_json(asset, main) for name, asset in assets.items()}
    used = {key.partition(":")[0] for fields in (properties, *described.values()) for key in fields}
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [url for prefix, url in EXTENSIONS.items() if prefix in used],
        "id": item_id,
        "geometry": shapely.geometry.mapping(shapely.box(west, south, east, north)),
        "bbox": [west, south, east, north],
        "properties": properties,
        "links": [],
        "assets": described,
    }


def asset_json(asset: AssetFields, main: Grid) -> dict[str, Any]:
    """One asset in STAC's field names; empty fields are left out."""
    out: dict[str, Any] = {
        "href": asset.href,
        "type": asset.type,
        "roles": ROLES.get(asset.modality, ["data"]),
        "geoloom:modality": asset.modality,
    }
    if asset.bands:
        out["eo:bands"] = [{"name": band} for band in asset.bands]
        band: dict[str, Any] = {
            "nodata": asset.nodata, "scale": asset.scale, "offset": asset.offset, "unit": asset.unit, "data_type": asset.data_type,
        }  # fmt: skip
        band = {name: value for name, value in band.items() if value not in (None, "")}
        if band:
            out["raster:bands"] = [band for _ in asset.bands]
    elif asset.nodata is not None:
        out["raster:bands"] = [{"nodata": asset.nodata}]
    if asset.grid is not None:
        out |= _projection(asset.grid)
    fields = {
        "datetime": asset.datetime, "s2:product_uri" if asset.modality.startswith("s2") else "sar:product_id": asset.product_id,
        "s2:processing_baseline": asset.baseline, "processing:level": asset.level, "sat:orbit_state": asset.orbit,
        "eo:cloud_cover": asset.cloud_cover, "geoloom:member": asset.member, "geoloom:note": asset.note,
        "geoloom:format": asset.format,
        "geoloom:calibration": asset.calibration,
        "sat:relative_orbit": asset.relative_orbit or None,
    }  # fmt: skip
    out |= {name: value for name, value in fields.items() if value not in (None, "")}
    if asset.modality == "s1":
        out["sar:polarizations"] = list(asset.bands)
    return out


def _projection(grid: Grid) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "proj:transform": [float(v) for v in grid.transform],
        "proj:shape": [grid.height, grid.width],
    }
    if grid.crs.startswith("EPSG:"):
        return {"proj:code": grid.crs, **fields}
    return {"proj:code": None, "proj:wkt2": grid.crs, **fields}


def _summary(assets: list[AssetFields]) -> dict[str, Any]:
    """Item-level values of fields all assets agree on, where public tools look for them."""
    out: dict[str, Any] = {}
    for field, name in (
        ("baseline", "s2:processing_baseline"),
        ("cloud_cover", "eo:cloud_cover"),
        ("orbit", "sat:orbit_state"),
    ):
        values = {getattr(asset, field) for asset in assets} - {"", None}
        if len(values) == 1:
            out[name] = values.pop()
    if any(asset.modality == "s1" for asset in assets):
        out["sar:polarizations"] = ["VV", "VH"]
    return out
