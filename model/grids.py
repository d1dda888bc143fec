"""Token grids as whole numbers, no torch: how an axis is cut into windows and how a canvas becomes tokens."""

from __future__ import annotations

import math


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
