"""Token grids as whole numbers, no torch: how an axis is cut into windows and how a canvas becomes tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """Token grid of one modality over a view. hw: rows, columns of tokens; canvas: of pixels; stride: pixels per token side."""

    hw: tuple[int, int]
    canvas: tuple[int, int]
    stride: int


def axis_windows(length: int, window: int, shift: int) -> tuple[int, int, int]:
    """Window length, padded length and roll along one axis.

    The windows are [0, w), [w, 2w)… or, shifted by s, [0, s), [s, s + w)…: they depend on the position alone, never on
    the length, so that padding a grid cannot regroup its tokens. (Common implementations drop the shift on grids no
    larger than a window, which breaks exactly that.) Axes that need at most one window get one of their own length.
    """
    first = shift or window
    if length <= first:
        return length, length, 0
    if length <= window and window == 2 * shift:
        return shift, window, 0
    return window, math.ceil(length / window) * window, shift


def stage_sides(side_px: int, patch: int, merges: tuple[bool, bool, bool]) -> list[int]:
    """Tokens along one axis in each of the four stages."""
    sides = [math.ceil(side_px / patch)]
    for merge in merges:
        sides.append(math.ceil(sides[-1] / 2) if merge else sides[-1])
    return sides


def finest(grids: Mapping[str, TokenGrid]) -> str:
    """The modality whose token grid is the fusion grid: the finest; among equals the first configured."""
    return max(grids, key=lambda name: grids[name].hw[0] * grids[name].hw[1])


def coarsest(grids: Mapping[str, TokenGrid]) -> str:
    """The modality whose tokens are the cells of the fusion; among equals the first configured."""
    return min(grids, key=lambda name: grids[name].hw[0] * grids[name].hw[1])


def tokens_under(lead: TokenGrid, grid: TokenGrid, axis: int) -> list[int]:
    """For each token of `lead` along an axis, the token of `grid` under its centre."""
    return cell_under(lead.hw[axis], lead.stride, lead.canvas[axis], 1, grid.stride, grid.canvas[axis])


def cell_under(count: int, lead_stride: int, lead_canvas: int, r: int, stride: int, canvas: int) -> list[int]:
    """For each of `count` fusion cells along an axis, the cell of another modality (tokens unfolded r-fold) under its centre.

    All canvases show the same ground, so the fraction of the canvas is the common measure; whole numbers, no rounding.
    Centre of cell i: (2i + 1) · lead_stride / (2 · lead_canvas) of the canvas; cells of the other are stride / (r · canvas) of it.
    Centres beyond the canvas (padding) are held at its last cell; the leader has no valid token of its own only there.
    """
    last = -(-canvas // stride) * r - 1
    return [min((2 * i + 1) * lead_stride * r * canvas // (2 * lead_canvas * stride), last) for i in range(count)]
