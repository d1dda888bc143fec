"""Geo-context prototypes (the predecessor SkySense, arXiv 2312.10115, section 3.3; optional): what a region usually looks like.

The globe is cut into R regions with P prototypes each. Fused tokens attend to the prototypes of their own region; what they
find is concatenated to them and projected back. Prototypes are no parameters: they follow the teacher's fused features of v by
Sinkhorn assignment and EMA, once per step, over all ranks and micro-batches. They live in the teacher alone; the student
gets those of its sites with the targets.

Legend: B sites · h, w fused tokens · N = h·w · F fused dim · R regions · P prototypes of a region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.losses.reduce import Reduce
from model.losses.sinkhorn import TINY, work_dtype

ASSIGN_TEMPERATURE = 0.05
BALANCE_ROUNDS = 3


class ContextSums(NamedTuple):
    """One micro-batch: prototypes as they were, and what the sites' regions learn from it.

    Attributes:
        region_B: int64. prototypes_BPF: of each site's region, before this step's update.
        sum_BPF: Σ over valid tokens of assignment × token; mass_BP: Σ of assignment.
    """

    region_B: Tensor
    prototypes_BPF: Tensor
    sum_BPF: Tensor
    mass_BP: Tensor


class GeoContext(nn.Module):
    """The projection [token ‖ context] → token. `prototypes_RPF` is a buffer of the teacher's (`own_prototypes`)."""

    prototypes_RPF: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * dim, dim)
        initial.trunc_normal_(self.project.weight, std=0.02)
        initial.zeros_(self.project.bias)

    def own_prototypes(self, regions: int, prototypes: int) -> None:
        """Makes this module the keeper of the prototypes; all regions start from the same seeded draw."""
        dim = self.project.out_features
        draw_PF = torch.randn(prototypes, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("prototypes_RPF", F.normalize(draw_PF, dim=-1).repeat(regions, 1, 1))

    def forward(self, fused_BhwF: Tensor, prototypes_BPF: Tensor) -> Tensor:
        """fused + project([fused ‖ softmax(fused · prototypesᵀ / √F) · prototypes]); same shape.

        The residual is ours: a head trained without context may go on from there.
        """
        x_BNF, prototypes_BPF = fused_BhwF.flatten(1, 2), prototypes_BPF.to(fused_BhwF.dtype)
        context_BNF = F.scaled_dot_product_attention(x_BNF[:, None], prototypes_BPF[:, None], prototypes_BPF[:, None])[
            :, 0
        ]
        both_BNf = torch.cat([x_BNF, context_BNF], dim=-1).to(self.project.weight.dtype)
        return fused_BhwF + self.project(both_BNf).view_as(fused_BhwF).to(fused_BhwF.dtype)

    @torch.no_grad()
    def of_sites(self, lonlat_B2: Tensor) -> tuple[Tensor, Tensor]:
        """(region_B, prototypes_BPF) of the sites."""
        region_B = region_of(lonlat_B2, self.prototypes_RPF.shape[0])
        return region_B, self.prototypes_RPF[region_B]

    @torch.no_grad()
    def learn(self, sums: list[ContextSums], momentum: float, reduce: Reduce) -> None:
        """prototype ← momentum · prototype + (1 − momentum) · mean of its tokens, where a region saw any; collective."""
        region_B = torch.cat([s.region_B for s in sums])
        keeper = self.prototypes_RPF
        seen_R = torch.zeros(len(keeper), device=keeper.device).index_add(
            0, region_B, torch.ones_like(region_B, dtype=torch.float32)
        )
        touched = reduce.sum(seen_R).nonzero()[:, 0]
        place_R = torch.full_like(seen_R, -1, dtype=torch.int64)
        place_R[touched] = torch.arange(len(touched), device=keeper.device)
        packed_BPX = torch.cat([torch.cat([s.sum_BPF, s.mass_BP[..., None]], dim=-1) for s in sums])
        total = packed_BPX.new_zeros(len(touched), *packed_BPX.shape[1:]).index_add(0, place_R[region_B], packed_BPX)
        total = reduce.sum(total)
        mean, mass = total[..., :-1] / total[..., -1:].clamp_min(TINY), total[..., -1:]
        new = torch.lerp(mean.to(keeper.dtype), keeper[touched], momentum)
        keeper[touched] = torch.where(mass > 1e-6, new, keeper[touched])


@torch.no_grad()
def assign(fused_BhwF: Tensor, valid_Bhw: Tensor, region_B: Tensor, prototypes_BPF: Tensor) -> ContextSums:
    """Sinkhorn-Knopp assignment of a site's valid tokens to its region's prototypes, equal mass per prototype."""
    valid_BN1 = valid_Bhw.flatten(1)[..., None]
    dtype = work_dtype(fused_BhwF)
    x_BNF = torch.where(valid_BN1, fused_BhwF.flatten(1, 2), 0).to(dtype)
    prototypes_BPF = prototypes_BPF.to(dtype)
    cosine_BNP = F.normalize(x_BNF, dim=-1) @ F.normalize(prototypes_BPF, dim=-1).transpose(1, 2)
    mass_BNP = torch.softmax(cosine_BNP / ASSIGN_TEMPERATURE, dim=-1) * valid_BN1
    for _ in range(BALANCE_ROUNDS):
        mass_BNP = mass_BNP / mass_BNP.sum(dim=1, keepdim=True).clamp_min(TINY)
        mass_BNP = mass_BNP / mass_BNP.sum(dim=2, keepdim=True).clamp_min(TINY)
    return ContextSums(region_B, prototypes_BPF, mass_BNP.transpose(1, 2) @ x_BNF, mass_BNP.sum(1))


def region_of(lonlat_B2: Tensor, regions: int) -> Tensor:
    """Region number 0 … regions − 1 by an equal-area grid: rows in sin(latitude), twice as many columns in longitude."""
    rows = max(int((regions / 2) ** 0.5), 1)
    columns = max(regions // rows, 1)
    height = (torch.sin(torch.deg2rad(lonlat_B2[:, 1])) + 1) / 2
    row_B = (height * rows).long().clamp(0, rows - 1)
    column_B = (((lonlat_B2[:, 0] + 180) % 360) / 360 * columns).long().clamp(0, columns - 1)
    return row_B * columns + column_B
