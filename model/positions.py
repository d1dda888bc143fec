"""Where tokens are: window geometry and position bias of SwinV2, rotary angles in metres, a learned table.

Everything that depends on shapes only is built once per (shape, device) and kept; what depends on weights is not.

Dimension legend: N images · H, W token rows, columns · L tokens · K window count per image · S tokens per window · C, D
channels · A attention heads · H head channels · R rotary frequencies, half of them per axis · P prompt tokens · J = P + L.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.grids import axis_windows

# Added to the logits of masked keys. exp(MASKED + any logit here) is exactly 0 in every float format, and a row whose keys
# are all masked stays finite, forward and backward, where -inf would give NaN.
MASKED = -3.0e4


class Windows(NamedTuple):
    """How a block cuts a grid of H x W tokens into windows; the same for all images of that size.

    Attributes:
        size: window rows, columns. padded: grid after padding at the bottom and right. roll: cyclic shift up and left.
        index_SS: entry of the (2w-1)² bias table for each (query, key) pair of a window.
        coordinates_R2: log-spaced offsets of that table's entries, float64.
        apart_K1SS: bool, true where query and key come from different regions of the cyclic shift; None where every window is
            one region.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    roll: tuple[int, int]
    index_SS: Tensor
    coordinates_R2: Tensor
    apart_K1SS: Tensor | None


class WindowLayout(NamedTuple):
    """Windows and what may see what in them, for the images of one call.

    Attributes:
        see_X1SS: bool, the query may see the key; one entry per window of every image, or per window of one image where all
            tokens are valid. None: everything is seen.
    """

    windows: Windows
    see_X1SS: Tensor | None


@functools.lru_cache(maxsize=256)
def plan_windows(height: int, width: int, window: int, shift: int, device: torch.device) -> Windows:
    """The windows of one grid size; built once."""
    (win_h, pad_h, roll_h), (win_w, pad_w, roll_w) = (axis_windows(n, window, shift) for n in (height, width))
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        rows_S = torch.arange(win_h, device=device).repeat_interleave(win_w)
        cols_S = torch.arange(win_w, device=device).repeat(win_h)
        dy_SS = rows_S[:, None] - rows_S[None, :] + window - 1
        dx_SS = cols_S[:, None] - cols_S[None, :] + window - 1
        index_SS = dy_SS * (2 * window - 1) + dx_SS
        apart_K1SS = None
        if roll_h or roll_w:
            rows_H = (torch.arange(pad_h, device=device) >= pad_h - roll_h).long()
            cols_W = (torch.arange(pad_w, device=device) >= pad_w - roll_w).long()
            region_KS = partition((rows_H[:, None] * 2 + cols_W)[None, :, :, None], (win_h, win_w))[:, :, 0]
            apart_K1SS = (region_KS[:, :, None] != region_KS[:, None, :])[:, None]
        coordinates_R2 = cpb_coordinates(window).to(device)
    return Windows((win_h, win_w), (pad_h, pad_w), (roll_h, roll_w), index_SS, coordinates_R2, apart_K1SS)


def cpb_coordinates(window: int) -> Tensor:
    """Log-spaced relative coordinates of SwinV2's continuous position bias, float64 [(2w-1)², 2] (arXiv 2111.09883 eq. 4):
    8 · Δ / (w-1), then sign(Δ) · log2(1 + |Δ|) / log2(8).
    """
    axis = torch.arange(-(window - 1), window, dtype=torch.float64) * (8.0 / max(window - 1, 1))
    axis = axis.sign() * (axis.abs() + 1.0).log2() / math.log2(8.0)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)


