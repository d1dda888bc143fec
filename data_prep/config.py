"""The configuration of a shard build: one frozen tree, no heavy imports. See `cluster.config.load`."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Literal

from data_prep.schema import MODALITIES

CODECS = ("b2nd-lz4", "b2nd-zstd", "npy", "zarr.zip")
SPLITS = ("train", "val", "probe")  # also the order of shards and rows in a set


@dataclass(frozen=True)
class SourceConfig:
    """catalog: URLs of STAC catalogs (stac-geoparquet files or folders of items), built into one set.

    modalities: only these are read; empty = all but s2_l1c, which must be asked for. bbox: west, south, east, north in degrees; sites outside are left out.
    skip: text file of site keys, one per line, that shards are made without; the plan stays as it is. `remove` takes sites out of
    shards that are made already.
    """

    catalog: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = None
    skip: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.modalities if name not in MODALITIES]
        if unknown:
            raise ValueError(f"modalities: {unknown[0]!r} is not one of {', '.join(MODALITIES)}")


@dataclass(frozen=True)
class OutputConfig:
    """url: folder of the shard set, any fsspec URL. scratch: local folder for shards on their way to object storage."""

    url: str = ""
    scratch: str | None = None


@dataclass(frozen=True)
class GridConfig:
    """The ground and pixel grid of every sample.

    Attributes:
        side_m: side of a square site in metres; None keeps the extent the source has.
        tile: cut a footprint larger than `side_m` into a grid of `side_m` sites (else: one centred site).
        hr_gsd_m: metres per hr pixel; None keeps the source's.
        series_gsd_m: metres per s2/s1 pixel (and of label rasters); None keeps the source's.
        max_dates: at most this many dates per series, evenly spread; None keeps all.
        min_clear: a series date with a smaller share of CLEAR pixels is dropped.
    """

    side_m: float | None = None
    tile: bool = False
    hr_gsd_m: float | None = None
    series_gsd_m: float | None = 10.0
    max_dates: int | None = None
    min_clear: float = 0.0

    def __post_init__(self) -> None:
        for name in ("side_m", "hr_gsd_m", "series_gsd_m", "max_dates"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        if self.tile and self.side_m is None:
            raise ValueError("tile needs side_m: the side of a site in metres")
        if not 0 <= self.min_clear <= 1:
            raise ValueError(f"min_clear is a share between 0 and 1, found {self.min_clear}")


@dataclass(frozen=True)
class QualityConfig:
    """Which dates are good enough, and what a cloud is.

    Attributes:
        on_contradiction: a date whose metadata and pixels disagree (an offset declared and not in the pixels, a scale that makes
            no reflectance, backscatter of two calibrations in one series): "drop" the date, named and counted; "fail" the site;
            or "correct" it as the pixels say, with the decision in the index (a date they cannot judge is dropped).
        min_dates: a series with fewer dates that can be read and used is left out of its site; the site keeps the rest.
        cloud_probability: percent from which a cloud probability is a cloud.
        clear_score: below this, a Cloud Score+ pixel is a cloud.
        cloud_dilate_px: cloud masks are grown by this many of their own pixels.
    """

    on_contradiction: Literal["drop", "fail", "correct"] = "drop"
    min_dates: int = 1
    cloud_probability: float = 50.0
    clear_score: float = 0.6
    cloud_dilate_px: int = 0

    def __post_init__(self) -> None:
        if self.min_dates < 1 or self.cloud_dilate_px < 0:
            raise ValueError("min_dates must be 1 or more and cloud_dilate_px 0 or more")
        if not 0 < self.cloud_probability <= 100:
            raise ValueError(f"cloud_probability is a percentage above 0, found {self.cloud_probability}")
        if not 0 <= self.clear_score <= 1:
            raise ValueError(f"clear_score lies between 0 and 1, found {self.clear_score}")


@dataclass(frozen=True)
class SplitConfig:
    """Train/val/probe by place: a ground cell's hash decides, so a cell never straddles two splits.

    Attributes:
        fractions: share of cells per split; they sum to 1.
        buffer_m: a train site nearer than this to a val or probe site (a val site to a probe site) is left out.
        cell_m: side of the hashed ground cell; None takes the cell named by the catalog (Major-TOM, MGRS) where there is one.
        seed: another seed draws other cells.
        min_cells: with fewer ground cells than this nothing is held out, all is train (and the build says so).
    """

    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.9, "val": 0.05, "probe": 0.05})
    buffer_m: float = 0.0
    cell_m: float | None = None
    seed: int = 0
    min_cells: int = 10

    def __post_init__(self) -> None:
        unknown = [name for name in self.fractions if name not in SPLITS]
        if unknown:
            raise ValueError(f"fractions: {unknown[0]!r} is not one of {', '.join(SPLITS)}")
        if any(share < 0 for share in self.fractions.values()) or abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions must be shares that sum to 1, found {self.fractions}")
        if self.buffer_m < 0:
            raise ValueError(f"buffer_m must be 0 or more, found {self.buffer_m}")
        if self.cell_m is not None and self.cell_m <= 0:
            raise ValueError(f"cell_m must be above 0, found {self.cell_m}")


@dataclass(frozen=True)
class ShardsConfig:
    """max_bytes bounds the *uncompressed* estimate of a shard (so the tar is below it), max_samples its count.

    order: "hash" scatters neighbours over the set (any contiguous run is a fair sample of the ground); "catalog" keeps the
    source's order, which re-reads less of very large scenes.
    """

    max_bytes: int = 512 << 20
    max_samples: int = 10_000
    order: Literal["hash", "catalog"] = "hash"

    def __post_init__(self) -> None:
        if self.max_bytes <= 0 or self.max_samples <= 0:
            raise ValueError("max_bytes and max_samples must be above 0")


@dataclass(frozen=True)
class CodecsConfig:
    """Container and compressor per kind of member; the defaults are what `python -m data_prep bench codec` chose.

    tile_px: side of a chunk of an image larger than that (hr crops decode only the tiles they touch).
    """

    hr: str = "b2nd-lz4"
    s2: str = "b2nd-lz4"
    s1: str = "b2nd-lz4"
    mask: str = "b2nd-lz4"
    label: str = "b2nd-lz4"
    tile_px: int = 256

    def __post_init__(self) -> None:
        for name in ("hr", "s2", "s1", "mask", "label"):
            if getattr(self, name) not in CODECS:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(CODECS)}")
        if self.tile_px < 16:
            raise ValueError(f"tile_px must be 16 or more, found {self.tile_px}")

    def of(self, modality: str) -> str:
        """The container of a modality's pixels; one without an entry here is stored as the s2 series are."""
        return str(getattr(self, modality, self.s2))


