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
                              "sar:polarizations", "geoloom:calibration" ("gamma0 RTC"), "view:incidence_angle", "eo:cloud_cover", "processing:level" ("L2A", "L1C"),
                              "earthsearch:boa_offset_applied"

Asset (the key is free, except for labels, whose key is the label's name)
    href                      any fsspec URL, or relative
    type                      `image/tiff…` GeoTIFF/COG, `application/vnd+zarr` Zarr; else judged by the extension
    "geoloom:modality"        a modality of the schema ("hr", "s2", "s2_l1c", "s1"), "scl", "qa_pixel", "cloud",
                              "cloud_probability", "clear_score", "incidence" or "label". Default: by band names (R, G, B → hr; B02 … → s2; VV, VH → s1), roles
                              ("labels", "cloud"), or common asset keys ("scl", "blue", "B02_10m", "0_VV", …); others ignored,
                              and so are 8-bit pictures of a Sentinel-2 scene ("visual", "TCI_10m") and previews.
                              Of several files of one band the finest is read, GeoTIFF before JPEG 2000.
    "eo:bands" or "bands"     [{"name": "B02"}, …] in file order. One asset may hold one band or all of them. `R G B N`,
                              `B02 … B8A … B12` (also `B2`), `VV VH`; band common names (red, nir08) are understood.
    "proj:code", "proj:transform" (6 numbers a b c d e f, pixel corner), "proj:shape" (rows, columns): optional; used so
                              that planning opens no file.
    "raster:bands"            [{"nodata": 0, "scale": 0.0001, "offset": -0.1, "data_type": "uint16", "unit": "dB"}, …].
                              s2: reflectance = DN * scale + offset, per band. s1: unit "dB" or "linear". STAC 1.1's form, `nodata`,
                              `data_type`, `raster:scale`, `raster:offset` in `bands` or on the asset, means the same.

Zarr cube (format 2 or 3; a group)
    array `data`              dims time, band, y, x (or the only 4-dimensional array; `geoloom:array` on the asset names it)
    attributes of the group   crs ("EPSG:32633" or WKT), transform [a, b, c, d, e, f], bands [names], datetimes [ISO 8601 UTC];
                              optional per-date lists product_ids, orbits ("ascending"/"descending"; also orbit_states),
                              baselines ("05.09"; also processing_baselines), boa_add_offsets (-1000 or 0); optional nodata, unit ("dB"/"linear"), scale and offset (s2, as in raster:bands).
                              CF coordinates `time`, `band`, `x`, `y`, `spatial_ref` are read where attributes are missing.
    array `scl` or `cloud`    optional uint8 [time, y, x]: scene classification codes, or non-zero = cloud

Label rasters are integer GeoTIFFs; -1, and the declared nodata, mean unlabelled. A "cloud" raster is non-zero where cloudy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.errors import UsageError
from data_prep.geo import Bounds, crs_name
from data_prep.schema import MODALITIES
from data_prep.sources.choose import choose
from data_prep.sources.names import (
    HR_BANDS,
    L1C_ORDER,
    L2A_ORDER,
    S2_BANDS,
    band_name,
    iso_datetime,
    relative_orbit,
    s1_datetime,
    s2_level,
    s2_product,
)
from data_prep.sources.records import INCIDENCE, MASKS, Asset, SourceFault, modality_roles

# `sentinel:…` are the names that Sentinel-2 items had before the `s2` extension (Earth Search v0)
PRODUCT_FIELDS = ("s2:product_uri", "sar:product_id", "product_id", "s2:product_id", "sentinel:product_id")
# formats that carry their own dates
CUBES = ("zarr", "treesatai", "mesh", "copernicus", "olmoearth", "mmearth")
# how a raster of incidence angles is called: by its key, or by the SAR extension's roles (and Indigo's, on AWS)
INCIDENCE_KEYS = ("incidence", "incidence_angle", "local_incidence_angle")
INCIDENCE_ROLES = ("incidence-angle", "local-incidence-angle", "ellipsoid-incidence-angle")
_PIXEL_SUFFIX = re.compile(r"_(\d+)m(?:[_-]jp2)?$")


def site_name(item: dict[str, Any]) -> str:
    """The site an item belongs to, as a shard key (no dots)."""
    name = item.get("properties", {}).get("geoloom:site") or item["id"]
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(name))


