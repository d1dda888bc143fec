"""Resampling of a crop whose pixels do not fall on the canvas's: exact area averages when shrinking, bilinear when growing.

Only needed when a site's resolution differs from the canvas's (an hr of 0.2 m on a canvas of 0.3125 m); aligned crops are
copied. Invalid source pixels weigh nothing; a canvas pixel is valid if at least half of its weight came from valid ones.
"""

from __future__ import annotations

import numpy as np

MIN_VALID_WEIGHT = 0.5


def taps(start: float, step: float, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices [count, K] and weights [count, K] along one axis.

    Canvas pixel j covers the source interval [start + j·step, start + (j+1)·step) in source pixels. step >= 1: weights are the
    lengths shared with each source pixel over step. step < 1: the two source pixels around the centre, linearly. Weight
    that falls outside [0, size) is lost, so rows may sum to less than 1.
    """
    begin = start + step * np.arange(count)
    if step >= 1:
        number = int(np.ceil(step)) + 1
        index = np.floor(begin + 1e-9).astype(np.int64)[:, None] + np.arange(number)
        shared = np.minimum(begin[:, None] + step, index + 1) - np.maximum(begin[:, None], index)
        weight = np.clip(shared, 0, None) / step
    else:
        centre = begin + step / 2 - 0.5
        first = np.floor(centre).astype(np.int64)
        fraction = centre - first
        index = first[:, None] + np.arange(2)
        # at the very edge the one pixel that exists counts fully, as long as the centre itself lies inside
        inside = (begin + step / 2 >= 0) & (begin + step / 2 <= size)
        index = np.where(inside[:, None], np.clip(index, 0, size - 1), index)
        weight = np.stack([1 - fraction, fraction], axis=1)
    outside = (index < 0) | (index >= size)
    return np.clip(index, 0, size - 1), np.where(outside, 0.0, weight).astype(np.float32)


def resample(
    x_NCHW: np.ndarray,
    valid_NHW: np.ndarray,
    rows: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Canvas pixels (same dtype) [N, C, h, w] and their validity [N, h, w]. rows, columns: `taps` of either axis."""
    valid = valid_NHW[:, None].astype(np.float32)
    filled = np.where(valid_NHW[:, None], x_NCHW, 0).astype(np.float32)
    value = _along(_along(filled, columns, 3), rows, 2)
    weight = _along(_along(valid, columns, 3), rows, 2)
    value /= np.maximum(weight, 1e-6)
    if np.issubdtype(x_NCHW.dtype, np.integer):
        limits = np.iinfo(x_NCHW.dtype)
        value = np.clip(np.rint(value), limits.min, limits.max)
    return value.astype(x_NCHW.dtype), weight[:, 0] >= MIN_VALID_WEIGHT


def nearest(start: float, step: float, count: int, size: int) -> np.ndarray:
    """Source index under the centre of each canvas pixel (int64 [count]), -1 outside: for class labels."""
    index = np.floor(start + step * (np.arange(count) + 0.5)).astype(np.int64)
    return np.where((index < 0) | (index >= size), -1, index)


def _along(x: np.ndarray, tap: tuple[np.ndarray, np.ndarray], axis: int) -> np.ndarray:
    index, weight = tap
    shape = [1, 1, 1, 1]
    shape[axis] = len(index)
    total = np.take(x, index[:, 0], axis) * weight[:, 0].reshape(shape)
    for k in range(1, index.shape[1]):
        total += np.take(x, index[:, k], axis) * weight[:, k].reshape(shape)
    return total
