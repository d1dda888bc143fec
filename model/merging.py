"""Adaptive Patch Merging: halve the grid or keep it, with the same weights, chosen at every call.

Dimension legend: R rows before · X rows that are read, four per merged token · C channels (2C after the transition).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.plan import Transition
from model.rows import take


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
        initial.trunc_normal_(self.reduction.weight, std=0.02)
        self.norm.reset_parameters()

    def forward(self, x_RC: Tensor, transition: Transition) -> Tensor:
        """Rows of the next stage. Of a merged token's four neighbours the invalid ones (odd edges included) contribute nothing."""
        rows_XC = take(x_RC, transition.take)
        outs = []
        for (merge, _), part in zip(transition.parts, rows_XC.split([count for _, count in transition.parts])):
            outs.append(
                self.reduction(part.view(-1, self.reduction.in_features))
                if merge
                else F.linear(part, keep_weight(self.reduction.weight))
            )
        return self.norm(outs[0] if len(outs) == 1 else torch.cat(outs))


def keep_weight(weight: Tensor) -> Tensor:
    """[2C, 4C] → [2C, C]: mean of the four C-blocks."""
    return weight.unflatten(1, (4, -1)).mean(1)
