"""Major-TOM as published: `images/part_*.parquet`, one row per product, a GeoTIFF file as bytes in each band's column.

Cataloguing reads the footers, the columns `product_id` and `grid_cell`, and of each product one band of 60 m (50 kB of some 10 MB):
the other bands lie on its corner at their native sizes. Where that does not hold every band's header is read. A build reads one
row group, one column at a time. Sentinel-1 RTC columns (`vv`, `vh`) hold linear power.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import UsageError
from cluster.storage import join, list_names
from data_prep.geo import Grid
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.names import S2_BANDS, band_name, s1_datetime, s2_product
from data_prep.sources.parquet import open_parquet
from data_prep.sources.raster import open_cell, raster_grid
from data_prep.sources.records import SourceFault

NEEDED = ("product_id", "grid_cell")
NATIVE_M = {"B01": 60, "B09": 60, "B10": 60} | dict.fromkeys(
    ("B02", "B03", "B04", "B08", "cloud_mask"), 10
)  # the others: 20
NATIVE_M = {"B01": 60, "B09": 60, "B10": 60} | dict.fromkeys(
    ("B02", "B03", "B04", "B08", "cloud_mask"), 10
)  # the others: 20
NATIVE_M = {"B01": 60, "B09": 60, "B10": 60} | dict.fromkeys(
    ("B02", "B03", "B04", "B08", "cloud_mask"), 10
)  # the others: 20


def sites(url: str) -> list[tuple[str, ...]]:
    """(parquet URL, row group, row in it, cell, product) of every row. Raises UsageError if no such file is there."""
    files = [
        join(base, name)
        for base in (url, join(url, "images"))
        for name in list_names(base)
        if name.endswith(".parquet")
    ]
    found: list[tuple[str, ...]] = []
    for href in sorted(files):
        source = open_parquet(href)
        if not set(NEEDED) <= set(source.schema_arrow.names):
            continue
        for group in range(source.num_row_groups):
            rows = source.read_row_group(group, columns=list(NEEDED), use_threads=False).to_pylist()
            found += [
                (href, str(group), str(i), str(row["grid_cell"]), str(row["product_id"])) for i, row in enumerate(rows)
            ]
    if not found:
        raise UsageError(f"{url} holds no Major-TOM Parquet file (columns {', '.join(NEEDED)} and one per band)")
    return found


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One row as a STAC item. Raises SourceFault."""
    href, group, row, cell, product = site
    parsed = s2_product(product)
    assets: dict[str, AssetFields] = {}
    coarse = _coarse_grid(href, f"{group}:{row}", product)
    for column in open_parquet(href).schema_arrow.names:
        band = band_name(column)
        modality = (
            "cloud" if column == "cloud_mask" else "s1" if band in ("VV", "VH") else "s2" if band in S2_BANDS else ""
        )
        if not modality:
            continue
        member = f"{group}:{row}:{column}"
        if coarse is not None and modality != "s1":
            grid, kind = _refined(coarse, 60 // NATIVE_M.get(column if modality == "cloud" else band, 20)), ""
        else:
            with open_cell(href, member, f"{product}/{column}") as dataset:
                grid, kind = raster_grid(dataset, f"{product}/{column}"), dataset.dtypes[0]
        if modality == "s2" and parsed.get("level") == "L1C":
            modality = "s2_l1c"
        s2 = modality.startswith("s2")
        assets[column if modality == "cloud" else band] = AssetFields(
            modality, href, "application/vnd.apache.parquet", (band,) if modality != "cloud" else (), grid, format="parquet_raster",
            member=member, product_id=product, baseline=parsed.get("baseline", "") if s2 else "", data_type=kind,
            datetime=parsed.get("datetime") or s1_datetime(product), level=parsed.get("level", "") if s2 else "",
            scale=1e-4 if s2 else None, nodata=0.0 if s2 else None, unit="linear" if modality == "s1" else "",
            calibration="gamma0 RTC" if modality == "s1" else "",
        )  # fmt: skip
    if not any(fields.modality != "cloud" for fields in assets.values()):
        raise SourceFault(f"{cell}/{product}", f"row {row} of row group {group} holds no Sentinel band: {href}")
    ordered = dict(sorted(assets.items(), key=lambda entry: (entry[1].grid.gsd_m() if entry[1].grid else 0, entry[0])))
    return make_item(f"{cell}_{product}", ordered, site=cell, cell=cell)


def _coarse_grid(href: str, place: str, product: str) -> Grid | None:
    """The grid of a 60 m band; None where there is none of that size."""
    column = next((name for name in open_parquet(href).schema_arrow.names if NATIVE_M.get(band_name(name)) == 60), None)
    if column is None:
        return None
    with open_cell(href, f"{place}:{column}", f"{product}/{column}") as dataset:
        grid = raster_grid(dataset, f"{product}/{column}")
    return grid if abs(grid.gsd_m() - 60) < 1 else None


def _refined(grid: Grid, factor: int) -> Grid:
    a, b, c, d, e, f = grid.transform
    finer = (a / factor, b / factor, c, d / factor, e / factor, f)
    return Grid(grid.crs, finer, grid.width * factor, grid.height * factor)
