"""The sample schema: what one site is, what a shard holds of it, which sensors exist.

Everything downstream (shards, reader, model, probes) knows sensors only through `MODALITIES`: adding a sensor is one
`ModalitySpec` here plus one source. Missing is a mask, never a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

SCHEMA_VERSION = 1

# Validity codes of a mask member (uint8). Only CLEAR pixels feed losses and statistics.
NODATA, CLEAR, CLOUD = 0, 1, 2

# What a stored number means to harmonisation and resampling:
#   colour       8-bit picture: copied, bilinear
#   reflectance  scale, offset and nodata removed, 0 = nodata, x 10000; bilinear
#   backscatter  dB, NaN = nodata; averaged as linear power
#   continuous   any other quantity (elevation, temperature): declared scale and offset applied, bilinear
Kind = Literal["colour", "reflectance", "backscatter", "continuous"]


@dataclass(frozen=True)
class ModalitySpec:
    """One sensor as the pipeline sees it after harmonisation.

    Attributes:
        name: short name, also the middle part of member names (`KEY.s2.b2nd`).
        bands: band names, in storage order.
        dtype: storage dtype after harmonisation.
        gsd_m: nominal ground sampling distance, metres per pixel.
        is_series: several dates per site ([T, C, H, W]) or one image (T = 1).
        unit: what a stored number means.
        shown: band names drawn as red, green, blue by contact sheets.
        shown_range: values mapped to black and white there.
        kind: how its numbers are harmonised and resampled.
        level: product level this modality holds ("L2A", "L1C"); "" where there is only one.
        has_boa_offset: its digital numbers may carry Sentinel-2's +1000, which pixels are asked about.
        is_default: read unless `source.modalities` says otherwise; the others only when named there.
        collections: words in a STAC item's collection, constellation or platform that mean this sensor, where its band names alone
            do not (others' names are then understood through `aliases`).
        aliases: others' band names, lower case, to ours.
    """

    name: str
    bands: tuple[str, ...]
    dtype: str
    gsd_m: float
    is_series: bool
    unit: str
    shown: tuple[str, str, str]
    shown_range: tuple[float, float]
    kind: Kind
    level: str = ""
    has_boa_offset: bool = False
    is_default: bool = True
    collections: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def band(self, name: str) -> str:
        """Our name of somebody's band; an unknown one stays as it is."""
        held = {band.lower(): band for band in self.bands}
        return self.aliases.get(name.lower()) or held.get(name.lower(), name)


MODALITIES: dict[str, ModalitySpec] = {
    "hr": ModalitySpec(
        "hr", ("R", "G", "B"), "uint8", 0.3, False, "digital number 0-255", ("R", "G", "B"), (0, 255), "colour",
    ),
    "s2": ModalitySpec(
        "s2", ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"), "uint16", 10.0, True,
        "surface reflectance x 10000, offset removed, 0 = nodata", ("B04", "B03", "B02"), (1, 3000), "reflectance",
        level="L2A", has_boa_offset=True,
    ),
    "s1": ModalitySpec(
        "s1", ("VV", "VH"), "float16", 10.0, True, "backscatter in dB, NaN = nodata", ("VV", "VH", "VV"), (-25, 0), "backscatter",
    ),
    # the same instrument above the atmosphere: never mixed with surface reflectance, and read only when asked for
    "s2_l1c": ModalitySpec(
        "s2_l1c", ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"), "uint16", 10.0, True,
        "top-of-atmosphere reflectance x 10000, offset removed, 0 = nodata", ("B04", "B03", "B02"), (1, 3000), "reflectance",
        level="L1C", has_boa_offset=True, is_default=False,
    ),
}  # fmt: skip


def default_modalities() -> tuple[str, ...]:
    """What is read where nothing is asked for by name."""
    return tuple(name for name, spec in MODALITIES.items() if spec.is_default)


@dataclass
class Series:
    """One modality of one site on its own pixel grid, harmonised.

    Attributes:
        pixels_TCHW: `ModalitySpec.dtype`; s2: 0 where nodata and >= 1 elsewhere; s1: NaN where nodata.
        mask_THW: uint8 validity codes (NODATA, CLEAR, CLOUD).
        datetimes: ISO 8601 UTC, one per date, ascending; an unknown date is "".
        transform: affine (a, b, c, d, e, f) from (column, row) of pixel corners to `SiteArrays.crs` coordinates.
        gsd_m: metres per pixel on the ground.
        product_ids: one per date, "" if unknown.
        orbits: "ascending" | "descending" | "" per date (s1).
        decisions: what harmonisation did and why, one dict per date (offset applied, baseline, scale, evidence, flags).
    """

    pixels_TCHW: np.ndarray
    mask_THW: np.ndarray
    datetimes: list[str]
    transform: tuple[float, float, float, float, float, float]
    gsd_m: float
    product_ids: list[str] = field(default_factory=list)
    orbits: list[str] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SiteArrays:
    """One site ready for a shard: the seam between sources (imagery → this) and shards (this → tar).

    Attributes:
        key: unique, no dots, e.g. `{cell}_{row}_{col}`.
        crs: WKT2 or `EPSG:n` of all transforms; some real files have a CRS with no EPSG code.
        bbox_wgs84: west, south, east, north in degrees.
        footprint: corners' bounds in `crs`: (xmin, ymin, xmax, ymax); every modality covers exactly this ground.
        series: present modalities only.
        cell: ground cell that decides the split (Major-TOM or MGRS style).
        scalars: scalar labels by name, e.g. `{"scene": 3}`.
        rasters: label rasters by name, int16 [H, W] on the 10 m grid of s2/s1 (or the footprint at 10 m), -1 = unlabelled.
        classes: class names per label, index = value.
        losses: what the catalog lists and the sample lacks ({"modality", "datetime", "asset", "why"}): files that could not be read,
            dates whose metadata and pixels contradict each other.
    """

    key: str
    crs: str
    bbox_wgs84: tuple[float, float, float, float]
    footprint: tuple[float, float, float, float]
    series: dict[str, Series]
    cell: str
    scalars: dict[str, int] = field(default_factory=dict)
    rasters: dict[str, np.ndarray] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    losses: list[dict[str, str]] = field(default_factory=list)


def band_indices(modality: str, bands: tuple[str, ...]) -> list[int]:
    """Positions of named bands in storage order. Raises KeyError naming the unknown band."""
    stored = MODALITIES[modality].bands
    unknown = [band for band in bands if band not in stored]
    if unknown:
        raise KeyError(f"{modality} has no band {unknown[0]}; it stores {', '.join(stored)}")
    return [stored.index(band) for band in bands]


@dataclass(frozen=True)
class BandStatistics:
    """Per-band statistics over CLEAR pixels, as stored in the manifest; mergeable before finalising.

    mean, std, percentiles have one entry per band in `MODALITIES[...]` order; percentiles at 1, 2, 50, 98, 99 %.
    """

    count: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    percentiles: tuple[tuple[float, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
