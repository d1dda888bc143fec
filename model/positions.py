"""Where tokens are: rotary angles in metres, a learned table. (Windows: `model.windows`.)

Dimension legend: N images · L tokens · T rows of a packed call · D channels · A attention heads · H head channels · R rotary frequencies,
half of them per axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial


def rotary_table(metres_T2: Tensor, head_dim: int, base: float, reference_m: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [T, 1, head_dim/2], of places in metres (south, east). The first half of the frequencies turns
    with y, the second with x (RoFormer, arXiv 2104.09864, in two dimensions). Frequency r of R per axis is base^(-r/R) radians
    per `reference_m` metres. Prompts stand at the origin: they are not turned.
    """
    num = head_dim // 4
    exponent_R = torch.arange(num, device=metres_T2.device, dtype=torch.float32) / num
    freq_R = base**-exponent_R / reference_m
    angles_T1R = (metres_T2[..., None] * freq_R).flatten(1)[:, None]
    return angles_T1R.cos(), angles_T1R.sin()


def rotate(x_TAH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the channel pairs (i, i + H/2) of queries or keys; computed in float32 at least, returned as given."""
    dtype = torch.promote_types(x_TAH.dtype, torch.float32)
    cos, sin = (t.to(dtype) for t in table)
    a, b = x_TAH.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_TAH.dtype)


class LearnedPosition(nn.Module):
    """The ablation: a learned table over a square of ground, read bilinearly at the token centres and added to the tokens.

    The table spans `extent_m` metres from the canvas's corner; tokens beyond it take its border. In metres, like the
    rotary form, so that neither canvas size nor padding moves a token.
    """

    def __init__(self, side: int, dim: int, extent_m: float) -> None:
        super().__init__()
        self.extent_m = extent_m
        self.table_DGG = nn.Parameter(torch.empty(dim, side, side))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initial.trunc_normal_(self.table_DGG, std=0.02)

    def forward(self, metres_T2: Tensor) -> Tensor:
        """south, east in metres → [T, D]."""
        where_11T2 = (metres_T2.flip(-1) * (2.0 / self.extent_m) - 1.0)[None, None]
        table = self.table_DGG.float()[None]
        out_1D1T = F.grid_sample(table, where_11T2, mode="bilinear", padding_mode="border", align_corners=False)
        return out_1D1T[0, :, 0].T
