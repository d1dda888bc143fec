"""Which token of view v shows the ground of a token of view u: exact, from the crops' affine maps.

Geometry is computed in float64. A token's place is its centre on the canvas: token (i, j) of stride s lies at pixel
((j + ½)s, (i + ½)s), pixel centres at +0.5 as in `ModalityView.affine_B23`.

Legend: B sites · T dates · h, w token grid · L = h·w · P chosen positions · D feature dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAYS = 365
UNKNOWN_DAYS = 400  # distance when a date's day is unknown: farther than any known one, then by index


@dataclass(frozen=True)
class Grid:
    """Where a token grid lies: canvas pixel → site metres, token stride in canvas pixels (x, y), canvas size (H, W)."""

    affine_B23: Tensor
    hw: tuple[int, int]
    stride: tuple[float, float]
    canvas: tuple[int, int]


def token_centres(grid: Grid) -> Tensor:
    """Site metres (east, south) of every token centre: [B, L, 2] float64."""
    h, w = grid.hw
    device = grid.affine_B23.device
    row_L, col_L = torch.meshgrid(
        torch.arange(h, dtype=torch.float64, device=device), torch.arange(w, dtype=torch.float64, device=device), indexing="ij"
    )  # fmt: skip
    pixel_L2 = torch.stack(
        [(col_L.reshape(-1) + 0.5) * grid.stride[0], (row_L.reshape(-1) + 0.5) * grid.stride[1]], dim=-1
    )
    affine_B23 = grid.affine_B23.to(torch.float64)
    return pixel_L2 @ affine_B23[:, :, :2].transpose(1, 2) + affine_B23[:, None, :, 2]


def locate(ground_BL2: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(token_BL2, inside_BL): place of ground points on a grid in token units (column, row; token centres at integers).

    inside: the point lies on the grid's canvas. A degenerate affine (all zero, an absent modality) is nowhere.
    """
    (a_B1, b_B1, tx_B1), (c_B1, d_B1, ty_B1) = (
        row.unbind(-1) for row in grid.affine_B23.double()[..., None, :].unbind(1)
    )
    det_B1 = a_B1 * d_B1 - b_B1 * c_B1
    usable_B1 = det_B1.abs() > 1e-12
    det_B1 = torch.where(usable_B1, det_B1, 1.0)
    east_BL, south_BL = ground_BL2[..., 0] - tx_B1, ground_BL2[..., 1] - ty_B1
    x_BL, y_BL = (d_B1 * east_BL - b_B1 * south_BL) / det_B1, (a_B1 * south_BL - c_B1 * east_BL) / det_B1
    height, width = grid.canvas
    inside_BL = (x_BL >= 0) & (x_BL <= width) & (y_BL >= 0) & (y_BL <= height) & usable_B1
    return torch.stack([x_BL / grid.stride[0] - 0.5, y_BL / grid.stride[1] - 0.5], dim=-1), inside_BL


def bilinear_taps(token_BL2: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(index_BL4, weight_BL4): the four tokens round a place and their bilinear weights; the border repeats the edge."""
    h, w = hw
    x_BL = token_BL2[..., 0].clamp(0, w - 1)
    y_BL = token_BL2[..., 1].clamp(0, h - 1)
    x0_BL, y0_BL = x_BL.floor().clamp_max(max(w - 2, 0)), y_BL.floor().clamp_max(max(h - 2, 0))
    fx_BL, fy_BL = x_BL - x0_BL, y_BL - y0_BL
    indices, weights = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            row, col = (y0_BL + dy).clamp_max(h - 1), (x0_BL + dx).clamp_max(w - 1)
            indices.append((row * w + col).to(torch.int64))
            weights.append((fy_BL if dy else 1 - fy_BL) * (fx_BL if dx else 1 - fx_BL))
    return torch.stack(indices, dim=-1), torch.stack(weights, dim=-1)


def match_dates(
    doy_u_BT: Tensor, present_u_BT: Tensor, doy_v_BT: Tensor, present_v_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """(date_BT, ok_BT): for each date of u, the date of v nearest in the season (|Δ day of year|, circular).

    The views sample their dates independently, so "the same date" need not exist; the nearest day keeps what the season
    does to the ground out of the positive pair as far as possible (the predecessor pairs by index). Ties go to the earlier index.
    Unknown days pair by index. ok: u's date is present and v has any.
    """
    gap_BTT = (doy_u_BT[:, :, None].to(torch.int32) - doy_v_BT[:, None, :].to(torch.int32)).abs() % DAYS
    gap_BTT = torch.minimum(gap_BTT, DAYS - gap_BTT)
    index_u, index_v = (torch.arange(n, device=gap_BTT.device) for n in (doy_u_BT.shape[1], doy_v_BT.shape[1]))
    unknown_BTT = (doy_u_BT == 0)[:, :, None] | (doy_v_BT == 0)[:, None, :]
    gap_BTT = torch.where(unknown_BTT, UNKNOWN_DAYS + (index_u[:, None] - index_v[None, :]).abs(), gap_BTT)
    gap_BTT = torch.where(present_v_BT[:, None, :], gap_BTT, 1_000_000)
    # `min` may return any of several equal minima; scaling by the index makes the choice unique everywhere
    date_BT = (gap_BTT.to(torch.int64) * index_v.numel() + index_v).argmin(dim=-1)
    return date_BT, present_u_BT & present_v_BT.any(dim=-1, keepdim=True)


def choose_positions(valid_BTL: Tensor, number_B: Tensor, count: int) -> Tensor:
    """index_BTP of at most `count` positions per image: all of them in order if they fit, else valid ones first, hashed.

    The hash is of (sample number, date, position), so the choice does not depend on rank, micro-batch or device.
    """
    B, T, L = valid_BTL.shape
    if count >= L:
        return torch.arange(L, device=valid_BTL.device).expand(B, T, L)
    place_TL = torch.arange(T * L, device=valid_BTL.device).reshape(T, L)
    noise_BTL = _hash(number_B[:, None, None].to(torch.int64) * 1_000_003 + place_TL)
    order_BTL = torch.where(valid_BTL, noise_BTL, noise_BTL + (1 << 32))
    return order_BTL.argsort(dim=-1, stable=True)[..., :count]


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an integer, by the lowbias32 mixing steps, in int64 arithmetic that is the same on every device."""
    mask = 0xFFFFFFFF
    x = x & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 16)
