"""Adaptive Patch Merging: halve the grid or keep it, with the same weights, chosen at every call.

Dimension legend: N images · H, W tokens · C channels (2C after the transition).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.validity import merge_validity


class AdaptivePatchMerging(nn.Module):
    """Transition between stages, SwinV2 style: linear 4C → 2C without bias, then LayerNorm.

    Merge: the four neighbours are concatenated (order: top-left, bottom-left, top-right, bottom-right, as the Swin family
    does) and projected. Keep: every token is projected by the mean of the weight's four C-blocks. As Σ_i W_i x = 4 · keep(x),
    keep equals the merge of four equal neighbours up to a factor that the LayerNorm behind it removes.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)
        self.norm.reset_parameters()

    def forward(self, x_NHWC: Tensor, valid_NHW: Tensor, merge: bool) -> tuple[Tensor, Tensor]:
        """A merged token is valid if one of its four is; invalid ones (odd edges included) contribute nothing."""
        if merge:
            x_NHWC, valid_NHW = merge_neighbours(x_NHWC, valid_NHW)
            return self.norm(self.reduction(x_NHWC)), valid_NHW
        return self.norm(F.linear(x_NHWC, keep_weight(self.reduction.weight))), valid_NHW


def keep_weight(weight: Tensor) -> Tensor:
    """[2C, 4C] → [2C, C]: mean of the four C-blocks."""
    return weight.unflatten(1, (4, -1)).mean(1)


def merge_neighbours(x_NHWC: Tensor, valid_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """[N, H, W, C] → [N, ⌈H/2⌉, ⌈W/2⌉, 4C] and its validity."""
    odd_h, odd_w = x_NHWC.shape[1] % 2, x_NHWC.shape[2] % 2
    x_NHWC = torch.where(valid_NHW[..., None], x_NHWC, 0)
    if odd_h or odd_w:
        x_NHWC = F.pad(x_NHWC, (0, 0, 0, odd_w, 0, odd_h))
    corners = [x_NHWC[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return torch.cat(corners, dim=-1), merge_validity(valid_NHW)
