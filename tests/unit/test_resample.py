"""Putting pixels onto another grid: exact copies, half-pixel exact interpolation, the right kernel per kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.warp import Resampling

from data_prep.geo import Grid, aligned_offset, grid_over, snap_inward
from data_prep.resample import _reproject, needed_window, place, refine

CRS = "EPSG:32633"


def grid(x: float, y: float, gsd: float, width: int, height: int, crs: str = CRS) -> Grid:
    return Grid(crs, (gsd, 0.0, x, 0.0, -gsd, y), width, height)


def ramp(where: Grid, scale: float = 1.0) -> np.ndarray:
    """f(x, y) = x + 2 y at pixel centres, shifted to be positive; bilinear must reproduce it exactly."""
    a, _, c, _, e, f = where.transform
    xs = c + a * (np.arange(where.width) + 0.5)
    ys = f + e * (np.arange(where.height) + 0.5)
    return ((xs[None] - 500_000) + 2 * (5_300_000 - ys[:, None])) * scale + 1000


@given(st.integers(-6, 20), st.integers(-6, 20), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_aligned_grids_copy_bit_for_bit(row, col, height, width, seed):
    source = grid(500_000, 5_300_000, 10, 14, 11)
    target = grid(500_000 + col * 10, 5_300_000 - row * 10, 10, width, height)
    values = np.random.default_rng(seed).integers(1, 65535, (2, 11, 14)).astype(np.uint16)
    window = needed_window(source, target, "reflectance")
    canvas = np.zeros((2, 60, 60), np.uint16)
    canvas[:, 20:31, 20:34] = values
    expected = canvas[:, 20 + row : 20 + row + height, 20 + col : 20 + col + width]
    if window is None:
        assert not expected.any()
        return
    r0, r1, c0, c1 = window
    out, valid = place(
        values[:, r0:r1, c0:c1], np.ones((r1 - r0, c1 - c0), bool), source.sub(window), target, "reflectance"
    )
    assert (out == expected).all()
    assert (valid == (expected[0] > 0)).all()


def test_a_whole_source_is_cropped_to_the_target():
    source, target = grid(500_000, 5_300_000, 10, 14, 11), grid(500_030, 5_299_950, 10, 4, 20)
    values = np.arange(1, 155, dtype=np.uint16).reshape(1, 11, 14)
    out, valid = place(values, np.ones((11, 14), bool), source, target, "reflectance")
    assert (out[0, :6] == values[0, 5:11, 3:7]).all()
    assert (valid.sum(), out[0, 6:].any()) == (24, False)


@pytest.mark.parametrize(("from_m", "to_m"), [(20, 10), (10, 10), (60, 10)])
@pytest.mark.parametrize("shift", [0.0, 3.3, -4.9])
def test_bilinear_is_half_pixel_exact(from_m, to_m, shift):
    source = grid(500_000 + shift, 5_300_000 - shift, from_m, 40, 40)
    target = grid(500_000 + 4 * from_m, 5_300_000 - 4 * from_m, to_m, 24, 24)
    window = needed_window(source, target, "reflectance")
    values = ramp(source)[None].astype(np.float32)
    r0, r1, c0, c1 = window
    window_values = values[:, r0:r1, c0:c1].astype(np.uint16)
    out, valid = place(window_values, np.ones((r1 - r0, c1 - c0), bool), source.sub(window), target, "reflectance")
    assert valid.all()
    assert np.abs(out[0].astype(float) - ramp(target)).max() <= 1.5  # rounding of source and of result


def test_finer_pixels_are_averaged_not_picked():
    source, target = grid(500_000, 5_300_000, 2.5, 64, 64), grid(500_000, 5_300_000, 10, 16, 16)
    checker = np.indices((64, 64)).sum(axis=0) % 2 * 200
    out, _ = place(checker[None].astype(np.uint8), np.ones((64, 64), bool), source, target, "colour")
    assert np.abs(out[0, 2:-2, 2:-2].astype(int) - 100).max() <= 2


def test_db_is_averaged_in_linear_power():
    source, target = grid(500_000, 5_300_000, 10, 8, 8), grid(500_005, 5_299_995, 10, 6, 6)
    values = np.where(np.indices((8, 8)).sum(axis=0) % 2 == 0, 0.0, -20.0)[None].astype(np.float32)
    out, valid = place(values, np.ones((8, 8), bool), source, target, "backscatter")
    assert valid.all()
    np.testing.assert_allclose(out, 10 * np.log10((1 + 0.01) / 2), atol=1e-4)  # not -10, the mean of the dB


def test_classes_are_never_mixed():
    source, target = grid(500_000, 5_300_000, 10, 8, 8), grid(500_003, 5_299_996, 7, 10, 10)
    values = np.random.default_rng(0).choice([3, 9, 200], (1, 8, 8)).astype(np.int32)
    out, valid = place(values, np.ones((8, 8), bool), source, target, "class")
    assert set(np.unique(out[:, valid])) <= {3, 9, 200}
    rows = np.floor((5_300_000 - (5_299_996 - 7 * (np.arange(10) + 0.5))) / 10).astype(int)
    cols = np.floor((500_003 + 7 * (np.arange(10) + 0.5) - 500_000) / 10).astype(int)
    assert (out[0][valid] == values[0][np.ix_(rows, cols)][valid]).all()


def test_invalid_pixels_do_not_leak_into_neighbours():
    source, target = grid(500_000, 5_300_000, 10, 8, 8), grid(500_004, 5_299_996, 10, 7, 7)
    valid_in = np.ones((8, 8), bool)
    valid_in[3, 3] = False
    values = np.full((1, 8, 8), 500, np.uint16)
    values[:, ~valid_in] = 0
    out, valid = place(values, valid_in, source, target, "reflectance")
    assert (out[:, valid] == 500).all()
    assert (out[:, ~valid] == 0).all()
    assert valid.sum() >= 48


def test_outside_is_invalid_and_apart_is_none():
    source = grid(500_000, 5_300_000, 10, 8, 8)
    assert needed_window(source, grid(600_000, 5_300_000, 10, 8, 8), "reflectance") is None
    assert needed_window(source, grid(500_083, 5_300_000, 10, 8, 8), "reflectance") is None
    half = grid(500_043, 5_300_000, 10, 8, 8)
    window = needed_window(source, half, "reflectance")
    r0, r1, c0, c1 = window
    _, valid = place(
        np.full((1, r1 - r0, c1 - c0), 7, np.uint16),
        np.ones((r1 - r0, c1 - c0), bool),
        source.sub(window),
        half,
        "reflectance",
    )
    assert valid[:, :3].all()
    assert not valid[:, 4:].any()


@given(st.floats(0.002, 0.998), st.sampled_from([0.2, 0.3125, 10.0]))
def test_a_shifted_grid_is_never_taken_for_the_same(shift, gsd):
    source = grid(500_000, 5_300_000, gsd, 50, 50)
    moved = grid(500_000 + shift * gsd, 5_300_000, gsd, 50, 50)
    assert aligned_offset(source, moved) is None


def test_rounded_metadata_still_counts_as_the_same_grid():
    source = grid(717729.8352053782, 5700093.330553154, 10, 224, 224)
    rounded = grid(717729.835205, 5700093.330553, 10, 100, 100)
    assert aligned_offset(source, rounded) == (0, 0)
    assert aligned_offset(source, dataclasses.replace(rounded, crs="EPSG:32733")) is None


@given(st.floats(0, 40), st.floats(0, 40), st.floats(60, 150), st.floats(60, 150))
def test_snapping_goes_inward_by_less_than_a_pixel(left, bottom, right, top):
    lattice = grid(499_990, 5_300_200, 10, 100, 100)
    bounds = (500_000 + left, 5_300_000 + bottom, 500_000 + right, 5_300_000 + top)
    snapped = snap_inward(bounds, lattice)
    if snapped is None:
        return
    inner = (snapped[0] - bounds[0], snapped[1] - bounds[1], bounds[2] - snapped[2], bounds[3] - snapped[3])
    assert all(-0.2001 <= gap < 10 for gap in inner)
    assert aligned_offset(lattice, grid_over(CRS, snapped, 10)) is not None


@given(
    st.floats(-12, 30), st.floats(-12, 30), st.sampled_from([(20, 10), (60, 10), (10, 10), (10, 7), (20, 3)]), st.integers(0, 2**31)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_fast_bilinear_equals_gdal(dx, dy, gsds, seed):
    source_m, target_m = gsds
    rng = np.random.default_rng(seed)
    source = grid(500_000, 5_300_000, source_m, 9, 8)
    target = grid(500_000 + dx, 5_300_000 - dy, target_m, 14, 13)
    values = rng.uniform(1, 5000, (2, 8, 9)).astype(np.float32)
    values[:, rng.random((8, 9)) < 0.2] = np.nan
    fast, slow = refine(values, source, target), _reproject(values, source, target, Resampling.bilinear)
    both = np.isfinite(fast) & np.isfinite(slow)
    assert (np.isfinite(fast) == np.isfinite(slow)).mean() > 0.99  # centres exactly on an edge may fall either side
    np.testing.assert_allclose(fast[both], slow[both], rtol=2e-3, atol=0.5)
