"""Major-TOM folders: `<row>/<cell>/<product>/<band>.tif`, e.g. `0U/0U_199R/S2A_MSIL2A_…_N0400_…/B02.tif`, with `cloud_mask.tif`.

The baseline stands in the product name; files carry the numbers of the product as they are (offset in, from 04.00 on). The bands
have their native sizes (10, 20, 60 m) on one corner. `cloud_mask`: 0 clear, anything else cloud or shadow. All products of a
cell form one site, the cell decides the split. The published Parquet files are read by `majortom_parquet`.
"""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import UsageError
from cluster.storage import exists, filesystem, is_local
from data_prep.sources import majortom_parquet
from data_prep.sources.items import AssetFields, make_item, raster_fields
from data_prep.sources.names import S2_BANDS, band_name, s1_datetime, s2_product
from data_prep.sources.records import SourceFault

_PATH = re.compile(r"(\d+[UD]_\d+[LR])/([^/]+)/([^/]+)\.tif$")


def sites(url: str) -> list[tuple[str, ...]]:
    """(cell, product, folder URL, file names …), sorted. Raises UsageError if no cell is there."""
    if not exists(url):
        raise UsageError(f"{url} does not exist")
    fs, path = filesystem(url)
    products: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(fs.find(path)):
        if match := _PATH.search(name):
            folder = name.rsplit("/", 1)[0]
            folder = folder if is_local(url) else fs.unstrip_protocol(folder)
            products.setdefault((match[1], match[2], folder), []).append(match[3])
    if not products and any(name.endswith(".parquet") for name in fs.find(path)):
        return [("parquet", *entry) for entry in majortom_parquet.sites(url)]
    if not products:
        raise UsageError(
            f"{url} is no majortom folder: wanted <row>/<cell>/<product>/<band>.tif, e.g. 0U/0U_199R/S2A_…/B02.tif"
        )
    return [(*key, *files) for key, files in sorted(products.items())]


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One product of one cell as a STAC item. Raises SourceFault."""
    if site[0] == "parquet":
        return majortom_parquet.item(url, site[1:])
    cell, product, folder, *files = site
    parsed = s2_product(product)
    assets: dict[str, AssetFields] = {}
    for name in files:
        href, band = f"{folder}/{name}.tif", band_name(name)
        if name == "cloud_mask":
            fields = raster_fields(href, f"{product}/{name}")
            assets[name] = AssetFields("cloud", href, grid=fields.grid, data_type=fields.data_type)
        elif band in S2_BANDS and parsed:
            fields = raster_fields(href, f"{product}/{name}")
            assets[band] = AssetFields(
                "s2" if parsed["level"] == "L2A" else "s2_l1c", href, bands=(band,), grid=fields.grid, product_id=product,
                datetime=parsed["datetime"], baseline=parsed["baseline"], level=parsed["level"], scale=1e-4, nodata=0.0,
                data_type=fields.data_type,
            )  # fmt: skip
        elif band in ("VV", "VH"):
            fields = raster_fields(href, f"{product}/{name}")
            assets[band] = AssetFields(
                "s1", href, bands=(band,), grid=fields.grid, product_id=product, datetime=s1_datetime(product),
                data_type=fields.data_type, nodata=fields.nodata, calibration="gamma0 RTC",
            )  # fmt: skip
    if not any(fields.modality != "cloud" for fields in assets.values()):
        raise SourceFault(f"{cell}/{product}", f"holds no Sentinel band: {', '.join(files)}")
    ordered = dict(sorted(assets.items(), key=lambda entry: (entry[1].grid.gsd_m() if entry[1].grid else 0, entry[0])))
    return make_item(f"{cell}_{product}", ordered, site=cell, cell=cell)
