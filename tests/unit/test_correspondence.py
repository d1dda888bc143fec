"""Correspondence of u and v: what is planted at a place on the ground is found there, whatever the crops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.losses.correspondence import Grid, bilinear_taps, choose_positions, locate, match_dates
from model.losses.mgcl import ViewTokens, pair_views, pool_student
from model.view_tokens import view_affine
from pipeline.reader import geometry
from tests.synthetic_batch import make_batch

turns = st.integers(0, 7)
metres = st.integers(-4, 12).map(lambda i: i * 10.0)


def grid_of(crop: geometry.Crop, pixels: int, stride: int = 1) -> Grid:
    affine = torch.from_numpy(geometry.affine(crop, pixels, crop.side_m / pixels))[None]
    tokens = -(-pixels // stride)
    return Grid(affine, (tokens, tokens), (float(stride), float(stride)), (pixels, pixels))


def token_centres(grid: Grid) -> torch.Tensor:
    """Site metres (east, south) of every token centre, [B, L, 2], one map after the other: the definition."""
    pixels = [((j + 0.5) * grid.stride[0], (i + 0.5) * grid.stride[1], 1.0) for i in range(grid.hw[0]) for j in range(grid.hw[1])]  # fmt: skip
    return torch.tensor(pixels, dtype=torch.float64) @ grid.affine_B23.double().transpose(1, 2)


def canvas_of(site: np.ndarray, crop: geometry.Crop, pixels: int) -> np.ndarray:
    """Unique site pixels (10 m) cut by array indexing alone, the way the reader lays a turned canvas out; -1 outside."""
    upright = np.full((pixels, pixels), -1, dtype=np.int64)
    for row in range(pixels):
        for column in range(pixels):
            y, x = int(crop.y0_m / 10) + row, int(crop.x0_m / 10) + column
            if 0 <= y < site.shape[0] and 0 <= x < site.shape[1]:
                upright[row, column] = site[y, x]
    return geometry.turned(upright, crop.turn).copy()


@settings(max_examples=60, deadline=None)
@given(metres, metres, turns, metres, metres, turns, st.integers(2, 9), st.integers(2, 9))
def test_a_unique_pixel_value_finds_itself(xu, yu, turn_u, xv, yv, turn_v, size_u, size_v) -> None:
    """Tokens of one pixel on the 10 m grid: every pixel of u that v shows too lands on the pixel with its own value."""
    site = np.arange(16 * 16).reshape(16, 16)
    u = geometry.Crop(xu, yu, size_u * 10.0, turn_u)
    v = geometry.Crop(xv, yv, size_v * 10.0, turn_v)
    values_u, values_v = canvas_of(site, u, size_u), canvas_of(site, v, size_v)
    token, inside = locate(grid_of(u, size_u), grid_of(v, size_v))
    taps, weights = bilinear_taps(token, (size_v, size_v))
    nearest = taps.gather(-1, weights.argmax(-1, keepdim=True))[0, :, 0].numpy()
    shown_in_v = np.isin(values_u, values_v[values_v >= 0]) & (values_u >= 0)
    for i, value in enumerate(values_u.reshape(-1)):
        if value < 0:
            continue
        assert bool(inside[0, i]) == bool(shown_in_v.reshape(-1)[i])
        if inside[0, i]:
            assert values_v.reshape(-1)[nearest[i]] == value
            assert float(weights[0, i].max()) > 1 - 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-30, 60), st.floats(-30, 60), turns, st.floats(-30, 60), st.floats(-30, 60), turns,
    st.floats(40, 120), st.floats(40, 120), st.sampled_from([(64, 16), (24, 4), (37, 4)]), st.sampled_from([(64, 32), (40, 8)]),
)  # fmt: skip
def test_bilinear_pairs_reproduce_the_ground(xu, yu, turn_u, xv, yv, turn_v, side_u, side_v, shape_u, shape_v) -> None:
    """Plant each token's own ground coordinates: bilinear sampling is exact for them inside, and off by at most half a token
    at the border (where the edge repeats). Different scales, strides, turns and canvases, on no common grid."""
    u = geometry.Crop(xu, yu, side_u, turn_u)
    v = geometry.Crop(xv, yv, side_v, turn_v)
    grid_u, grid_v = grid_of(u, *shape_u), grid_of(v, *shape_v)
    ground_u, ground_v = token_centres(grid_u), token_centres(grid_v)
    (h, w), (hu, wu) = grid_v.hw, grid_u.hw
    features = ground_v.reshape(1, 1, h, w, 2)
    tokens_u = ViewTokens(torch.ones(1, 1, hu, wu, dtype=torch.bool), torch.ones(1, 1, dtype=torch.int16), grid_u)
    tokens_v = ViewTokens(
        torch.ones(1, 1, h, w, dtype=torch.bool), torch.ones(1, 1, dtype=torch.int16), grid_v, features
    )
    pairing, pooled = pair_views(tokens_u, tokens_v, torch.zeros(1, dtype=torch.int64), 10_000, 2)
    token, _ = locate(grid_u, grid_v)
    interior = ((token >= 0) & (token <= torch.tensor([w - 1.0, h - 1.0]))).all(-1)[0]
    inside_v = [
        v.x0_m <= float(g[0]) <= v.x0_m + v.side_m and v.y0_m <= float(g[1]) <= v.y0_m + v.side_m for g in ground_u[0]
    ]
    token_m = side_v / shape_v[0] * shape_v[1]
    for i in range(ground_u.shape[1]):
        valid = bool(pairing.valid_BTP[0, 0, i])
        edge = min(
            abs(float(ground_u[0, i, a]) - o - s) for a, o in ((0, v.x0_m), (1, v.y0_m)) for s in (0.0, v.side_m)
        )
        if edge > 1e-6:
            assert valid == inside_v[i]
        if valid:
            off = (pooled.pixel[i] - ground_u[0, i]).abs().max()
            assert float(off) < (1e-3 if interior[i] else token_m), (i, float(off))


def test_student_rows_are_the_tokens_the_pairing_names() -> None:
    grid = Grid(torch.eye(3, dtype=torch.float64)[None, :2], (3, 4), (1.0, 1.0), (3, 4))
    features = torch.arange(12.0).reshape(1, 1, 3, 4, 1) + 1
    valid = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    u = ViewTokens(valid, torch.ones(1, 1, dtype=torch.int16), grid, features)
    pairing, pooled_v = pair_views(u, u, torch.zeros(1, dtype=torch.int64), 100, 2)
    pooled_u = pool_student(u, pairing)
    assert torch.equal(pairing.valid_BTP.reshape(-1), valid.reshape(-1))
    for level in ("pixel", "object", "image"):
        torch.testing.assert_close(getattr(pooled_u, level), getattr(pooled_v, level))
    assert torch.equal(pooled_u.pixel[valid.reshape(-1), 0], features[0, 0, ..., 0][valid[0, 0]])


def test_pairs_with_little_valid_ground_in_v_are_dropped_and_weights_renormalised() -> None:
    affine = torch.tensor([[[1.0, 0, 0.25], [0, 1, 0]]], dtype=torch.float64)  # u lies a quarter token east of v
    plain = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]], dtype=torch.float64)
    doy = torch.ones(1, 1, dtype=torch.int16)
    u = ViewTokens(torch.ones(1, 1, 1, 3, dtype=torch.bool), doy, Grid(affine, (1, 3), (1.0, 1.0), (1, 3)))
    valid_v = torch.tensor([[[[True, True, False]]]])
    features = torch.tensor([10.0, 20.0, float("nan")]).reshape(1, 1, 1, 3, 1)
    v = ViewTokens(valid_v, doy, Grid(plain, (1, 3), (1.0, 1.0), (1, 3)), features)
    pairing, pooled = pair_views(u, v, torch.zeros(1, dtype=torch.int64), 100, 1)
    assert pairing.valid_BTP[0, 0].tolist() == [True, True, False]
    torch.testing.assert_close(pooled.pixel[:, 0], torch.tensor([12.5, 20.0, 0.0]))


def test_dates_pair_by_season_and_missing_dates_by_nothing() -> None:
    doy_u = torch.tensor([[10, 360, 180, 0, 200]], dtype=torch.int16)
    present_u = torch.tensor([[True, True, True, True, False]])
    doy_v = torch.tensor([[5, 170, 350, 181]], dtype=torch.int16)
    date, ok = match_dates(doy_u, present_u, doy_v, torch.tensor([[True, True, True, False]]))
    # 10 → 5; 360 is 10 days from 350 and, over new year, from 5: the earlier index; 180 → 170, as 181 is absent;
    # the date of unknown day pairs by index
    assert date[0, :4].tolist() == [0, 0, 1, 2]
    assert ok.tolist() == [[True, True, True, True, False]]
    _, none = match_dates(doy_u, present_u, doy_v, torch.zeros(1, 4, dtype=torch.bool))
    assert not none.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_chosen_positions_are_distinct_valid_first_and_the_sample_s_own(seed, count, length, dates) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(3, dates, length, generator=generator) > 0.5
    number = torch.randint(0, 1 << 40, (3,), generator=generator)
    chosen = choose_positions(valid, number, count)
    assert chosen.shape[-1] == min(count, length)
    for b in range(3):
        alone = choose_positions(valid[b : b + 1], number[b : b + 1], count)
        assert torch.equal(alone[0], chosen[b])
        for t in range(dates):
            row = chosen[b, t]
            assert len(set(row.tolist())) == len(row)
            assert int(valid[b, t, row].sum()) == min(int(valid[b, t].sum()), len(row))


def test_choice_spreads_over_positions() -> None:
    chosen = choose_positions(torch.ones(500, 1, 100, dtype=torch.bool), torch.arange(500), 10)
    counts = torch.bincount(chosen.flatten(), minlength=100).float()
    assert float(counts.min()) > 25  # 50 expected, σ ≈ 6.7
    assert float(counts.max()) < 80


def test_fused_tokens_are_placed_also_where_the_leading_modality_is_absent() -> None:
    view = make_batch(3).u
    expected = view_affine(view, "hr")
    view.modalities["hr"].affine_B23[1] = 0
    torch.testing.assert_close(view_affine(view, "hr"), expected, rtol=1e-12, atol=1e-9)