@dataclass(frozen=True)
class SitesConfig:
    """Where sites are laid on the ground (`data_prep sites`): squares of `grid.side_m` of one global lattice.

    Attributes:
        url: the GeoParquet file of sites; its map goes beside it as .png.
        area: GeoJSON or GeoParquet whose polygons hold the sites' centres; its points each choose the square they lie in.
        bbox: west, south, east, north in degrees instead of an area; west > east crosses the antimeridian.
        points: (longitude, latitude) pairs instead of an area.
        spacing_m: one square per `spacing_m` in both directions; a multiple of grid.side_m; None lays them side by side.
        strata: polygons (GeoJSON, GeoParquet) or an integer GeoTIFF that give every site a class: land cover, climate, cities.
        strata_property: the polygons' property that names the class.
        per_stratum: at most this many sites of one class, drawn by hash.
        max_sites: at most this many, drawn by hash.
        sites_per_slice: sites of one slice, the unit that is searched, kept and built at a time.
    """

    url: str = ""
    area: str | None = None
    bbox: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    spacing_m: float | None = None
    strata: str | None = None
    strata_property: str = "class"
    per_stratum: int | None = None
    max_sites: int | None = None
    sites_per_slice: int = 1000

    def __post_init__(self) -> None:
        if (self.area is not None) + (self.bbox is not None) + bool(self.points) > 1:
            raise ValueError("give one of area, bbox and points")
        for name, lon, lat in [("points", *point) for point in self.points] + [
            ("bbox", *corner) for corner in ((self.bbox[:2], self.bbox[2:]) if self.bbox else ())
        ]:
            if not (-180 <= lon <= 180 and -90 <= lat <= 90):
                raise ValueError(f"{name}: longitude {lon:g}, latitude {lat:g} lies outside -180…180, -90…90")
        if self.bbox and self.bbox[1] >= self.bbox[3]:
            raise ValueError(
                f"bbox is west, south, east, north: south {self.bbox[1]:g} is not below north {self.bbox[3]:g}"
            )
        for name in ("spacing_m", "per_stratum", "max_sites", "sites_per_slice"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")


@dataclass(frozen=True)
class SensorConfig:
    """Which images of one sensor a site gets (`data_prep prepare`).

    Attributes:
        source: a STAC API (http…), a stac-geoparquet dump (a .parquet file or a folder of them) or a static catalog (an item
            JSON, an ItemCollection, a folder of items).
        collections: of an API or a dump; empty takes all.
        start, end: first and last day, such as 2021-01-01; empty is open.
        max_cloud: greatest eo:cloud_cover in percent; an image that declares none passes.
        dates: at most this many dates (hr: always one); min_dates: a site with fewer is left out.
        period_days: the best image of every such period; None: as many equal periods as `dates`.
        orbits: relative orbits that are allowed; empty allows all. one_orbit: only the orbit that gives the site most dates.
        min_cover: least share of the site that an overpass must cover.
        spares: further dates, ranked, that take the place of images the build finds broken.
    """

    source: str = ""
    collections: tuple[str, ...] = ()
    start: str = ""
    end: str = ""
    max_cloud: float = 100.0
    dates: int = 12
    min_dates: int = 1
    period_days: float | None = None
    orbits: tuple[int, ...] = ()
    one_orbit: bool = False
    min_cover: float = 0.99
    spares: int = 4

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty; give a STAC API, a stac-geoparquet dump or a catalog")
        for name in ("start", "end"):
            try:
                datetime.date.fromisoformat(getattr(self, name) or "2000-01-01")
            except ValueError:
                raise ValueError(f"{name}: {getattr(self, name)!r} is no day such as 2021-01-31") from None
        if self.start and self.end and self.start > self.end:
            raise ValueError(f"start {self.start} is after end {self.end}")
        if not 0 <= self.max_cloud <= 100 or not 0 < self.min_cover <= 1:
            raise ValueError("max_cloud is percent between 0 and 100, min_cover a share above 0 and up to 1")
        if self.dates < 1 or not 0 <= self.min_dates <= self.dates or self.spares < 0:
            raise ValueError("dates must be 1 or more, min_dates between 0 and dates, spares 0 or more")
        if self.period_days is not None and self.period_days <= 0:
            raise ValueError(f"period_days must be above 0, found {self.period_days}")


@dataclass(frozen=True)
class PrepareConfig:
    """Which images every site gets. url: folder of the prepared plan. sensors: by modality.

    min_sensors: a site that fewer sensors see is left out.
    """

    url: str = ""
    sensors: dict[str, SensorConfig] = field(default_factory=dict)
    min_sensors: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.sensors if name not in MODALITIES]
        if unknown:
            raise ValueError(f"sensors: {unknown[0]!r} is not one of {', '.join(MODALITIES)}")
        if self.sensors and not 1 <= self.min_sensors <= len(self.sensors):
            raise ValueError(
                f"min_sensors must be between 1 and the {len(self.sensors)} sensors, found {self.min_sensors}"
            )


@dataclass(frozen=True)
class BuildConfig:
    """Everything `data_prep sites`, `prepare` and `build` need.

    workers: processes of a local build, 0 = one per CPU. error_budget: share of sites that may be faulty; past it the
    build exits 1. max_faults: faults at which a build past its budget stops starting new shards.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    codecs: CodecsConfig = field(default_factory=CodecsConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    workers: int = 0
    error_budget: float = 0.0
    max_faults: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.error_budget <= 1:
            raise ValueError(f"error_budget is a share between 0 and 1, found {self.error_budget}")
        if self.workers < 0 or self.max_faults < 1:
            raise ValueError("workers must be 0 or more and max_faults 1 or more")