def item_assets(item: dict[str, Any]) -> list[Asset]:
    """The assets of an item that we understand and read, in item order: of two files of one band the better one."""
    assets = [_asset(item, name, dict(fields)) for name, fields in item["assets"].items()]
    return choose([asset for asset in assets if asset is not None])


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

    listed = [band for band in fields.get("eo:bands") or fields.get("bands") or [] if isinstance(band, dict)]
    raw_names = [_listed_name(band) for band in listed]
    modality = _modality(fields, item, name, raw_names)
    if modality is None:
        return None
    spec = MODALITIES.get(modality)
    sentinel2 = modality in ("s2", "s2_l1c")
    product = str(said(*PRODUCT_FIELDS) or "")
    parsed = s2_product(product) or s2_product(item["id"]) if sentinel2 else {}
    level = str(said("processing:level") or parsed.get("level") or s2_level(item["id"]) or "L2A").upper()
    if modality == "s2" and level.startswith(("L1", "LEVEL-1", "LEVEL1")):
        modality, level = "s2_l1c", "L1C"
    raster = _raster_bands(fields, listed)
    radiometry = [(_number(b.get("scale")), _number(b.get("offset")), _number(b.get("nodata"))) for b in raster]
    first = raster[0] if raster else {}
    transform, shape = said("proj:transform"), said("proj:shape")
    named = product or (item["id"] if parsed or s1_datetime(item["id"]) else "")
    return Asset(
        id=f"{item['id']}/{name}",
        modality=modality,
        href=fields["href"],
        format=_format(fields),
        bands=_bands(modality, name, raw_names, level),
        datetime=_moment(item, fields, parsed.get("datetime") or s1_datetime(product)),
        product_id=named,
        level=level if sentinel2 else "",
        baseline=str(said("s2:processing_baseline", "processing:baseline", "sentinel:processing_baseline") or parsed.get("baseline") or "") if sentinel2 else "",
        scale=radiometry[0][0] if radiometry else None,
        offset=radiometry[0][1] if radiometry else None,
        offset_removed=said("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied"),
        orbit=str(said("sat:orbit_state") or "").lower() if modality == "s1" else "",
        relative_orbit=int(said("sat:relative_orbit") or relative_orbit(named) or 0),
        incidence_deg=(_number(said("view:incidence_angle")) or 0.0) if modality == "s1" else 0.0,
        unit=_unit(first.get("unit")) if spec is not None and spec.kind == "backscatter" else "",
        calibration=_calibration(item, name, fields, said) if modality == "s1" else "",
        nodata=radiometry[0][2] if radiometry else None,
        per_band=tuple(radiometry) if len(set(radiometry)) > 1 else (),
        gsd_m=_declared_gsd(name, fields, first),
        cloud_cover=_number(said("eo:cloud_cover")),
        crs=_crs(said),
        transform=tuple(float(v) for v in transform[:6]) if transform and len(transform) >= 6 else None,  # type: ignore[arg-type]
        shape=(int(shape[0]), int(shape[1])) if shape else None,
        member=str(fields.get("geoloom:member") or fields.get("geoloom:array") or ""),
        note=str(fields.get("geoloom:note") or ""),
    )  # fmt: skip


def _listed_name(band: Mapping[str, Any]) -> str:
    """The name of a listed band that we know: its own (B02, red), else the common one (BAND_B of common name blue)."""
    names = [str(band[key]) for key in ("name", "eo:common_name", "common_name") if band.get(key)]
    known = {*S2_BANDS, *HR_BANDS, "VV", "VH", "HH", "HV"}
    return next(
        (name for name in names if band_name(name) in known or band_name(name, hr=True) in known),
        names[0] if names else "",
    )


