"""A plain folder of GeoTIFFs, any depth: what a file is follows from its name, band count and number type.

    one file per band     `NAME_B02.tif`, `NAME_VV.tif`, or `NAME/B02.tif`: bands of one image NAME
    one file, all bands   uint8 with 3 or 4 bands and pixels up to 5 m → hr (R G B N); 10, 12 or 13 bands of whole numbers → s2; 2 bands of
                          decimals → s1 (VV VH). Band descriptions in the file win.
    labels                `NAME_label.tif`, `…_labels`, `…_landcover`, `…_lulc`, `…_reference_map`, or below such a folder
    FLAIR                 `IMG_012345.tif` of five bytes a pixel (red, green, blue, near infrared, height, which is no colour and is
                          left) → hr, with `MSK_012345.tif` as its label `landcover`, whatever the folders

The same NAME in several folders (`hr/a.tif`, `s2/a.tif`) is one site. BigEarthNet patches of one place and MGRS tile
(`…_T33UUP_75_43`, `…_33UUP_75_43`) are one site too. Dates and baselines are read from product names (`S2A_MSIL2A_…`,
`S1A_IW_GRDH_…`) or from a date in the name or the file's tags; without a baseline the pixels decide about the offset. The level is
that of the product or granule name (`…_MSI_L1C_…`), for all its bands; without one an image with B10 is L1C, one without it L2A.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import UsageError
from cluster.storage import exists, filesystem, is_local
from data_prep.schema import MODALITIES
from data_prep.sources.items import AssetFields, RasterFields, make_item, raster_fields
from data_prep.sources.names import (
    HR_BANDS,
    L1C_ORDER,
    L2A_ORDER,
    S2_BANDS,
    band_name,
    date_in,
    iso_datetime,
    s1_datetime,
    s2_level,
    s2_product,
)
from data_prep.sources.records import SourceFault

_BAND = re.compile(r"^(?:(.*)[_-])?(B\d{1,2}A?|VV|VH)$", re.IGNORECASE)
_LABEL = re.compile(r"^(?:(.*)[_-])?(labels?|landcover|lulc|reference_map)$", re.IGNORECASE)
_FLAIR = re.compile(r"^(IMG|MSK)_(\d+)$")
FLAIR_BANDS = ("R", "G", "B", "N", "height")
HR_GSD_M = 5.0  # coarser colour images are previews of something else
_LABEL_FOLDERS = ("label", "labels", "landcover", "lulc")
_PATCH = re.compile(r"_T?(\d{2}[A-Z]{3}_\d+_\d+)$")


def sites(url: str) -> list[tuple[str, ...]]:
    """(image name, kind, files …) per image or label, sorted; kind = "bands", "label NAME" or "image"."""
    if not exists(url):
        raise UsageError(f"{url} does not exist")
    fs, path = filesystem(url)
    files = [name for name in sorted(fs.find(path)) if name.lower().endswith((".tif", ".tiff"))]
    if not files:
        raise UsageError(
            f"{url} holds no GeoTIFF (*.tif, *.tiff); images or arrays without georeference: --layout patches"
        )
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in files:
        relative = name[len(path.rstrip("/")) :].strip("/")
        folder, _, file = relative.rpartition("/")
        stem, parent = file.rsplit(".", 1)[0], folder.rpartition("/")[2]
        href = name if is_local(url) else fs.unstrip_protocol(name)
        if match := _FLAIR.match(stem):
            kind = "image" if match[1] == "IMG" else "label landcover"
            groups.setdefault((folder, f"flair_{match[2]}", kind), []).append(href)
        elif match := _BAND.match(stem):
            groups.setdefault((folder, match[1] or parent or "image", "bands"), []).append(href)
        elif match := _LABEL.match(stem):
            groups.setdefault((folder, match[1] or parent, f"label {match[2].lower()}"), []).append(href)
        elif parent.lower() in _LABEL_FOLDERS:
            groups.setdefault((folder, stem, f"label {parent.lower()}"), []).append(href)
        else:
            groups.setdefault((folder, stem, "image"), []).append(href)
    return [(folder, image, kind, *hrefs) for (folder, image, kind), hrefs in sorted(groups.items())]


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One image (or label) as a STAC item. Raises SourceFault when the sensor cannot be told."""
    folder, image, kind, *hrefs = site
    parent = folder.rpartition("/")[2]
    parts = (parent if parent != image else "", image, kind.split()[1] if kind.startswith("label") else "")
    item_id = re.sub(r"[^A-Za-z0-9_-]+", "_", "_".join(filter(None, parts)))
    match = _PATCH.search(image)
    name = match[1] if match else image
    if kind.startswith("label"):
        fields = raster_fields(hrefs[0], item_id)
        label = AssetFields("label", hrefs[0], grid=fields.grid, nodata=fields.nodata, data_type=fields.data_type)
        return make_item(item_id, {kind.split()[1]: label}, site=name)
    if kind == "bands":
        level = s2_level(image) or ("L1C" if any(_band_of(href) == "B10" for href in hrefs) else "L2A")
        return make_item(item_id, dict(_band_asset(href, image, item_id, level) for href in hrefs), site=name)
    fields = raster_fields(hrefs[0], item_id)
    return make_item(item_id, {"image": _image_asset(hrefs[0], image, item_id, fields)}, site=name)


