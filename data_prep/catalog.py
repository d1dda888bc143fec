"""`data_prep catalog`: layouts people already have → one stac-geoparquet file that appears whole or not at all."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import RunFailure, UsageError
from cluster.progress import progress
from cluster.storage import exists, is_local, list_names, local_path, upload
from data_prep.schema import MODALITIES
from data_prep.sources.records import SourceFault

if TYPE_CHECKING:
    from data_prep.sources.patches import Declaration

# Each module has sites(url) -> list of tuples (cheap listing; UsageError for the wrong layout) and item(url, site) -> STAC item.
LAYOUTS = {
    "terramind": "data_prep.sources.terramind",
    "treesatai": "data_prep.sources.treesatai",
    "ssl4eo": "data_prep.sources.ssl4eo",
    "majortom": "data_prep.sources.majortom",
    "copernicus": "data_prep.sources.copernicus",
    "olmoearth": "data_prep.sources.olmoearth",
    "mmearth": "data_prep.sources.mmearth",
    "geotiff": "data_prep.sources.geotiff",
    "patches": "data_prep.sources.patches",
}
THREADS = 4


@dataclass
class Scan:
    """Items of a layout, and what could not be used."""

    items: list[dict[str, Any]] = field(default_factory=list)
    faults: list[SourceFault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scan(url: str, layout: str, declared: Declaration | None = None) -> Scan:
    """STAC items of a folder in the named layout, or of an existing STAC catalog (`stac`), in a stable order.

    declared: what patches cannot say of themselves (layout `patches`, see `data_prep.sources.patches`).

    Raises:
        UsageError: nothing there, or another layout.
        RunFailure: a container that cannot be listed.
    """
    if layout == "stac":
        from data_prep.sources.stac_io import read_items, unique_ids

        return Scan(unique_ids(read_items(url, whole=True)))
    if not exists(url):
        raise UsageError(f"{url} does not exist")
    url = absolute_url(url)
    module = _layout(url, layout, declared)
    try:
        sites: list[tuple[str, ...]] = module.sites(url)
    except SourceFault as fault:  # a damaged tar or Parquet footer: what it holds cannot even be listed
        raise RunFailure(f"{layout}: {fault}") from None
    out = Scan()
    with ThreadPoolExecutor(THREADS) as pool, progress(len(sites), "cataloguing") as bar:
        for result in pool.map(functools.partial(_item, module.item, url), sites):
            if isinstance(result, SourceFault):
                out.faults.append(result)
            else:
                out.items.append(result)
                out.warnings += result["properties"].pop("geoloom:faults", [])
            bar.advance()
    _drop_lone_labels(out)
    if layout == "patches":
        out.notes += module.notes()
    return out


def _layout(url: str, layout: str, declared: Declaration | None) -> Any:
    """What has `sites` and `item` for a layout."""
    if layout != "patches":
        return importlib.import_module(LAYOUTS[layout])
    from data_prep.sources.patches import Patches

    if declared is None:
        raise UsageError(
            f"{url}: patches say nothing of themselves; python -m data_prep catalog --layout patches declares it (--help)"
        )
    return Patches(declared)


def _drop_lone_labels(found: Scan) -> None:
    """Labels and masks without any image at their place cannot become a site; they are left out and said so."""
    sites = {
        _site(item) for item in found.items if any(a["geoloom:modality"] in MODALITIES for a in item["assets"].values())
    }
    lone = [item for item in found.items if _site(item) not in sites]
    found.items = [item for item in found.items if _site(item) in sites]
    found.notes += [f"{item['id']} has labels or masks, but no image of its site {_site(item)}" for item in lone]


def _site(item: dict[str, Any]) -> str:
    return str(item["properties"]["geoloom:site"])


def _item(make: Callable[..., dict[str, Any]], url: str, site: tuple[str, ...]) -> dict[str, Any] | SourceFault:
    try:
        return make(url, site)
    except SourceFault as fault:
        return fault


def absolute_url(url: str) -> str:
    """Local paths absolute: a catalog is opened from other folders."""
    return os.path.abspath(local_path(url)) if is_local(url) else url.rstrip("/")


def detect_layout(url: str) -> str:
    """The layout of a folder, judged by its names. Raises UsageError naming the choices."""
    if url.endswith((".parquet", ".geoparquet", ".json", ".geojson")):
        return "stac"
    if not exists(url):
        raise UsageError(f"{url} does not exist")
    from data_prep.sources.mesh import holds_mesh

    names = set(list_names(url))
    if names & {"S2L2A", "S1RTC", "S1GRD", "S2L1C"} or holds_mesh(url):
        return "terramind"
    if names & {"s2a", "s2c"} or {"s1", "s2"} <= names:
        return "ssl4eo"
    if any(name.startswith("example-") and name.endswith(".tar") for name in names):
        return "copernicus"
    if any(name.endswith((".h5", ".hdf5")) for name in names):
        from data_prep.sources.mmearth import holds_tiles
        from data_prep.sources.olmoearth import holds_samples
        from data_prep.sources.treesatai import refuse_other_hdf5

        if holds_samples(url):
            return "olmoearth"
        if holds_tiles(url):
            return "mmearth"
        refuse_other_hdf5(url)  # every archive of patches ends in .h5: what is inside decides
        return "treesatai"
    for layout in ("majortom", "stac", "geotiff"):
        try:
            if layout == "stac":
                from data_prep.sources.stac_io import read_items

                next(iter(read_items(url)))
            else:
                importlib.import_module(LAYOUTS[layout]).sites(url)
        except UsageError:
            continue
        return layout
    named = "|".join(("stac", *(name for name in LAYOUTS if name != "patches")))
    raise UsageError(
        f"{url}: no layout recognised; name it with --layout {named}; images or arrays without georeference become a catalog by "
        "python -m data_prep catalog SRC OUT.parquet --layout patches"
    )


def make_catalog(source: str, out: str, layout: str, max_faults: int = 0, declared: Declaration | None = None) -> Scan:
    """Scans `source` and writes `out`. Nothing is written when more than `max_faults` sites cannot be used.

    Raises:
        UsageError: `out` is no .parquet name, nothing to catalog.
        RunFailure: too many faults, all named on the way.
    """
    if not out.endswith((".parquet", ".geoparquet")):
        raise UsageError(f"OUT must end in .parquet, found {out}")
    found = scan(source, layout, declared)
    if len(found.faults) > max_faults:
        listed = "; ".join(str(fault) for fault in found.faults[:3])
        more = f"; and {len(found.faults) - 3} more" if len(found.faults) > 3 else ""
        raise RunFailure(
            f"{len(found.faults)} of {len(found.faults) + len(found.items)} sites cannot be used: {listed}{more} (--max-faults {max_faults})"
        )
    if not found.items:
        raise UsageError(f"{source} holds no {layout} site")
    write_items(found.items, out)
    return found


def write_items(items: Sequence[dict[str, Any]], url: str) -> None:
    """Writes STAC items as stac-geoparquet (GeoParquet 1.1), in the order given; `url` appears whole or not at all."""
    import pyarrow.fs  # noqa: F401  (stac_geoparquet uses it without importing it)
    import stac_geoparquet.arrow

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "catalog.parquet")
        batches = stac_geoparquet.arrow.parse_stac_items_to_arrow(list(items))
        stac_geoparquet.arrow.to_parquet(batches, path, compression="zstd")
        upload(path, url)
