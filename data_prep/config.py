"""The configuration of a shard build: one frozen tree, no heavy imports. See `cluster.config.load`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_prep.schema import MODALITIES

CODECS = ("b2nd-lz4", "b2nd-zstd", "npy", "zarr.zip")
SPLITS = ("train", "val", "probe")  # also the order of shards and rows in a set


@dataclass(frozen=True)
class SourceConfig:
    """catalog: URLs of STAC catalogs (stac-geoparquet files or folders of items), built into one set.

    modalities: only these are read; empty = all but s2_l1c, which must be asked for. bbox: west, south, east, north in degrees; sites outside are left out.
    """

    catalog: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = None

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
class BuildConfig:
    """Everything `data_prep build` needs.

    workers: processes of a local build, 0 = one per CPU. error_budget: share of sites that may be faulty; past it the
    build exits 1. max_faults: faults at which a build past its budget stops starting new shards.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    codecs: CodecsConfig = field(default_factory=CodecsConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    workers: int = 0
    error_budget: float = 0.0
    max_faults: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.error_budget <= 1:
            raise ValueError(f"error_budget is a share between 0 and 1, found {self.error_budget}")
        if self.workers < 0 or self.max_faults < 1:
            raise ValueError("workers must be 0 or more and max_faults 1 or more")
