"""What a catalog says about one site, before any pixel is read. Plain data: cheap, hashable assets, JSON-able."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_prep.geo import Bounds, Grid, Transform
from data_prep.schema import MODALITIES

# Rasters that say where an image of the same item is clear: scene classification codes, Landsat's quality bits, non-zero = cloud,
# cloud probability in percent, and how clear a pixel is (0…1, Cloud Score+). Where an item has several, the first of these is read.
MASKS = ("scl", "qa_pixel", "cloud", "cloud_probability", "clear_score")
# a raster of the angle at which a radar image was taken, in the same item
INCIDENCE = "incidence"


def modality_roles() -> tuple[str, ...]:
    """Everything an asset can be."""
    return (*MODALITIES, *MASKS, INCIDENCE, "label")


class SourceFault(Exception):
    """Input of one site that cannot be used: which asset, and why. The build counts and quarantines it."""

    def __init__(self, asset: str, why: str) -> None:
        super().__init__(f"{asset}: {why}")
        self.asset = asset
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process pools
        return type(self), (self.asset, self.why)


class ReadFault(SourceFault):
    """Bytes that cannot be had or decoded: costs the date that they hold, where other faults cost the site."""


@dataclass(frozen=True)
class Asset:
    """One file (or cube) of one site as its metadata describes it; "" and None mean "not said".

    Attributes:
        id: `ITEM/ASSET`, names it in messages and in the audit.
        modality: one of `MODALITIES`; one of `MASKS` (a mask raster of the image of the same item); incidence; label.
        href: absolute fsspec URL.
        format: reader: raster, zarr, zarr_bands, treesatai, mesh, parquet_raster, copernicus, olmoearth, mmearth.
        bands: our band names in file order; a name we don't know stays as it is and is never read.
        datetime: ISO 8601 UTC; "" where the file carries its own dates.
        level: L2A or L1C (s2).
        baseline: processing baseline such as "05.09" (s2).
        scale, offset: reflectance = DN * scale + offset (s2), as `raster:bands` declares, of the first band.
        per_band: (scale, offset, nodata) per band where they differ; empty = all as the first.
        offset_removed: the provider says it has removed the baseline-04.00 offset already.
        unit: dB or linear (s1), as declared. calibration: sigma0 or gamma0 and the product kind (s1), as declared.
        relative_orbit: track of the acquisition, 0 = not known.
        incidence_deg: mean angle of the scene as declared (s1), 0 = not said.
        gsd_m: pixel size as declared, 0 = not said; of two files of one band the finer is read.
        member: array, dataset or byte range inside the file.
        note: what a reader of the data must know, e.g. that the position was assumed; goes to the decisions.
    """

    id: str
    modality: str
    href: str
    format: str = "raster"
    bands: tuple[str, ...] = ()
    datetime: str = ""
    product_id: str = ""
    level: str = "L2A"
    baseline: str = ""
    scale: float | None = None
    offset: float | None = None
    offset_removed: bool | None = None
    orbit: str = ""
    unit: str = ""
    calibration: str = ""
    nodata: float | None = None
    per_band: tuple[tuple[float | None, float | None, float | None], ...] = ()
    relative_orbit: int = 0
    incidence_deg: float = 0.0
    gsd_m: float = 0.0
    cloud_cover: float | None = None
    crs: str = ""
    transform: Transform | None = None
    shape: tuple[int, int] | None = None
    member: str = ""
    note: str = ""

    @property
    def grid(self) -> Grid | None:
        """The declared pixel grid, or None when the file must be asked."""
        if not self.crs or self.transform is None or self.shape is None:
            return None
        return Grid(self.crs, self.transform, self.shape[1], self.shape[0])

    def of_band(self, index: int) -> Asset:
        """The asset as it speaks of one of its bands (0-based): with that band's scale, offset and nodata."""
        if not self.per_band:
            return self
        scale, offset, nodata = self.per_band[index]
        return dataclasses.replace(self, scale=scale, offset=offset, nodata=nodata, per_band=())


@dataclass(frozen=True)
class SiteRecord:
    """One site: its assets and where it lies.

    Attributes:
        key: unique, no dots.
        cell: ground cell that decides the split.
        crs: CRS of `footprint` (`EPSG:n` or WKT).
        footprint: (xmin, ymin, xmax, ymax) on the ground that every modality is cut to.
        bbox_wgs84: west, south, east, north.
        datetimes: acquisition dates the catalog knows, ascending; cubes may hold more.
        product_ids: as the catalog knows them.
        scalars, classes: labels and class names (index = value).
    """

    key: str
    cell: str
    crs: str
    footprint: Bounds
    bbox_wgs84: Bounds
    assets: tuple[Asset, ...]
    datetimes: tuple[str, ...] = ()
    product_ids: tuple[str, ...] = ()
    scalars: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def of(self, *modalities: str) -> list[Asset]:
        """Assets of the named modalities, in catalog order."""
        return [asset for asset in self.assets if asset.modality in modalities]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which modalities the site has, in the schema's order."""
        return tuple(name for name in MODALITIES if self.of(name))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> SiteRecord:
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples again)."""
        values = {name: _tuples(value) if name not in ("scalars", "classes") else value for name, value in tree.items()}
        values["assets"] = tuple(Asset(**{k: _tuples(v) for k, v in dict(a).items()}) for a in tree["assets"])
        return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
