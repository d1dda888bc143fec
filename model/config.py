"""Model and objective settings: plain frozen dataclasses, no torch. Every ablation of the paper is one key here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_prep.schema import MODALITIES


@dataclass(frozen=True)
class SizeSpec:
    """Depths, dims and head dim of a named size; fusion defaults that go with it."""

    depths: tuple[int, int, int, int]
    dim: int
    head_dim: int
    fusion_depth: int
    fusion_dim: int
    fusion_heads: int


SIZES: dict[str, SizeSpec] = {
    "debug": SizeSpec((1, 1, 2, 1), 16, 8, 1, 32, 2),
    "tiny": SizeSpec((2, 2, 4, 2), 32, 16, 2, 128, 4),
    "small": SizeSpec((2, 2, 6, 2), 96, 32, 6, 384, 6),
    "base": SizeSpec((2, 2, 18, 2), 128, 32, 12, 768, 12),
    "skysense_v2": SizeSpec((2, 2, 18, 2), 352, 32, 24, 1024, 16),
}


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the FFN of some blocks of stages 3-4.

    experts: 0 = dense. placement: which blocks (counted over stages 3-4 together, from 0): the last `blocks` of them,
    `blocks` of them spread evenly, or the listed `indices`. balance_weight, z_weight: router losses (Switch, arXiv
    2101.03961; ST-MoE, arXiv 2202.08906). grouped: one grouped matrix product over all experts; false: one product per
    expert (the reference). None: grouped where it is the faster one (CUDA in bfloat16).
    """

    experts: int = 8
    top_k: int = 1
    placement: Literal["last_n", "uniform", "list"] = "last_n"
    blocks: int = 6
    indices: tuple[int, ...] = ()
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    grouped: bool | None = None

    def __post_init__(self) -> None:
        if self.experts < 0 or self.experts == 1:
            raise ValueError(f"moe.experts must be 0 (dense) or at least 2, found {self.experts}")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"moe.top_k must lie in 1..{self.experts} (experts), found {self.top_k}")
        if self.placement == "list" and self.experts and not self.indices:
            raise ValueError("moe.placement is list, but moe.indices is empty")
        if self.blocks < 1:
            raise ValueError(f"moe.blocks must be at least 1, found {self.blocks}; moe.experts=0 switches experts off")

    def placed(self, num_blocks: int) -> frozenset[int]:
        """The blocks, of `num_blocks` in stages 3-4 together, whose FFN becomes experts."""
        if not self.experts:
            return frozenset()
        if self.placement == "list":
            return frozenset(self.indices)
        count = min(self.blocks, num_blocks)
        if self.placement == "last_n":
            return frozenset(range(num_blocks - count, num_blocks))
        return frozenset((i + 1) * num_blocks // count - 1 for i in range(count))


@dataclass(frozen=True)
class FusionConfig:
    """Multi-modal temporal fusion; None takes the size's default. depth 0 averages the valid frames instead.

    kind: one sequence per cell of the ground, the footprint of the coarsest sensor's token (`model.cell_fusion`), or one per place of
    the finest grid over frames unfolded to it (the predecessor's, `model.fusion`; ten times the arithmetic at full size).
    skip (cell): the mean of each sensor's tokens at a place is added to the query's output, through a linear layer per sensor.
    upscale (frames): how many cells per side one token of a modality is unfolded into by the learned pixel shuffle; None derives
    it per modality from the nominal token sizes on the ground (4 for 40 m tokens beside 9.6 m ones).
    """

    kind: Literal["cell", "frames"] = "cell"
    depth: int | None = None
    dim: int | None = None
    heads: int | None = None
    skip: bool = True
    upscale: dict[str, int] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and fusion (SkySense V2, arXiv 2507.13812; fusion: SkySense, arXiv 2312.10115).

    patch: pixels per token side. window: tokens per window side (stages 1-2; stages 3-4 if `attention` is window).
    merge: per modality, whether the grid is halved at each of the three transitions. prompts: learnable tokens per
    modality in each of stages 3 and 4; 0 = off. position: of stages 3-4; `reference_m`: metres per unit of the rotary
    angle; `rotary_base`: ratio of the longest to the shortest rotary wavelength; `learned_grid` cells of
    `learned_cell_m` metres: side of the learned table. separate: one backbone per modality. token_min_valid: a token counts as valid if
    more than this share of its pixels is. tokenizer_bias: spread of the tokenizers' initial biases as a share of their response's;
    0 leaves a token its direction only, once the norm behind it has taken its length (its brightness) away.
    """

    size: Literal["debug", "tiny", "small", "base", "skysense_v2"] = "tiny"
    modalities: tuple[str, ...] = ("hr", "s2", "s1")
    patch: int = 4
    window: int = 8
    merge: dict[str, tuple[bool, bool, bool]] = field(
        default_factory=lambda: {"hr": (True, True, True), "s2": (False, False, False), "s1": (False, False, False)}
    )
    attention: Literal["global", "window"] = "global"
    prompts: int = 4
    position: Literal["rotary_m", "learned", "none"] = "rotary_m"
    reference_m: float = 10.0
    rotary_base: float = 100.0
    learned_grid: int = 16
    learned_cell_m: float = 40.0
    separate: bool = False
    drop_path: float = 0.2
    token_min_valid: float = 0.0
    tokenizer_bias: float = 1.0
    activation_checkpointing: bool = False
    moe: MoEConfig = field(default_factory=MoEConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)

    def __post_init__(self) -> None:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError("modalities must name at least one sensor, each once")
        for name in (*self.modalities, *self.merge, *(self.fusion.upscale or {})):
            if name not in MODALITIES:
                raise ValueError(
                    f"modalities, merge or fusion.upscale holds {name!r}; known are {', '.join(MODALITIES)}"
                )
        if self.window < 2 or self.patch < 1:
            raise ValueError(f"window must be at least 2 and patch at least 1, found {self.window} and {self.patch}")
        if self.prompts < 0 or not 0.0 <= self.drop_path < 1.0 or not 0.0 <= self.token_min_valid < 1.0:
            raise ValueError("prompts must be >= 0; drop_path and token_min_valid must lie in [0, 1)")
        if self.position == "rotary_m" and self.head_dim % 4:
            raise ValueError(f"rotary positions need a head dim divisible by 4, found {self.head_dim}")
        if self.fusion_dim % self.fusion_heads:
            raise ValueError(f"fusion.dim {self.fusion_dim} is no multiple of fusion.heads {self.fusion_heads}")
        if self.fuses_cells and self.fusion_dim // self.fusion_heads % 4:
            raise ValueError(
                f"fusion.dim / fusion.heads must be divisible by 4 (rotary positions), found {self.fusion_dim} / {self.fusion_heads}"
            )
        blocks = self.depths[2] + self.depths[3]
        wrong = [i for i in self.moe.placed(blocks) if not 0 <= i < blocks]
        if wrong:
            raise ValueError(
                f"moe.indices holds {wrong[0]}; stages 3-4 of size {self.size} have blocks 0..{blocks - 1}"
            )

    @property
    def depths(self) -> tuple[int, int, int, int]:
        return SIZES[self.size].depths

    @property
    def dims(self) -> tuple[int, int, int, int]:
        dim = SIZES[self.size].dim
        return (dim, 2 * dim, 4 * dim, 8 * dim)

    @property
    def head_dim(self) -> int:
        return SIZES[self.size].head_dim

    @property
    def fusion_depth(self) -> int:
        return SIZES[self.size].fusion_depth if self.fusion.depth is None else self.fusion.depth

    @property
    def fusion_dim(self) -> int:
        return SIZES[self.size].fusion_dim if self.fusion.dim is None else self.fusion.dim

    @property
    def fusion_heads(self) -> int:
        return SIZES[self.size].fusion_heads if self.fusion.heads is None else self.fusion.heads

    def merges(self, modality: str) -> tuple[bool, bool, bool]:
        """Merge (true) or keep (false) at the three transitions; a modality without an entry keeps its grid."""
        return self.merge.get(modality, (False, False, False))

    def stride(self, modality: str) -> int:
        """Pixels per side of a final-stage token."""
        return self.patch * 2 ** sum(self.merges(modality))

    def upscale(self, modality: str) -> int:
        """Cells per side that fusion unfolds a token of this modality into (see `FusionConfig.upscale`).

        A learned unfolding of more than 8 x 8 cells would cost more than the backbone's widest FFN: beyond it the grid is
        brought over by nearest neighbour alone (factor 1).
        """
        if self.fusion.upscale is not None:
            return self.fusion.upscale.get(modality, 1)
        factor = round(self._tokens_m[modality] / min(self._tokens_m.values()))
        return factor if factor <= 8 else 1

    @property
    def fuses_cells(self) -> bool:
        return self.fusion.kind == "cell" and self.fusion_depth > 0

    @property
    def query_side(self) -> int:
        """Side of the table of query places in a cell: as many as the finest tokens have room in the coarsest one, at most 8."""
        return min(round(max(self._tokens_m.values()) / min(self._tokens_m.values())), 8)

    @property
    def _tokens_m(self) -> dict[str, float]:
        """Nominal side on the ground of each modality's final tokens."""
        return {m: self.stride(m) * MODALITIES[m].gsd_m for m in self.modalities}


def run_samples(span: float, total: int) -> float:
    """Samples of a span of the run: a share of its `total` samples up to 1, samples above it."""
    return span * total if span <= 1 else span


LEVELS = ("pixel", "object", "image")
TERM_WEIGHTS = (
    "mgcl_weight", "ita_weight", "qsacl_weight", "cross_weight", "site_weight", "restore_weight", "masked_weight",
    "labels_weight", "koleo_weight",
)  # fmt: skip
# The lowest teacher temperature that Sinkhorn's float32 kernel exp((z·w − 1)/τ) can hold for unit vectors, exp(−2/τ) at its
# smallest: against float64, targets are off by at most 2.4e-4 down to 0.02 and by 0.9 at 0.0175 (rows in one narrow cone).
LEAST_CENTRED = 0.025


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss terms (SkySense V2, arXiv 2507.13812, and ours); weight 0 switches a term off, with its heads.

    The paper's terms:
        mgcl_weight, mgcl_levels (granularities), pixel_pairs: at most so many positions per image; object_clusters: per image.
        local_mgcl: local views take part in MGCL too (student's local against the teacher's global view).
        qsacl_weight, queries. ita_weight, ita_temperature, ita_embeddings: file made by `python -m pipeline text-embeddings`;
        None switches ITA off.
    Ours (`model.prediction`), all against targets of the whole, unhidden view:
        cross_weight, cross_levels: each sensor's tokens predict the teacher's fused targets. Needs MGCL.
        site_weight, site_temperature: each sensor's and the fused features of u tell their own site's fused features of the teacher
        from those of all other sites of the step (InfoNCE).
        restore_weight: each sensor's and the fused tokens regress statistics per ground cell of all sensors.
        masked_weight: a small decoder reads every token of every sensor out of the fused features, asked by sensor, day and
        place. masked_target: pixels (means and deviations of 4 x 4 blocks of the token), the same pixels through a frozen random
        projection, or the teacher's features of the token. masked_loss: smooth L1, or telling the token from the others of its
        site and sensor at masked_temperature. masked_visible: weight of tokens that were not hidden.
        labels_weight: fused tokens predict the dense class labels that ride along; they are decoded, never read.
        koleo_weight: spread of pooled features (KoLeo) against the teacher's rows of the whole step.
        predictor_hidden: width of these heads.
    What the student does not see of u:
        hide_tokens: share of a sensor's final tokens (all dates of a place together); hide_dates: share of a series' dates;
        hide_sensors: probability that a sensor is hidden whole. modality_dropout: the same for its fusion alone. Something
        always stays.
    Prototypes and teacher:
        prototypes, head_hidden, head_bottleneck: projection heads. heads: one per feature space, or one per granularity too.
        prototypes_frozen: share of the run in which prototypes do not learn (DINO freezes them for an epoch).
        centering: teacher targets balanced over the whole step (sinkhorn), or sharpened only (softmax; for ablation).
        centering_momentum: of the running average of Sinkhorn's scaling that groups with fewer rows than prototypes use; 0 = each
        step by itself. center_bottleneck: take the teacher's mean bottleneck vector off both sides, per group and step.
        teacher_temperature: from, to; over teacher_warmup of the run (a share up to 1, or samples above it).
        With sinkhorn at least LEAST_CENTRED.
        ema_half_life: the teacher averages over this share of the samples seen so far (power-function EMA, arXiv 2312.02696), at
        least ema_samples[0] and at most ema_samples[1] samples; 0: by `ema_momentum` per step, cosine from start to end (paper).
    balance_load: expert loads in the balance loss are those of the previous step (exact under any split into ranks and
    micro-batches) or of the current global micro-batch (Switch's formula to the letter; another accumulation, another loss).
    geo_context: regional prototypes (predecessor), over `geo_regions` cells with `geo_prototypes` each.
    """

    mgcl_weight: float = 1.0
    ita_weight: float = 0.1
    qsacl_weight: float = 1.0
    cross_weight: float = 0.0
    site_weight: float = 0.0
    restore_weight: float = 0.0
    masked_weight: float = 0.0
    labels_weight: float = 0.0
    koleo_weight: float = 0.0
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    heads: Literal["shared", "per_level"] = "shared"
    mgcl_levels: tuple[str, ...] = LEVELS
    local_mgcl: bool = False
    cross_levels: tuple[str, ...] = LEVELS
    pixel_pairs: int = 256
    object_clusters: int = 8
    queries: int = 16
    site_temperature: float = 0.1
    masked_target: Literal["pixels", "projection", "teacher"] = "pixels"
    masked_loss: Literal["regression", "discrimination"] = "regression"
    masked_temperature: float = 0.1
    masked_visible: float = 1.0
    predictor_hidden: int = 256
    hide_tokens: float = 0.0
    hide_dates: float = 0.0
    hide_sensors: float = 0.0
    modality_dropout: float = 0.0
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup: float = 0.3
    prototypes_frozen: float = 0.0
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    centering_momentum: float = 0.0
    center_bottleneck: bool = True
    sinkhorn_iterations: int = 3
    balance_load: Literal["previous_step", "micro_batch"] = "previous_step"
    ita_temperature: float = 0.07
    ita_embeddings: str | None = None
    ema_half_life: float = 0.0
    ema_samples: tuple[float, float] = (500.0, 1.0e8)
    ema_momentum: tuple[float, float] = (0.994, 1.0)
    geo_context: bool = False
    geo_regions: int = 4096
    geo_prototypes: int = 100
    geo_momentum: float = 0.99

    def __post_init__(self) -> None:
        for name in ("mgcl_levels", "cross_levels"):
            levels = getattr(self, name)
            if not levels or any(level not in LEVELS for level in levels):
                raise ValueError(f"{name}={list(levels)} must be some of {', '.join(LEVELS)}")
        for name in ("prototypes", "head_hidden", "head_bottleneck", "pixel_pairs", "object_clusters", "queries"):
            least = 2 if name == "prototypes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        temperatures = (self.student_temperature, *self.teacher_temperature, self.ita_temperature)
        if min(*temperatures, self.site_temperature, self.masked_temperature) <= 0:
            raise ValueError("temperatures must be above 0")
        if self.centering == "sinkhorn" and self.sinkhorn_iterations and min(self.teacher_temperature) < LEAST_CENTRED:
            raise ValueError(
                f"teacher_temperature={list(self.teacher_temperature)} must not go below {LEAST_CENTRED} with centering=sinkhorn: "
                "float32 does not hold exp(-2 / temperature)"
            )
        for name in ("hide_tokens", "hide_dates", "hide_sensors", "modality_dropout", "centering_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1): at 1 nothing would be left")
        for name in TERM_WEIGHTS:
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more")
        if self.cross_weight and not (self.mgcl_weight and set(self.cross_levels) <= set(self.mgcl_levels)):
            raise ValueError(
                "cross_weight needs the fused targets of MGCL: set mgcl_weight above 0 and keep cross_levels within mgcl_levels"
            )
        if self.masked_weight and not (self.masked_visible or self.hide_tokens or self.hide_dates or self.hide_sensors):
            raise ValueError(
                "masked_weight with masked_visible=0 and nothing hidden has no token to predict: set hide_tokens"
            )
        if not self.ema_samples[0] <= self.ema_samples[1] or self.ema_samples[0] <= 0 or self.ema_half_life < 0:
            raise ValueError("ema_samples must be 0 < least <= most, and ema_half_life 0 or more")

    @property
    def hides(self) -> bool:
        """Whether the student sees less of u than there is."""
        return bool(self.hide_tokens or self.hide_dates or self.hide_sensors)
