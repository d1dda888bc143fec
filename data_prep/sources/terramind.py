"""TerraMind / TerraMesh example folders: `<MODALITY>/<row>_<column>_<i>_<j>.tif`, all modalities of a key on one 10 m UTM grid.

Read: S2L2A (12 bands), S1RTC, or S1GRD where there is no S1RTC (dB), LULC (label `lulc`). S2L1C (13 bands) rides along for the audit only. S2RGB, DEM and
NDVI are not read: they are derived from, or no part of, our sensors. The Sentinel-2 files carry no date and no processing
baseline: the date comes from the tags of S2RGB, NDVI or LULC (same acquisition), and the layout declares offset-free values.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import UsageError
from cluster.storage import join, list_names
from data_prep.sources import mesh
from data_prep.sources.items import AssetFields, make_item, raster_fields
from data_prep.sources.names import L1C_ORDER, L2A_ORDER, iso_datetime
from data_prep.sources.records import SourceFault

FOLDERS = ("S2L2A", "S2L1C", "S1RTC", "S1GRD", "LULC")
DATED_AS_S2 = ("S2RGB", "NDVI", "LULC")
# Class names of TerraMesh land cover (Esri's ten classes renumbered); 0 is "no data" and becomes unlabelled.
LULC_CLASSES = (
    "no data", "water", "trees", "flooded vegetation", "crops", "built area", "bare ground", "snow/ice", "clouds", "rangeland",
)  # fmt: skip


def sites(url: str) -> list[tuple[str, ...]]:
    """(stem, folders that hold it, …), sorted by stem. Raises UsageError if no folder of the layout is there.

    TerraMesh as published (tars of `.zarr.zip`) is handed to `mesh`.
    """
    if mesh.holds_mesh(url):
        return [("mesh", *entry) for entry in mesh.sites(url)]
    names = list_names(url)
    present = [folder for folder in FOLDERS if folder in names]
    if not set(present) & {"S2L2A", "S1RTC", "S1GRD"}:
        raise UsageError(f"{url} is no terramind folder: it holds neither S2L2A nor S1RTC nor S1GRD ({_some(names)})")
    held: dict[str, list[str]] = {}
    for folder in [*present, *(name for name in DATED_AS_S2 if name in names and name not in present)]:
        for name in list_names(join(url, folder)):
            if name.endswith(".tif"):
                held.setdefault(name.removesuffix(".tif"), []).append(folder)
    return [(stem, *folders) for stem, folders in sorted(held.items()) if set(folders) & set(FOLDERS[:4])]


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One STAC item per key. Raises SourceFault when no file of it can be read."""
    if site[0] == "mesh":
        return mesh.item(url, site[1:])
    stem, *folders = site
    moment = _s2_date(url, stem, folders)
    assets: dict[str, AssetFields] = {}
    faults: list[SourceFault] = []
    for folder in folders:
        if folder not in FOLDERS or (folder == "S1GRD" and "S1RTC" in folders):
            continue
        href = join(url, folder, f"{stem}.tif")
        try:
            name, fields = _asset(folder, href, f"{stem}/{folder}", moment)
        except SourceFault as fault:
            faults.append(fault)
            continue
        assets[name] = fields
    if not assets:
        raise faults[0]
    for unread in faults:  # stays in the catalog without a grid, so that the build meets and counts it
        folder = unread.asset.rsplit("/", 1)[1]
        modality = {"S2L2A": "s2", "S2L1C": "s2_l1c", "LULC": "label"}.get(folder, "s1")
        assets["lulc" if folder == "LULC" else folder] = AssetFields(modality, join(url, folder, f"{stem}.tif"))
    has_label = "lulc" in assets
    return make_item(
        stem, assets, cell="_".join(stem.split("_")[:2]), classes={"lulc": LULC_CLASSES} if has_label else None,
        extra={"geoloom:faults": [str(fault) for fault in faults]} if faults else None,
    )  # fmt: skip


def _asset(folder: str, href: str, name: str, moment: str) -> tuple[str, AssetFields]:
    fields = raster_fields(href, name)
    grid, kind = fields.grid, fields.data_type
    if folder in ("S2L2A", "S2L1C"):
        modality, bands = ("s2", L2A_ORDER) if folder == "S2L2A" else ("s2_l1c", L1C_ORDER)
        return folder, AssetFields(
            modality, href, bands=bands, grid=grid, datetime=moment, level=folder[2:], scale=1e-4, offset=0.0, nodata=0.0,
            data_type=kind,
        )  # fmt: skip
    if folder == "LULC":
        return "lulc", AssetFields("label", href, grid=grid, nodata=0.0, data_type=kind)
    own = iso_datetime(fields.tags.get("datetime", ""))
    note = "gamma0 RTC" if folder == "S1RTC" else "sigma0 GRD"
    return folder, AssetFields(
        "s1", href, bands=("VV", "VH"), grid=grid, datetime=own, unit="dB", data_type=kind, calibration=note
    )


def _s2_date(url: str, stem: str, folders: list[str]) -> str:
    for folder in DATED_AS_S2:
        if folder in folders:
            try:
                tags = raster_fields(join(url, folder, f"{stem}.tif"), f"{stem}/{folder}").tags
            except SourceFault:
                continue
            if moment := iso_datetime(tags.get("datetime", "")):
                return moment
    return ""


def _some(names: list[str]) -> str:
    return (
        f"found {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "it is empty or does not exist"
    )