def window_layouts(valid_NHW: Tensor, all_valid: bool, window: int) -> tuple[WindowLayout, WindowLayout]:
    """Layouts of the unshifted and the shifted blocks of a stage, made once for all of them."""
    height, width = valid_NHW.shape[1:]
    found = []
    for shift in (0, window // 2):
        windows = plan_windows(height, width, window, shift, valid_NHW.device)
        found.append(WindowLayout(windows, window_mask(windows, None if all_valid else valid_NHW, height, width)))
    return found[0], found[1]


def partition(x_NHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, H, W, C] → [N·K, S, C]; H and W are multiples of the window."""
    n, h, w, c = x_NHWC.shape
    x = x_NHWC.view(n, h // size[0], size[0], w // size[1], size[1], c)
    return x.transpose(2, 3).reshape(-1, size[0] * size[1], c)


def unpartition(x_XSC: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `partition`: [N·K, S, C] → [N, H, W, C]."""
    h, w = grid
    x = x_XSC.view(-1, h // size[0], w // size[1], size[0], size[1], x_XSC.shape[-1])
    return x.transpose(2, 3).reshape(-1, h, w, x_XSC.shape[-1])


def to_windows(x_NHWC: Tensor, plan: Windows) -> Tensor:
    """Pads (with zeros, or False), rolls and partitions."""
    h, w = x_NHWC.shape[1:3]
    if (h, w) != plan.padded:
        x_NHWC = F.pad(x_NHWC, (0, 0, 0, plan.padded[1] - w, 0, plan.padded[0] - h))
    if plan.roll != (0, 0):
        x_NHWC = x_NHWC.roll((-plan.roll[0], -plan.roll[1]), (1, 2))
    return partition(x_NHWC, plan.size)


def from_windows(x_XSC: Tensor, plan: Windows, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x_NHWC = unpartition(x_XSC, plan.size, plan.padded)
    if plan.roll != (0, 0):
        x_NHWC = x_NHWC.roll(plan.roll, (1, 2))
    return x_NHWC[:, :height, :width]


def window_mask(windows: Windows, valid_NHW: Tensor | None, height: int, width: int) -> Tensor | None:
    """bool [N·K, 1, 1 or S, S] (or [K, 1, 1 or S, S] when all tokens are valid): may the query see the key? None: always.

    Padding cells are keys to nobody; regions of a cyclic shift are kept apart.
    """
    together_K1SS = None if windows.apart_K1SS is None else ~windows.apart_K1SS
    if valid_NHW is None and windows.padded == (height, width):
        return together_K1SS
    if valid_NHW is None:
        valid_NHW = torch.ones(1, height, width, dtype=torch.bool, device=windows.index_SS.device)
    key_X11S = to_windows(valid_NHW[..., None], windows)[:, None, None, :, 0]
    if together_K1SS is None:
        return key_X11S
    return (key_X11S.unflatten(0, (-1, together_K1SS.shape[0])) & together_K1SS).flatten(0, 1)


def token_centres_m(height: int, width: int, stride: int, gsd_N: Tensor) -> Tensor:
    """Centres of the tokens in metres from the canvas's corner (south, east): float32 [N, L, 2]."""
    rows_H = torch.arange(height, device=gsd_N.device, dtype=torch.float32) + 0.5
    cols_W = torch.arange(width, device=gsd_N.device, dtype=torch.float32) + 0.5
    grid_L2 = torch.stack(torch.meshgrid(rows_H, cols_W, indexing="ij"), dim=-1).flatten(0, 1)
    return grid_L2 * (stride * gsd_N.float())[:, None, None]


def rotary_table(
    centres_NL2: Tensor, head_dim: int, base: float, reference_m: float, prompts: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [N, 1, P + L, head_dim/2]; prompts are not turned. The first half of the frequencies turns with y,
    the second with x (RoFormer, arXiv 2104.09864, in two dimensions). Frequency r of R per axis is base^(-r/R) radians per
    `reference_m` metres.
    """
    num = head_dim // 4
    exponent_R = torch.arange(num, device=centres_NL2.device, dtype=torch.float32) / num
    freq_R = base**-exponent_R / reference_m
    angles_N1JR = F.pad((centres_NL2[..., None] * freq_R).flatten(2), (0, 0, prompts, 0))[:, None]
    return angles_N1JR.cos(), angles_N1JR.sin()


def rotate(x_NAJH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the channel pairs (i, i + H/2) of queries or keys; computed in float32 at least, returned as given."""
    dtype = torch.promote_types(x_NAJH.dtype, torch.float32)
    cos, sin = (t.to(dtype) for t in table)
    a, b = x_NAJH.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_NAJH.dtype)


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
        nn.init.trunc_normal_(self.table_DGG, std=0.02)

    def forward(self, centres_NL2: Tensor) -> Tensor:
        """centres south, east in metres → [N, L, D]."""
        where_N1L2 = (centres_NL2.flip(-1) * (2.0 / self.extent_m) - 1.0)[:, None]
        table = self.table_DGG.float()[None].expand(centres_NL2.shape[0], -1, -1, -1)
        out_ND1L = F.grid_sample(table, where_N1L2, mode="bilinear", padding_mode="border", align_corners=False)
        return out_ND1L[:, :, 0].transpose(1, 2)
