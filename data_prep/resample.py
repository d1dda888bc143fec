"""Putting pixels of one grid onto another, half-pixel exact, with the kernel that suits the kind of number.

    kind          kernel                      because
    reflectance   bilinear                    continuous, linear in radiance
    colour        bilinear                    same, 8 bit
    backscatter   bilinear in linear power    an average of dB is not the dB of an average
    continuous    bilinear                    elevation and other quantities
    class         nearest                     labels and masks have no in-between

Where both grids already coincide nothing is resampled: pixels are copied bit for bit. When the target is coarser, GDAL widens
the bilinear kernel by the ratio, so fine pixels are averaged, not picked. Invalid pixels never leak: a target pixel whose centre
lies in one is invalid, elsewhere the weights of the valid neighbours are renormalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

from data_prep.geo import Grid, Window, aligned_offset, covering_window, same_crs

Kind = Literal["reflectance", "colour", "backscatter", "continuous", "class"]
LIMITS: dict[str, tuple[int, int]] = {"reflectance": (1, 65535), "colour": (0, 255)}


def needed_window(source: Grid, target: Grid, kind: Kind) -> Window | None:
    """The window of `source` to read for `place`: exact when aligned, with the kernel's margin otherwise; None if apart."""
    offset = aligned_offset(source, target)
    if offset is not None:
        row0, row1 = max(offset[0], 0), min(offset[0] + target.height, source.height)
        col0, col1 = max(offset[1], 0), min(offset[1] + target.width, source.width)
        return (row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None
    shrink = max(target.gsd_m() / max(source.gsd_m(), 1e-12), 1.0)
    return covering_window(source, target, margin_px=2 if kind == "class" else math.ceil(2 * shrink) + 2)


def place(
    values_CHW: np.ndarray, valid_HW: np.ndarray, source: Grid, target: Grid, kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    """`values` on `source` (the grid of the window that was read) put onto `target`.

    Returns:
        values [C, H, W] of the same dtype, 0 (backscatter: NaN) where invalid, and valid [H, W] bool.
    """
    offset = aligned_offset(source, target)
    fill = np.nan if kind == "backscatter" else 0
    if offset is None:
        return _warp(values_CHW, valid_HW, source, target, kind)
    # offset = position of the target's corner in the source; negative where the target begins before it
    src_r, src_c = max(offset[0], 0), max(offset[1], 0)
    dst_r, dst_c = max(-offset[0], 0), max(-offset[1], 0)
    height = min(source.height - src_r, target.height - dst_r)
    width = min(source.width - src_c, target.width - dst_c)
    if (height, width) == target.shape:  # the usual case: all of the target is there
        window = np.s_[src_r : src_r + height, src_c : src_c + width]
        out_CHW, out_valid_HW = values_CHW[:, *window].copy(), valid_HW[window].copy()
        if not out_valid_HW.all():
            out_CHW[:, ~out_valid_HW] = fill
        return out_CHW, out_valid_HW
    out_CHW = np.full((values_CHW.shape[0], *target.shape), fill, dtype=values_CHW.dtype)
    out_valid_HW = np.zeros(target.shape, dtype=bool)
    if height > 0 and width > 0:
        src, dst = (
            np.s_[src_r : src_r + height, src_c : src_c + width],
            np.s_[dst_r : dst_r + height, dst_c : dst_c + width],
        )
        out_CHW[:, *dst] = values_CHW[:, *src]
        out_valid_HW[dst] = valid_HW[src]
        out_CHW[:, ~out_valid_HW] = fill
    return out_CHW, out_valid_HW


def is_copy(source: Grid, target: Grid) -> bool:
    """Whether `place` copies without resampling."""
    return aligned_offset(source, target) is not None


def _warp(
    values_CHW: np.ndarray, valid_HW: np.ndarray, source: Grid, target: Grid, kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    if kind == "class":
        inside = _reproject(valid_HW[None].astype(np.float32), source, target, Resampling.nearest)[0]
        classes = _reproject(values_CHW.astype(np.float32), source, target, Resampling.nearest)
        valid = inside > 0.5
        return np.where(valid, np.nan_to_num(classes), 0).astype(values_CHW.dtype), valid
    work = values_CHW.astype(np.float32)
    if kind == "backscatter":
        work = np.power(10.0, work / 10.0, dtype=np.float32)
    work[:, ~valid_HW] = np.nan
    if _is_plain_refinement(source, target):
        out = refine(work, source, target)
    else:
        out = _reproject(work, source, target, Resampling.bilinear)
    valid = np.isfinite(out).all(axis=0)
    if kind == "backscatter":
        with np.errstate(divide="ignore", invalid="ignore"):
            out = np.float32(10) * np.log10(out)
        out[:, ~valid] = np.nan
        return out.astype(values_CHW.dtype), valid
    if values_CHW.dtype.kind == "f":
        out[:, ~valid] = 0
        return out.astype(values_CHW.dtype), valid
    limits = np.iinfo(values_CHW.dtype)
    low, high = LIMITS.get(kind, (limits.min, limits.max))
    rounded = np.clip(np.rint(np.nan_to_num(out)), low, high)
    rounded[:, ~valid] = 0
    return rounded.astype(values_CHW.dtype), valid


def _is_plain_refinement(source: Grid, target: Grid) -> bool:
    """Same CRS, both north up, target pixels not larger: bilinear weights are then a product of two small tables."""
    if not (same_crs(source.crs, target.crs) and source.is_north_up and target.is_north_up):
        return False
    return target.transform[0] <= source.transform[0] * 1.0001 and target.transform[4] >= source.transform[4] * 1.0001


def refine(values_CHW: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
    """Bilinear onto equal or finer pixels of the same CRS; NaN = nothing. Equal to the GDAL warp, without its overhead.

    As there, a target pixel whose centre lies in an invalid source pixel is invalid; else the valid neighbours' weights count.
    """
    _, _, left, _, _, top = source.transform
    _, _, to_left, _, _, to_top = target.transform
    cols = _taps(source.transform[0], left, source.width, target.transform[0], to_left, target.width)
    rows = _taps(source.transform[4], top, source.height, target.transform[4], to_top, target.height)
    valid = np.isfinite(values_CHW)
    total = _interpolate(np.where(valid, values_CHW, np.float32(0)), rows, cols)
    weight = _interpolate(valid.astype(np.float32), rows, cols)
    inside = valid[:, rows.nearest][:, :, cols.nearest] & rows.inside[:, None] & cols.inside
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(inside, total / weight, np.float32(np.nan)).astype(np.float32)


@dataclass(frozen=True)
class _Taps:
    """Along one axis, per target pixel: the two source pixels, the weight of the second, the pixel it lies in, if any."""

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    nearest: np.ndarray
    inside: np.ndarray


def _taps(step: float, origin: float, size: int, to_step: float, to_origin: float, to_size: int) -> _Taps:
    centre = (to_origin + to_step * (np.arange(to_size) + 0.5) - origin) / step
    first = np.floor(centre - 0.5).astype(np.int64)
    return _Taps(
        first=np.clip(first, 0, size - 1),
        second=np.clip(first + 1, 0, size - 1),
        weight=(centre - 0.5 - first).astype(np.float32),
        nearest=np.clip(np.floor(centre).astype(np.int64), 0, size - 1),
        inside=(centre >= 0) & (centre < size),
    )


def _interpolate(values_CHW: np.ndarray, rows: _Taps, cols: _Taps) -> np.ndarray:
    across = values_CHW[:, :, cols.first] * (1 - cols.weight) + values_CHW[:, :, cols.second] * cols.weight
    return across[:, rows.first] * (1 - rows.weight)[:, None] + across[:, rows.second] * rows.weight[:, None]


def _reproject(values_CHW: np.ndarray, source: Grid, target: Grid, kernel: Resampling) -> np.ndarray:
    """GDAL warp of float32, NaN = nothing, with exact (not approximated) coordinates per pixel."""
    out = np.full((values_CHW.shape[0], *target.shape), np.nan, dtype=np.float32)
    reproject(
        values_CHW, out,
        src_transform=Affine(*source.transform), src_crs=CRS.from_user_input(source.crs), src_nodata=np.nan,
        dst_transform=Affine(*target.transform), dst_crs=CRS.from_user_input(target.crs), dst_nodata=np.nan,
        resampling=kernel, tolerance=0.0, num_threads=1,
    )  # fmt: skip
    return out
