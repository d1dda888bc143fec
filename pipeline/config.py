"""The configuration of a pretraining run: one frozen tree, no torch. See `cluster.config.load`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config import check_ranges
from model.config import ModelConfig, ObjectiveConfig


@dataclass(frozen=True)
class RunConfig:
    """dir: any fsspec URL; name: what MLflow shows (None: last component of dir). profile: first and last step of which every rank writes
    a torch profiler trace under `profile/`."""

    dir: str = "runs_out/run"
    name: str | None = None
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile must be first and last step, 1 <= first <= last, found {list(self.profile)}")


@dataclass(frozen=True)
class ViewConfig:
    """Crops and dates per view. Canvas sides in pixels; the ground side follows from the 10 m canvas: `pixels * 10 m`.

    hr_px / series_px: canvas side of hr and of s2/s1; s2_dates / s1_dates: sampled dates.
    """

    hr_px: int = 512
    series_px: int = 16
    s2_dates: int = 20
    s1_dates: int = 10

    def __post_init__(self) -> None:
        check_ranges(self, hr_px=">= 1", series_px=">= 1", s2_dates=">= 1", s1_dates=">= 1")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how.

    What:
        url: one shard set or several. Without `weights` several are read as one set; with them, draws are mixed by weight.
        split: of the index; "" takes all.
        require: modalities a site must have. max_cloud: greatest mean cloud share. date_range: ISO dates, a site's series
            must overlap it. bbox: west, south, east, north in degrees. unflagged: only samples none of whose dates had metadata
            that its pixels contradict (a build with `quality.on_contradiction=correct` keeps such dates).

    Views:
        scale: range of the crop side as a share of the canvas side, in steps of 10 m; at most 1.
        min_clear: dates with a smaller share of clear pixels are used only when too few others exist.
        date_jitter_days: greatest shift of a date's day of year. photometric: hr colour augmentation (mild: what flights differ in;
            dino: full colour jitter, blur, solarize, grayscale). series_jitter: greatest gain of s2 per view (0.05 = ± 5 %), and
            ten times as many dB for s1 (0.5).

    How:
        threads: decoding threads, 0 = decode in the caller. prefetch_batches: batches made ahead.
        block_samples, interleave: see `pipeline.reader.order`; block_samples * interleave samples are mixed at a time.
        read_ahead_mb: memory for bytes fetched ahead from object storage; range_mb: size of one request.
        cache_dir, cache_gb: local disk cache of what was fetched, bounded; beside it the index of large sets, once per node
            (`pipeline.reader.shared`; without cache_dir below the system's temporary directory).
        verify_checksums: CRC-32C of every member read (about 40 µs per MB).
        error_budget: share of the samples that may be unreadable; past it the run stops with their list.
        retries, timeout_s: attempts after the first for one request, and how long one may stand still. 12 attempts wait out an
            outage of about 80 s (each waits twice as long, 20 s at most, half of it on average).
    """

    url: str | tuple[str, ...] = ""
    weights: tuple[float, ...] = ()
    split: str = "train"
    views_global: ViewConfig = field(default_factory=ViewConfig)
    views_local: ViewConfig = field(default_factory=lambda: ViewConfig(256, 8, 10, 5))
    local_views: int = 1
    scale: tuple[float, float] = (1.0, 1.0)
    min_clear: float = 0.2
    date_jitter_days: int = 0
    photometric: Literal["none", "mild", "dino"] = "mild"
    series_jitter: float = 0.0
    require: tuple[str, ...] = ()
    max_cloud: float | None = None
    unflagged: bool = False
    date_range: tuple[str, str] | None = None
    bbox: tuple[float, float, float, float] | None = None
    threads: int = 2
    block_samples: int = 16
    interleave: int = 8
    prefetch_batches: int = 2
    read_ahead_mb: int = 64
    range_mb: int = 8
    cache_dir: str | None = None
    cache_gb: float = 100.0
    verify_checksums: bool = True
    error_budget: float = 0.001
    retries: int = 12
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale must be 0 < low <= high <= 1, found {self.scale}; larger crops need a larger series_px"
            )
        for name in ("block_samples", "interleave", "prefetch_batches", "read_ahead_mb", "range_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, found {getattr(self, name)}")
        for name in ("threads", "local_views", "retries", "date_jitter_days"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if not 0.0 <= self.series_jitter < 1.0:
            raise ValueError(f"series_jitter must lie in [0, 1), found {self.series_jitter}")
        check_ranges(
            self,
            error_budget="0..1",
            min_clear="0..1",
            max_cloud="0..1",
            cache_gb="> 0",
            timeout_s="> 0",
            weights="> 0",
        )
        if self.weights and len(self.weights) != len(self.urls):
            raise ValueError(f"weights holds {len(self.weights)} numbers for {len(self.urls)} shard sets")

    @property
    def urls(self) -> tuple[str, ...]:
        """The shard sets, one or several."""
        return (self.url,) if isinstance(self.url, str) else self.url


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision. All schedules are functions of samples seen, not of steps."""

    steps: int = 1000
    batch: int = 1024
    micro_batch: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    log_every: int = 10
    stall_timeout_s: float = 600.0
    compile: bool = False

    def __post_init__(self) -> None:
        check_ranges(
            self, steps=">= 1", batch=">= 1", micro_batch=">= 1", seed=">= 0", log_every=">= 1", stall_timeout_s="> 0"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with cosine schedules. warmup: share of the run up to 1, samples above it. lr_scale: factor per module-name prefix,
    e.g. {"backbone.tokenizers": 0.2}."""

    lr: float = 2e-4
    lr_end: float = 1e-6
    warmup: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: tuple[float, float] = (0.04, 0.2)
    clip: float = 3.0
    lr_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(
            self, lr=">= 0", lr_end=">= 0", warmup=">= 0", betas="0..1", eps="> 0", weight_decay=">= 0", clip=">= 0",
            lr_scale=">= 0",
        )  # fmt: skip


@dataclass(frozen=True)
class ParallelConfig:
    """zero_stage 0-3; ep: expert-parallel degree, divides the ranks of a node (or, with `ep_across_nodes`, of the job: rows
    then travel to their experts over the slow link); offload: optimizer state in CPU memory. reduce: precision in which gradients
    are summed over ranks with bf16 weights (fp32 doubles that traffic, and loses nothing over many ranks).
    """

    zero_stage: int = 2
    ep: int = 1
    ep_across_nodes: bool = False
    offload: bool = False
    reduce: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        check_ranges(self, zero_stage="0..3", ep=">= 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps; keep_last newest plus each `keep_every`-th step; asynchronous: written beside training.

    allow_changed_data: resume on a shard set whose manifest is not the one the checkpoint was trained on.
    copy_to: a second place (any fsspec URL) that every `copy_every`-th checkpoint goes to, once it stands in `run.dir`, and the one
    before a stop: COPY_TO/NAME/checkpoints, with run.dir's name. One that is away costs its copy and a warning. A resume takes
    the newest of both places. So run.dir may be fast and copy_to lasting.
    """

    every: int = 500
    keep_last: int = 2
    keep_every: int = 10_000
    asynchronous: bool = True
    allow_changed_data: bool = False
    copy_to: str = ""
    copy_every: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, every=">= 0", keep_last=">= 1", keep_every=">= 0", copy_every=">= 1")

    def copies(self, step: int) -> bool:
        """Whether the checkpoint of this step is also copied."""
        return bool(self.copy_to) and (
            not self.every or step % self.every != 0 or step // self.every % self.copy_every == 0
        )


@dataclass(frozen=True)
class TrackingConfig:
    """uri: MLflow server or store (`http://…`, `sqlite:///…`, `postgresql://…`); "none" logs to the run directory only; "env" takes
    GEOLOOM_TRACKING_URI, else MLFLOW_TRACKING_URI: the place for one with a password, which is never written down.
    """

    uri: str = "none"
    experiment: str = "geoloom"


@dataclass(frozen=True)
class ProbeConfig:
    """In-loop probes on labels that ride in the shards. every: steps, 0 = off. samples: at most, per split.

    label: scalar label of `knn` and `linear`; raster: label raster of `segment` (None: the only one there is).
    views: what a probe sees of a site; None: the whole site with all its dates, see `pipeline.probes.sites.whole_view`.
    pool: a site's features are the mean over its valid tokens and dates, or mean and standard deviation side by side.
    stage: the backbone's features after its last norm, after one of the four stages, or after all four side by side.
    outside: published data sets to watch beside them: row of `evaluate --list` (of kind `class`) -> its folder; at most `samples` per split.
    """

    every: int = 0
    tasks: tuple[str, ...] = ("knn", "linear")
    samples: int = 512
    label: str = "scene"
    raster: str | None = None
    views: ViewConfig | None = None
    pool: Literal["mean", "mean_std"] = "mean_std"
    stage: Literal["last", 1, 2, 3, 4, "all"] = "last"
    outside: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self, every=">= 0", samples=">= 1")


@dataclass(frozen=True)
class InitConfig:
    """Where the weights of step 0 come from; a run that has a checkpoint of its own continues that instead.

    weights: a run directory, a checkpoint or an exported `.safetensors` (which holds no heads); None: drawn. Only weights come over. A
        dense model fills experts (each a copy; the network's output stays the dense one's).
    owner: the average over steps (teacher), or the student itself. partial: allow a backbone of which only some tensors fit.
    """

    weights: str | None = None
    owner: Literal["teacher", "student"] = "teacher"
    partial: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """extra: free DeepSpeed settings merged last; a key we set ourselves is refused."""

    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything `pipeline train` needs."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
