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

    experts: 0 = dense. placement: which blocks (counted over stages 3-4 together): the last `blocks` of them, `blocks` of
    them spread evenly, or the listed `indices`. balance_weight, z_weight: router losses (Switch, arXiv 2101.03961; ST-MoE,
    arXiv 2202.08906).
    """

    experts: int = 8
    top_k: int = 1
    placement: Literal["last_n", "uniform", "list"] = "last_n"
    blocks: int = 6
    indices: tuple[int, ...] = ()
    balance_weight: float = 1e-2
    z_weight: float = 1e-3


@dataclass(frozen=True)
class FusionConfig:
    """Multi-modal temporal fusion; None takes the size's default. depth 0 averages the valid frames instead."""

    depth: int | None = None
    dim: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The backbone (method.md section 2) and fusion (section 3)."""

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
    separate: bool = False
    drop_path: float = 0.2
    activation_checkpointing: bool = False
    moe: MoEConfig = field(default_factory=MoEConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.modalities if name not in MODALITIES]
        if unknown:
            raise ValueError(f"modalities holds {unknown[0]!r}; known ones are {', '.join(MODALITIES)}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss terms (method.md section 4); weight 0 switches a term off."""

    mgcl_weight: float = 1.0
    ita_weight: float = 0.1
    qsacl_weight: float = 1.0
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    object_clusters: int = 8
    queries: int = 16
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup_samples: int = 30_000
    sinkhorn_iterations: int = 3
    ita_temperature: float = 0.07
    ita_embeddings: str | None = None
    ema_momentum: tuple[float, float] = (0.994, 1.0)
    geo_context: bool = False
