"""Projection heads: features → unit vectors → prototype scores, and their cross-entropy against the teacher.

Legend: N rows · D input dim · d bottleneck dim · K prototypes · G centring groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.losses.dino import CrossEntropy, prototype_cross_entropy
from model.rows import Take, take

SAME = 1e-4  # a row nearer to its mean than this share of the mean's length is the mean


@dataclass(frozen=True)
class HeadTargets:
    """Teacher side of one head for one micro-batch. Prototypes and scaling are shared by the step's micro-batches.

    Rows are those that count (`rows`), in order; z_Nd: unit rows. mean_Gd: what is taken off the bottleneck vectors of each group, the student's too.
    weight_N: what each row's cross-entropy counts in the returned loss (0: invalid), see `losses.reduce`.
    rows: which of the micro-batch's rows these are; host_rows: the same on the host.
    """

    z_Nd: Tensor
    group_N: Tensor
    mean_Gd: Tensor
    weight_N: Tensor
    prototypes_Kd: Tensor
    log_v_GK: Tensor
    temperature: float
    rows: Take
    host_rows: np.ndarray


def unit_rows(y_Nd: Tensor, group_N: Tensor, mean_Gd: Tensor) -> Tensor:
    """z = (y − mean of its group) / |y − mean of its group|; see `targets.group_means`.

    A row that equals its mean up to rounding (the only row of its group, say) stays near zero: no direction is made of noise.
    """
    mean_Nd = mean_Gd.to(y_Nd.dtype)[group_N]
    away_Nd = y_Nd - mean_Nd
    least_N1 = (SAME * mean_Nd.norm(dim=-1, keepdim=True)).clamp_min(1e-12)
    return away_Nd / away_Nd.norm(dim=-1, keepdim=True).maximum(least_N1)


class Prototypes(nn.Module):
    """K directions: weight-normed with gain 1 (DINO), i.e. unit rows; `forward` is the loss, so that all uses of the weight lie
    inside one module call (ZeRO-3 gathers parameters per call)."""

    age_K: Tensor

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, dim))
        initial.trunc_normal_(self.weight, std=0.02)
        # steps since each was last a row's best match (`model.collapse`); starts as never
        self.register_buffer("age_K", torch.full((num,), 1 << 40, dtype=torch.int64))

    def directions(self) -> Tensor:
        return F.normalize(self.weight.float() if self.weight.dtype != torch.float64 else self.weight, dim=-1)

    def forward(
        self, z_Nd: Tensor, targets: HeadTargets, student_temperature: float, frozen: bool = False
    ) -> CrossEntropy:
        """See `losses.dino.prototype_cross_entropy`. frozen: the directions get a zero gradient."""
        directions_Kd = self.directions()
        if frozen:  # still part of the graph: every rank reduces every gradient
            directions_Kd = directions_Kd.detach() + 0.0 * directions_Kd
        return prototype_cross_entropy(
            z_Nd, directions_Kd, targets.z_Nd, targets.prototypes_Kd, targets.log_v_GK, targets.group_N, targets.weight_N,
            student_temperature, targets.temperature,
        )  # fmt: skip


class ProjectionHead(nn.Module):
    """3-layer MLP (GELU), L2-normalised bottleneck, K prototypes (DINO head, arXiv 2104.14294 appendix C).

    Weights start at std 1/√fan_in: DINO's fixed 0.02 is that at its own width of 2048, and dies out in narrow heads.
    """

    def __init__(self, in_dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                initial.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                initial.zeros_(layer.bias)
        self.prototypes = Prototypes(prototypes, bottleneck)

    def project(self, x_ND: Tensor) -> Tensor:
        """Bottleneck vectors y_Nd, float32, before `unit_rows`."""
        y_Nd = self.mlp(x_ND.to(self.prototypes.weight.dtype))
        return y_Nd if y_Nd.dtype == torch.float64 else y_Nd.float()

    def forward(
        self, x_ND: Tensor, targets: HeadTargets, student_temperature: float, frozen: bool = False
    ) -> CrossEntropy:
        """x_ND: all rows of the micro-batch."""
        z_Nd = unit_rows(self.project(take(x_ND, targets.rows)), targets.group_N, targets.mean_Gd)
        return self.prototypes(z_Nd, targets, student_temperature, frozen)
