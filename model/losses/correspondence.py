"""Which token of view v shows the ground of a token of view u: exact, from the crops' affine maps.

Geometry is computed in float64. A token's place is its centre on the canvas: token (i, j) of stride s lies at pixel
((j + ½)s, (i + ½)s), pixel centres at +0.5 as in `ModalityView.affine_B23`.

Legend: B sites · T dates · h, w token grid · L = h·w · P chosen positions · D feature dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
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


@functools.lru_cache(maxsize=64)
def centre_pixels(grid: tuple[int, int], stride: tuple[float, float], device: torch.device) -> Tensor:
    """Pixels (x, y) of all token centres on the canvas, float64 [L, 2]; made once."""
    row_L, col_L = (a.reshape(-1) for a in np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij"))
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        return torch.from_numpy(np.stack([(col_L + 0.5) * stride[0], (row_L + 0.5) * stride[1]], -1)).to(device)


@functools.lru_cache(maxsize=64)
def _vector(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 on the device; sent there once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)


def locate(u: Grid, v: Grid) -> tuple[Tensor, Tensor]:
    """(token_BL2, inside_BL): where u's token centres lie on v's grid, in token units (column, row; token centres at integers).

    inside: the point lies on v's canvas. A degenerate affine (all zero, an absent modality) is nowhere. The two affine maps are
    composed per site, so that tokens cost one map: x_v = A_v⁻¹ (A_u x_u + t_u − t_v).
    """
    device = u.affine_B23.device
    (turn_u_B22, shift_u_B21), (turn_v_B22, shift_v_B21) = (
        grid.affine_B23.to(torch.float64).split([2, 1], dim=-1) for grid in (u, v)
    )
    (a_B, b_B), (c_B, d_B) = (row_B2.unbind(-1) for row_B2 in turn_v_B22.unbind(-2))
    adjoint_B22 = torch.stack([d_B, -b_B, -c_B, a_B], -1).unflatten(-1, (2, 2))
    det_B = a_B * d_B - b_B * c_B
    usable_B = det_B.abs() > 1e-12
    inverse_B22 = adjoint_B22 / det_B.masked_fill(~usable_B, 1.0)[:, None, None]
    turn_B22, shift_B2 = inverse_B22 @ turn_u_B22, (inverse_B22 @ (shift_u_B21 - shift_v_B21))[..., 0]
    # x and y by hand: elementwise, so that a site's bits do not depend on how many stand beside it
    from_x_B12, from_y_B12 = (column_B2[:, None] for column_B2 in turn_B22.unbind(-1))
    x_L1, y_L1 = centre_pixels(u.hw, u.stride, device).split(1, dim=-1)
    pixel_BL2 = shift_B2[:, None] + from_x_B12 * x_L1 + from_y_B12 * y_L1
    height, width = v.canvas
    on_canvas_BL = ((pixel_BL2 >= 0) & (pixel_BL2 <= _vector((width, height), device))).all(-1)
    return pixel_BL2 / _vector(v.stride, device) - 0.5, on_canvas_BL & usable_B[:, None]


def bilinear_taps(token_BL2: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(index_BL4, weight_BL4): the four tokens round a place and their bilinear weights; the border repeats the edge."""
    h, w = hw
    device = token_BL2.device
    zero_2, last_2 = _vector((0.0, 0.0), device), _vector((w - 1.0, h - 1.0), device)
    token_BL2 = token_BL2.clamp(zero_2, last_2)
    low_BL2 = token_BL2.floor().minimum(_vector((max(w - 2.0, 0.0), max(h - 2.0, 0.0)), device))
    share_BL2 = token_BL2 - low_BL2
    place_BL22 = torch.stack([low_BL2, (low_BL2 + 1).minimum(last_2)], -1)
    weight_BL22 = torch.stack([1 - share_BL2, share_BL2], -1)
    (x_BL2, y_BL2), (of_x_BL2, of_y_BL2) = place_BL22.unbind(2), weight_BL22.unbind(2)
    index_BL22 = y_BL2[..., :, None] * w + x_BL2[..., None, :]
    return index_BL22.flatten(2).to(torch.int64), (of_y_BL2[..., :, None] * of_x_BL2[..., None, :]).flatten(2)


def match_dates(
    doy_u_BT: Tensor, present_u_BT: Tensor, doy_v_BT: Tensor, present_v_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """(date_BT, ok_BT): for each date of u, the date of v nearest in the season (|Δ day of year|, circular).

    The views sample their dates independently, so "the same date" need not exist; the nearest day keeps what the season
    does to the ground out of the positive pair as far as possible (the predecessor pairs by index). Ties go to the earlier index.
    Unknown days pair by index. ok: u's date is present and v has any.
    """
    if doy_v_BT.shape[1] == 1:  # nothing to choose from
        return torch.zeros_like(doy_u_BT, dtype=torch.int64), present_u_BT & present_v_BT
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
