"""Major-TOM as published: `images/part_*.parquet`, one row per product, a GeoTIFF file as bytes in each band's column.

Only the footers and the columns `product_id`, `grid_cell` and headers of the bands are touched when cataloguing; a build reads
one row group, one column at a time. Sentinel-1 RTC columns (`vv`, `vh`) hold linear power.
"""

from __future__ import annotations

import functools
from typing import Any

import pyarrow
import pyarrow.parquet as pq
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from cluster.errors import UsageError
from cluster.storage import filesystem, is_local, join, list_names
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.names import S2_BANDS, band_name, s1_datetime, s2_product
from data_prep.sources.raster import first_line, raster_grid
from data_prep.sources.records import SourceFault

NEEDED = ("product_id", "grid_cell")


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
    for column in open_parquet(href).schema_arrow.names:
        band = band_name(column)
        modality = (
            "cloud" if column == "cloud_mask" else "s1" if band in ("VV", "VH") else "s2" if band in S2_BANDS else ""
        )
        if not modality:
            continue
        member = f"{group}:{row}:{column}"
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


@functools.lru_cache(maxsize=8)
def open_parquet(href: str) -> pq.ParquetFile:
    """Footer of a Parquet file on any fsspec URL. Raises SourceFault."""
    try:
        fs, path = filesystem(href)
        return pq.ParquetFile(path if is_local(href) else fs.open(path, "rb"), pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceFault(href, f"cannot be read as Parquet: {first_line(error)}") from None


def open_cell(href: str, member: str, name: str) -> Any:
    """The GeoTIFF in one cell ("row group:row:column") as a rasterio dataset. Raises SourceFault."""
    group, row, column = member.split(":", 2)
    try:
        table = open_parquet(href).read_row_group(int(group), columns=[column], use_threads=False)
        data = table.column(0)[int(row)].as_py()
        if not data:
            raise SourceFault(name, f"column {column} is empty in row {row} of row group {group}: {href}")
        memory = MemoryFile(data)
        dataset = memory.open()
        dataset.held = (data, memory)  # GDAL reads from these bytes for as long as the dataset lives
        return dataset
    except (RasterioError, OSError, pyarrow.ArrowException, IndexError, KeyError) as error:
        raise SourceFault(
            name, f"column {column}, row {row} of row group {group} is no raster: {href}: {first_line(error)}"
        ) from None
