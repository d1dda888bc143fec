"""SSL4EO-S12: `s2a|s2c|s1/<location>/<product>/<band>.tif` with `metadata.json` beside the bands, EPSG:4326, native band sizes.

s2a is L2A, s2c L1C (audited only), s1 GRD in dB. One STAC item per product; the items of one location form one site. Baseline,
product id, cloud cover and orbit come from `metadata.json`. Version 1.1 (`.zarr.zip`) is read by `mesh`.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import UsageError
from cluster.storage import join, list_names, read_bytes
from data_prep.sources import mesh
from data_prep.sources.items import AssetFields, make_item, raster_fields
from data_prep.sources.names import band_name, compact_datetime, s1_datetime, s2_product
from data_prep.sources.records import SourceFault

FOLDERS = {"s2a": "s2", "s2c": "s2_l1c", "s1": "s1"}


def sites(url: str) -> list[tuple[str, ...]]:
    """(folder, location, product), sorted by location. Raises UsageError if no folder of the layout is there."""
    if mesh.holds_mesh(url):
        return [("mesh", *entry) for entry in mesh.sites(url)]
    present = [folder for folder in FOLDERS if folder in list_names(url)]
    found = [
        (folder, location, product)
        for folder in present
        for location in list_names(join(url, folder))
        for product in list_names(join(url, folder, location))
    ]
    if not found:
        raise UsageError(
            f"{url} is no ssl4eo folder: wanted s2a, s2c or s1 with <location>/<product>/<band>.tif inside"
        )
    return sorted(found, key=lambda entry: (entry[1], entry[0], entry[2]))


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One product of one location as a STAC item. Raises SourceFault."""
    if site[0] == "mesh":
        return mesh.item(url, site[1:])
    folder, location, product = site
    base, modality = join(url, folder, location, product), FOLDERS[folder]
    files = [name for name in list_names(base) if name.endswith(".tif")]
    if not files:
        raise SourceFault(f"{location}/{product}", f"holds no band files: {base}")
    about = _metadata(base, location)
    common = _s1_fields(product, about) if modality == "s1" else _s2_fields(product, about)
    assets = {}
    for name in files:
        band = band_name(name.removesuffix(".tif"))
        fields = raster_fields(join(base, name), f"{location}/{product}/{band}")
        assets[band] = AssetFields(
            modality, join(base, name), bands=(band,), grid=fields.grid, data_type=fields.data_type, **common
        )
    return make_item(f"{folder}_{location}_{product}", assets, site=location)


def _metadata(base: str, location: str) -> dict[str, Any]:
    try:
        return json.loads(read_bytes(join(base, "metadata.json")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SourceFault(location, f"{base}/metadata.json is not valid JSON: {error}") from None


def _s1_fields(product: str, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "datetime": s1_datetime(product),
        "product_id": product,
        "orbit": str(about.get("orbitProperties_pass", "")).lower(),
        "unit": "dB",
        "calibration": "sigma0 GRD",
    }


def _s2_fields(product: str, about: dict[str, Any]) -> dict[str, Any]:
    name = str(about.get("PRODUCT_ID") or product)
    parsed = s2_product(name)
    return {
        "datetime": parsed.get("datetime") or compact_datetime(product.split("_")[0]),
        "product_id": name,
        "baseline": str(about.get("PROCESSING_BASELINE") or parsed.get("baseline") or ""),
        "level": parsed.get("level", ""),
        "cloud_cover": about.get("CLOUDY_PIXEL_PERCENTAGE"),
        "scale": 1e-4,
        "nodata": 0.0,
    }