def _moment(item: dict[str, Any], fields: dict[str, Any], named: str) -> str:
    """When an image was taken; "" for formats that carry their own dates, and where nobody knows."""
    if _format(fields) in CUBES:
        return ""
    properties = item["properties"]
    stated = fields.get("datetime") or properties.get("datetime") or named
    span = [str(properties.get(f"{end}_datetime") or "") for end in ("start", "end")]
    if not stated and not properties.get("geoloom:date_unknown") and span[0][:10] == span[1][:10]:
        stated = span[0]  # an acquisition given by its start and end; a longer span is that of a series
    moment = iso_datetime(str(stated or ""))
    if stated and not moment:
        raise SourceFault(item["id"], f"datetime {stated!r} is no ISO 8601 time such as 2021-06-01T10:00:00Z")
    return moment


def _raster_bands(fields: dict[str, Any], listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per band what `raster:bands` (STAC 1.0), or `bands` and the asset itself (1.1), say: nodata, scale, offset, unit, data_type."""
    whole = {
        key: fields[name]
        for key in ("nodata", "scale", "offset", "unit", "data_type")
        for name in (f"raster:{key}", key)
        if fields.get(name) is not None
    }
    bands = [dict(band) for band in fields.get("raster:bands") or []] or [
        {key.removeprefix("raster:"): value for key, value in band.items()} for band in listed
    ]
    if len(bands) == 1 < len(listed):
        bands = bands * len(listed)
    return [{**whole, **{k: v for k, v in band.items() if v is not None}} for band in bands] or (
        [whole] if whole else []
    )


def _declared_gsd(name: str, fields: dict[str, Any], raster: Mapping[str, Any]) -> float:
    """Pixel size in metres by `gsd`, `raster:spatial_resolution`, or the key's ending (`blue_20m`); 0 = not said."""
    for value in (fields.get("gsd"), fields.get("raster:spatial_resolution"), raster.get("spatial_resolution")):
        if isinstance(value, int | float) and value > 0:
            return float(value)
    match = _PIXEL_SUFFIX.search(name)
    return float(match[1]) if match else 0.0


def _modality(fields: dict[str, Any], item: dict[str, Any], name: str, bands: list[str]) -> str | None:
    explicit = fields.get("geoloom:modality")
    if explicit is not None:
        if explicit not in modality_roles():
            raise UsageError(
                f"{fields['href']}: geoloom:modality {explicit!r} is not one of {', '.join(modality_roles())}"
            )
        return explicit
    kind, roles = str(fields.get("type") or ""), set(fields.get("roles") or [])
    if kind and not any(word in kind for word in ("tiff", "zarr", "hdf5", "jp2")):
        return None
    if roles & {"labels", "label"}:
        return "label"
    if roles & {"thumbnail", "overview", "metadata"}:
        return None
    if mask := _mask(fields, name, roles):
        return mask
    if name.lower() in INCIDENCE_KEYS or roles & set(INCIDENCE_ROLES):
        return INCIDENCE
    properties = item["properties"]
    mission = (
        f"{item.get('collection', '')} {properties.get('constellation', '')} {properties.get('platform', '')}".lower()
    )
    for spec in MODALITIES.values():
        if any(word in mission for word in spec.collections):
            return spec.name if {spec.band(band) for band in bands or [name]} & set(spec.bands) else None
    return _by_bands(fields, mission, name, bands)


def _by_bands(fields: dict[str, Any], mission: str, name: str, bands: list[str]) -> str | None:
    key = re.sub(r"_\d+m$", "", name.lower())
    known = {band_name(band) for band in bands or [name]}
    if known & {"VV", "VH"}:
        return "s1"
    types = {str(band.get("data_type") or "uint8") for band in _raster_bands(fields, [])} or {"uint8"}
    colours = len(bands) >= 3 and {"R", "G", "B"} <= {band_name(band, hr=True) for band in bands}
    if colours or (not bands and key in ("visual", "image", "hr", "rgb", "rgbn")):
        # a file of red, green and blue is an aerial image, unless it is the 10 m picture of a Sentinel-2 scene
        sentinel = "sentinel-2" in mission.replace("sentinel 2", "sentinel-2")
        return "hr" if not sentinel and types == {"uint8"} else None
    if key in ("tci", "visual", "visual-jp2", "true_color", "preview"):
        return None
    return "s2" if known & set(S2_BANDS) else None


def _mask(fields: dict[str, Any], name: str, roles: set[str]) -> str | None:
    """Which kind of mask an asset is, by its key, role, title and file name; None if it is none."""
    key = re.sub(r"_\d+m$", "", name.lower().removesuffix("-jp2"))
    if key in MASKS:
        kind = key
    elif key in ("cs", "cs_cdf"):
        return "clear_score"
    elif key in ("cld", "cldprb", "cloud_prob", "cloudprob", "msk_cldprb", "s2cloudless"):
        return "cloud_probability"
    elif "cloud" in roles or key == "cloud_mask":
        if _is_bits(fields):
            return None  # its numbers are flags of many things: any non-zero would be a cloud
        kind = "cloud"
    else:
        return None
    about = f"{fields.get('title', '')} {fields['href'].rsplit('/', 1)[-1]}".lower()
    return "cloud_probability" if kind == "cloud" and ("probab" in about or "cld" in about) else kind


def _is_bits(fields: dict[str, Any]) -> bool:
    """Whether a mask's numbers are bit fields."""
    bands = fields.get("raster:bands") or [{}]
    return "bit" in str(bands[0].get("unit") or "") or any(
        "classification:bitfields" in source for source in (fields, bands[0])
    )


def _calibration(item: dict[str, Any], name: str, fields: dict[str, Any], said: Any) -> str:
    """Sigma0 or gamma0 and the product kind, as somebody says it; "" if nobody does."""
    if stated := said("geoloom:calibration"):
        return str(stated)
    words = " ".join(
        (name, item["id"], str(item.get("collection", "")), str(said("sar:product_type") or ""), *(fields.get("roles") or []))
    ).lower()  # fmt: skip
    terrain = "rtc" in re.split(r"[^a-z0-9]+", words) or "gamma0" in words
    if terrain:
        return "gamma0 RTC"
    return "sigma0 GRD" if "sigma0" in words else ""


def _format(fields: dict[str, Any]) -> str:
    if fields.get("geoloom:format"):
        return str(fields["geoloom:format"])
    kind, href = str(fields.get("type") or ""), fields["href"].rstrip("/")
    if "zarr" in kind or href.endswith((".zarr", ".zarr.zip")):
        # an array or group inside a product (…/x.zarr/measurements/…) holds one date, one variable per band
        return "zarr_bands" if ".zarr/" in href else "zarr"
    if "hdf5" in kind or href.endswith((".h5", ".hdf5")):
        return "treesatai"
    return "raster"


def _bands(modality: str, name: str, listed: list[str], level: str) -> tuple[str, ...]:
    """Band names in file order; without any, the sensor's usual ones, which the reader holds against the file."""
    if modality in ("label", INCIDENCE) or modality in MASKS:
        return ("",)
    spec, hr = MODALITIES[modality], MODALITIES[modality].kind == "colour"
    ours = spec.band if spec.collections or spec.aliases else lambda band: band_name(band, hr=hr)
    if listed and all(listed):
        return tuple(ours(band) for band in listed)
    if hr:
        return HR_BANDS[:3]
    single = ours(name)
    if single in spec.bands or single in S2_BANDS:
        return (single,)
    if modality == "s2" or modality == "s2_l1c":
        return L1C_ORDER if level == "L1C" else L2A_ORDER
    return spec.bands


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
