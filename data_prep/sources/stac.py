"""STAC catalogs: which item and asset fields are read, and how items become sites.

A catalog is a stac-geoparquet file, one STAC item JSON file, an ItemCollection, or a folder of item JSON files (searched
recursively; `catalog.json` and `collection.json` are passed over). Every other layout is first turned into such items, so
this is the only door from metadata to pixels. Relative hrefs count from the item's own file (for parquet: from its folder).

Item
    id                        names the item in messages
    properties."geoloom:site" items with the same value form one site (its dates and modalities are joined). Default: the
                              item id. The shard key is this value with everything but letters, digits, `-`, `_` made `_`.
    properties."geoloom:cell" ground cell that decides the split. Default `grid:code`, else the 10 km Major-TOM cell of the
                              centre.
    properties."datetime"     or start_datetime/end_datetime with datetime null (cubes carry their own dates)
    properties."proj:code"    CRS of the site; also `proj:epsg`, `proj:wkt2`. Asset fields win over item fields.
    properties."proj:bbox"    footprint (xmin, ymin, xmax, ymax) in that CRS, narrows the ground that all modalities share.
    properties."geoloom:labels"   scalar labels, e.g. {"scene": 3}; also `geoloom:scalars`
    properties."label:classes"    class names, [{"name": "scene", "classes": ["water", ...]}, {"name": "landcover", ...}];
                                  index = value; also `geoloom:classes` {"scene": [names]}
    properties, or the asset: "s2:processing_baseline" ("05.09"), "s2:product_uri"/"product_id", "sat:orbit_state",
                              "sar:polarizations", "geoloom:calibration" ("gamma0 RTC"), "eo:cloud_cover", "processing:level" ("L2A", "L1C"),
                              "earthsearch:boa_offset_applied"

Asset (the key is free, except for labels, whose key is the label's name)
    href                      any fsspec URL, or relative
    type                      `image/tiff…` GeoTIFF/COG, `application/vnd+zarr` Zarr; else judged by the extension
    "geoloom:modality"        "hr" | "s2" | "s2_l1c" (audited, never built) | "s1" | "cloud" | "scl" | "label".
                              Default: by band names (R, G, B → hr; B02 … → s2; VV, VH → s1), roles ("labels",
                              "cloud"), or common asset keys ("visual", "scl", "blue", "B02", "vv", …); others ignored.
    "eo:bands" or "bands"     [{"name": "B02"}, …] in file order. One asset may hold one band or all of them. `R G B N`,
                              `B02 … B8A … B12` (also `B2`), `VV VH`; band common names (red, nir08) are understood.
    "proj:code", "proj:transform" (6 numbers a b c d e f, pixel corner), "proj:shape" (rows, columns): optional; used so
                              that planning opens no file.
    "raster:bands"            [{"nodata": 0, "scale": 0.0001, "offset": -0.1, "data_type": "uint16", "unit": "dB"}, …].
                              s2: reflectance = DN * scale + offset. s1: unit "dB" or "linear".

Zarr cube (format 2 or 3; a group)
    array `data`              dims time, band, y, x (or the only 4-dimensional array; `geoloom:array` on the asset names it)
    attributes of the group   crs ("EPSG:32633" or WKT), transform [a, b, c, d, e, f], bands [names], datetimes [ISO 8601 UTC];
                              optional per-date lists product_ids, orbits ("ascending"/"descending"; also orbit_states),
                              baselines ("05.09"; also processing_baselines), boa_add_offsets (-1000 or 0); optional nodata, unit ("dB"/"linear"), scale and offset (s2, as in raster:bands).
                              CF coordinates `time`, `band`, `x`, `y`, `spatial_ref` are read where attributes are missing.
    array `scl` or `cloud`    optional uint8 [time, y, x]: scene classification codes, or non-zero = cloud

Label rasters are integer GeoTIFFs; -1, and the declared nodata, mean unlabelled. A cloud raster is non-zero where cloudy.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import UsageError
from data_prep.geo import Bounds, crs_name
from data_prep.sources.names import (
    HR_ALIASES,
    HR_BANDS,
    L1C_ORDER,
    L2A_ORDER,
    S2_BANDS,
    band_name,
    iso_datetime,
    s1_datetime,
    s2_product,
)
from data_prep.sources.records import MODALITY_ROLES, Asset, SourceFault

PRODUCT_FIELDS = ("s2:product_uri", "sar:product_id", "product_id", "s2:product_id")
# formats that carry their own dates
CUBES = ("zarr", "treesatai", "mesh", "copernicus")


def site_name(item: dict[str, Any]) -> str:
    """The site an item belongs to, as a shard key (no dots)."""
    name = item.get("properties", {}).get("geoloom:site") or item["id"]
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(name))


def item_assets(item: dict[str, Any]) -> list[Asset]:
    """The assets of an item that we understand, in item order."""
    assets = [_asset(item, name, dict(fields)) for name, fields in item["assets"].items()]
    return [asset for asset in assets if asset is not None]


def item_footprint(item: dict[str, Any]) -> Bounds | None:
    box = item["properties"].get("proj:bbox")
    if not isinstance(box, list | tuple) or len(box) not in (4, 6):
        return None
    values = [float(v) for v in box]
    return (
        values[0],
        values[1],
        values[-3] if len(box) == 6 else values[2],
        values[-2] if len(box) == 6 else values[3],
    )


def item_classes(item: dict[str, Any]) -> dict[str, list[str]]:
    """Class names per label."""
    properties = item["properties"]
    classes = {name: list(names) for name, names in (properties.get("geoloom:classes") or {}).items()}
    for entry in properties.get("label:classes") or []:
        if entry.get("name"):
            classes[entry["name"]] = [str(name) for name in entry.get("classes", [])]
    return classes


def item_scalars(item: dict[str, Any]) -> dict[str, int]:
    """Scalar labels; a value that is no whole number is a fault."""
    values = item["properties"].get("geoloom:labels") or item["properties"].get("geoloom:scalars") or {}
    scalars = {}
    for name, value in values.items():
        if isinstance(value, bool) or not float(value).is_integer():
            raise SourceFault(item["id"], f"label {name} must be a whole number, found {value!r}")
        scalars[name] = int(value)
    return scalars


def _asset(item: dict[str, Any], name: str, fields: dict[str, Any]) -> Asset | None:
    properties = item["properties"]

    def said(*names: str) -> Any:
        for key in names:
            for source in (fields, properties):
                if source.get(key) is not None:
                    return source[key]
        return None

    listed = fields.get("eo:bands") or fields.get("bands") or []
    raw_names = [
        str(band.get("name") or band.get("eo:common_name") or band.get("common_name") or "") for band in listed
    ]
    modality = _modality(fields, properties, name, raw_names)
    if modality is None:
        return None
    product = str(said(*PRODUCT_FIELDS) or "")
    parsed = s2_product(product) or s2_product(item["id"]) if modality.startswith("s2") else {}
    level = str(said("processing:level") or parsed.get("level") or "L2A").upper()
    if modality == "s2" and level.startswith(("L1", "LEVEL-1")):
        modality, level = "s2_l1c", "L1C"
    raster = [dict(band) for band in fields.get("raster:bands") or listed or []]
    first = raster[0] if raster else {}
    transform, shape = said("proj:transform"), said("proj:shape")
    own_dates = _format(fields) in CUBES
    moment = (
        ""
        if own_dates
        else fields.get("datetime") or properties.get("datetime") or parsed.get("datetime") or s1_datetime(product)
    )
    return Asset(
        id=f"{item['id']}/{name}",
        modality=modality,
        href=fields["href"],
        format=_format(fields),
        bands=_bands(modality, name, raw_names, first, level),
        datetime=iso_datetime(str(moment or "")),
        product_id=product or (item["id"] if parsed else ""),
        level=level if modality.startswith("s2") else "",
        baseline=str(said("s2:processing_baseline", "processing:baseline") or parsed.get("baseline") or ""),
        scale=_number(first.get("scale", first.get("raster:scale"))),
        offset=_number(first.get("offset", first.get("raster:offset"))),
        offset_removed=said("earthsearch:boa_offset_applied"),
        orbit=str(said("sat:orbit_state") or "").lower() if modality == "s1" else "",
        unit=_unit(first.get("unit")) if modality == "s1" else "",
        calibration=str(said("geoloom:calibration") or "") if modality == "s1" else "",
        nodata=_number(first.get("nodata")),
        cloud_cover=_number(said("eo:cloud_cover")),
        crs=_crs(said),
        transform=tuple(float(v) for v in transform[:6]) if transform and len(transform) >= 6 else None,  # type: ignore[arg-type]
        shape=(int(shape[0]), int(shape[1])) if shape else None,
        member=str(fields.get("geoloom:member") or fields.get("geoloom:array") or ""),
        note=str(fields.get("geoloom:note") or ""),
    )


def _modality(fields: dict[str, Any], properties: dict[str, Any], name: str, bands: list[str]) -> str | None:
    explicit = fields.get("geoloom:modality")
    if explicit is not None:
        if explicit not in MODALITY_ROLES:
            raise UsageError(
                f"{fields['href']}: geoloom:modality {explicit!r} is not one of {', '.join(MODALITY_ROLES)}"
            )
        return explicit
    kind = str(fields.get("type") or "")
    if kind and not any(word in kind for word in ("tiff", "zarr", "hdf5", "jp2")):
        return None
    roles = fields.get("roles") or []
    key = name.lower()
    if "labels" in roles or "label" in roles:
        return "label"
    if key == "scl":
        return "scl"
    if "cloud" in roles or key in ("cloud", "cloud_mask"):
        return "cloud"
    if {"thumbnail", "overview", "metadata"} & set(roles):
        return None
    known = {band_name(band) for band in bands or [name]}
    if known & {"VV", "VH"}:
        return "s1"
    colours = len(bands) in (3, 4) and all(band.lower() in HR_ALIASES or band in HR_BANDS for band in bands)
    if colours or (not bands and key in ("visual", "image", "hr", "rgb", "rgbn")):
        # one file of red, green, blue is an aerial image, unless it is the 10 m preview of a Sentinel-2 scene
        sentinel = "sentinel-2" in f"{properties.get('constellation', '')} {properties.get('platform', '')}".lower()
        return None if sentinel else "hr"
    if known & set(S2_BANDS):
        return "s2"
    return None


def _format(fields: dict[str, Any]) -> str:
    if fields.get("geoloom:format"):
        return str(fields["geoloom:format"])
    kind, href = str(fields.get("type") or ""), fields["href"].rstrip("/")
    if "zarr" in kind or href.endswith((".zarr", ".zarr.zip")):
        return "zarr"
    if "hdf5" in kind or href.endswith((".h5", ".hdf5")):
        return "treesatai"
    return "raster"


def _bands(modality: str, name: str, listed: list[str], raster: dict[str, Any], level: str) -> tuple[str, ...]:
    """Band names in file order; without any, the sensor's usual ones, which the reader holds against the file."""
    if listed and all(listed):
        return tuple(band_name(band, hr=modality == "hr") for band in listed)
    if modality in ("label", "cloud", "scl"):
        return ("",)
    if modality == "hr":
        return HR_BANDS[:3]
    single = band_name(name)
    if single in S2_BANDS or single in ("VV", "VH"):
        return (single,)
    if modality == "s1":
        return ("VV", "VH")
    return L1C_ORDER if level == "L1C" else L2A_ORDER


def _crs(said: Any) -> str:
    code = said("proj:code") or said("proj:wkt2")
    if not code and said("proj:epsg"):
        code = f"EPSG:{int(said('proj:epsg'))}"
    if not code:
        return ""
    try:
        return crs_name(str(code))
    except Exception:
        return ""


def _number(value: Any) -> float | None:
    """A number; "nan" too, as STAC JSON writes it."""
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _unit(text: Any) -> str:
    lowered = str(text or "").lower()
    if lowered in ("db", "decibel"):
        return "dB"
    return "linear" if lowered in ("linear", "power", "1", "m2/m2", "intensity") else ""
