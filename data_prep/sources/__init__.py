"""Imagery people already have → harmonised sites.

`open_catalog(url)` lists sites, `split_site(record, grid)` cuts large ones, `read_site(record, grid)` reads one.
Layouts other than STAC become STAC items first (`data_prep.catalog`), so there is one way from metadata to pixels. The way, in the
order to read it:

    what is there      records (plain data), names, stac_io, stac → choose (which file of a band), sites; a module per layout
    how bytes come     remote (doors, retries), guard (what a file may claim), open → raster, zarr_cube, zarr_bands, mesh, …
    what they mean     evidence, decisions (with `data_prep.harmonise`), masks, frames → overpass → read
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import UsageError
from data_prep.sources.records import Asset, ReadFault, SiteRecord, SourceFault

if TYPE_CHECKING:
    from data_prep.config import GridConfig, QualityConfig
    from data_prep.schema import SiteArrays


def open_catalog(url: str, faults: list[SourceFault] | None = None) -> list[SiteRecord]:
    """Sites of a STAC catalog (stac-geoparquet file, item JSON, or a folder of items), in catalog order.

    Args:
        faults: sites that cannot be placed are put here instead of raising (a build counts them).

    Raises:
        UsageError: no such catalog, no items, an id or site key that stands twice.
        SourceFault: an unusable site, unless `faults` is given.
    """
    from data_prep.sources.sites import group_items, site_record
    from data_prep.sources.stac_io import read_items, unique_ids

    records = []
    items = unique_ids(read_items(url))
    if not items:
        raise UsageError(f"{url} holds no STAC items")
    for key, members in group_items(items):
        try:
            records.append(site_record(key, members))
        except SourceFault as fault:
            if faults is None:
                raise
            faults.append(fault)
    return records


def split_site(record: SiteRecord, grid: GridConfig) -> list[SiteRecord]:
    """The site cut as `grid.side_m` and `grid.tile` ask; see `sites.split_site`."""
    from data_prep.sources.sites import split_site as split

    return split(record, grid)


def read_site(
    record: SiteRecord, grid: GridConfig, quality: QualityConfig | None = None, modalities: tuple[str, ...] = ()
) -> SiteArrays:
    """One site's harmonised pixels; see `read.read_site`."""
    from data_prep.sources.read import read_site as read

    return read(record, grid, quality, modalities)


__all__ = ["Asset", "ReadFault", "SiteRecord", "SourceFault", "open_catalog", "read_site", "split_site"]
