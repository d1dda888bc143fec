"""How grids of tokens are cut into SwinV2's (shifted) windows, as places in an array; no torch.

Dimension legend: K windows of one grid · S tokens of a window's frame · h, w tokens of a grid.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from model.grids import axis_windows


class Cells(NamedTuple):
    """Windows of one grid size; the same for all images of that size.

    Attributes:
        frame: window rows, columns.
        cell_KS: place of each slot's token in the grid (row · w + column), -1 where the slot lies beyond it.
        region_KS: slots of one window see each other only within a region (the cyclic shift joins opposite borders).
    """

    frame: tuple[int, int]
    cell_KS: np.ndarray
    region_KS: np.ndarray


@functools.lru_cache(maxsize=256)
def window_cells(height: int, width: int, window: int, shift: int) -> Cells:
    """Windows are tied to places, never to a grid's length (`grids.axis_windows`)."""
    axes = []
    for length in (height, width):
        size, padded, roll = axis_windows(length, window, shift)
        place = (np.arange(padded) + roll) % padded
        wrapped = np.arange(padded) >= padded - roll if roll else np.zeros(padded, bool)
        axes.append((size, np.where(place < length, place, -1).reshape(-1, size), wrapped.reshape(-1, size)))
    (frame_h, rows_Kh, wrap_Kh), (frame_w, cols_Kw, wrap_Kw) = axes
    row, col = rows_Kh[:, None, :, None], cols_Kw[None, :, None, :]
    cell = np.where((row >= 0) & (col >= 0), row * width + col, -1)
    region = 2 * wrap_Kh[:, None, :, None] + wrap_Kw[None, :, None, :]
    span = frame_h * frame_w
    return Cells((frame_h, frame_w), cell.reshape(-1, span), np.broadcast_to(region, cell.shape).reshape(-1, span))


@functools.lru_cache(maxsize=64)
def offset_index(frame: tuple[int, int], window: int) -> np.ndarray:
    """Entry of the (2w-1)² table of position biases for each (query, key) pair of a frame, [S, S]."""
    rows, cols = (a.reshape(-1) for a in np.meshgrid(np.arange(frame[0]), np.arange(frame[1]), indexing="ij"))
    dy, dx = (a[:, None] - a[None, :] + window - 1 for a in (rows, cols))
    return dy * (2 * window - 1) + dx


@functools.lru_cache(maxsize=16)
def bias_coordinates(window: int) -> np.ndarray:
    """Log-spaced relative coordinates of SwinV2's continuous position bias, float64 [(2w-1)², 2] (arXiv 2111.09883 eq. 4):
    8 · Δ / (w-1), then sign(Δ) · log2(1 + |Δ|) / log2(8).
    """
    axis = np.arange(-(window - 1), window, dtype=np.float64) * (8.0 / max(window - 1, 1))
    axis = np.sign(axis) * np.log2(np.abs(axis) + 1.0) / math.log2(8.0)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