def _band_of(href: str) -> str:
    stem = href.rpartition("/")[2].rsplit(".", 1)[0]
    match = _BAND.match(stem)
    return band_name(match[2] if match else stem)


def _band_asset(href: str, image: str, item_id: str, level: str) -> tuple[str, AssetFields]:
    band = _band_of(href)
    fields = raster_fields(href, f"{item_id}/{band}")
    if fields.count != 1:
        raise SourceFault(f"{item_id}/{band}", f"is named as one band but holds {fields.count}: {href}")
    modality = "s1" if band in ("VV", "VH") else "s2"
    return band, _fields(modality, (band,), href, image, fields, level)


def _image_asset(href: str, image: str, item_id: str, fields: RasterFields) -> AssetFields:
    named = [band_name(text) for text in fields.descriptions if text]
    integer = fields.data_type in ("uint16", "int16", "uint32", "int32")
    if len(named) == fields.count and set(MODALITIES["s2"].bands) <= set(named):
        return _fields("s2", tuple(named), href, image, fields)
    if len(named) == fields.count and {"VV", "VH"} <= set(named):
        return _fields("s1", tuple(named), href, image, fields)
    if fields.data_type == "uint8" and fields.count in (3, 4) and fields.grid.gsd_m() <= HR_GSD_M:
        return _fields("hr", HR_BANDS[: fields.count], href, image, fields)
    if fields.data_type == "uint8" and fields.count == len(FLAIR_BANDS) and image.startswith("flair_"):
        return _fields("hr", FLAIR_BANDS, href, image, fields)
    by_count = {10: MODALITIES["s2"].bands, 12: L2A_ORDER, 13: L1C_ORDER}
    if integer and fields.count in by_count:
        return _fields("s2", by_count[fields.count], href, image, fields)
    if fields.count == 2 and fields.data_type.startswith("float"):
        return _fields("s1", ("VV", "VH"), href, image, fields)
    raise SourceFault(
        item_id, f"{fields.count} bands of {fields.data_type} are no sensor we know; describe it in a STAC item (geoloom:modality): {href}"
    )  # fmt: skip


def _fields(
    modality: str, bands: tuple[str, ...], href: str, image: str, raster: RasterFields, level: str = ""
) -> AssetFields:
    product = s2_product(image)
    tagged = raster.tags.get("datetime", "") or raster.tags.get("TIFFTAG_DATETIME", "").replace(":", "-", 2)
    moment = product.get("datetime") or s1_datetime(image) or date_in(image) or iso_datetime(tagged)
    s2 = modality == "s2"
    whole = "L1C" if set(bands) >= {"B10"} and set(bands) <= set(S2_BANDS) else "L2A"
    level = product.get("level") or level or s2_level(image) or whole
    return AssetFields(
        "s2_l1c" if s2 and level == "L1C" else modality, href, bands=bands, grid=raster.grid, datetime=moment,
        product_id=image if product or s1_datetime(image) else "", baseline=product.get("baseline", "") if s2 else "",
        level=level if s2 else "", nodata=raster.nodata, data_type=raster.data_type, scale=1e-4 if s2 else None,
    )  # fmt: skip
