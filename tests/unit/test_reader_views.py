"""Views: what a canvas pixel shows is what its affine says it shows, for every turn, crop, codec and resolution."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.codec import encode, extension, open_member
from data_prep.sample import clear_fractions
from data_prep.schema import CLEAR, CLOUD
from model.augment import NEUTRAL as MODEL_NEUTRAL
from model.augment import PHOTOMETRIC as MODEL_PHOTOMETRIC
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.assemble import SiteMembers, fill_site
from pipeline.reader.buffers import BatchBuffers
from pipeline.reader.geometry import (
    GRID_M,
    MIN_OVERLAP,
    Crop,
    affine,
    copy_turned,
    turned,
    turned_box,
    unturned,
)
from pipeline.reader.resample import nearest, resample, taps
from pipeline.reader.views import (
    NEUTRAL,
    PHOTOMETRIC,
    SiteFacts,
    ViewPlan,
    choose_dates,
    draw_photometric,
    plan,
    plan_whole,
)

VIEW = ViewConfig(hr_px=32, series_px=8, s2_dates=3, s1_dates=2)
CROP = st.builds(
    Crop,
    st.integers(-9, 13).map(lambda n: 10.0 * n),
    st.integers(-9, 13).map(lambda n: 10.0 * n),
    st.just(80.0),
    st.integers(0, 7),
)


def coded_site(width: int = 12, height: int = 10, hr_per_px: int = 4, codec: str = "b2nd-lz4") -> SiteMembers:
    """A site of `width` x `height` 10 m pixels whose values say where they lie: s2 = 100·row + column + 10000·date (+1)."""

    def member(array: np.ndarray):
        return open_member(encode(array, codec, tile_px=16), extension(codec))

    def places(rows: int, columns: int, factor: int) -> np.ndarray:
        return np.arange(rows)[:, None] * factor + np.arange(columns)[None]

    s2 = np.stack([np.broadcast_to(places(height, width, 100) + 1 + 10_000 * t, (10, height, width)) for t in range(5)])
    hr_rows, hr_columns = height * hr_per_px, width * hr_per_px
    hr = np.stack([
        np.broadcast_to(np.arange(hr_rows)[:, None], (hr_rows, hr_columns)),
        np.broadcast_to(np.arange(hr_columns), (hr_rows, hr_columns)),
        np.zeros((hr_rows, hr_columns)),
    ])[None]  # fmt: skip
    masks = {
        "s2": np.full((5, 1, height, width), CLEAR, np.uint8),
        "hr": np.full((1, 1, hr_rows, hr_columns), CLEAR, np.uint8),
    }
    masks["s2"][:, 0, 3, 4] = CLOUD
    members = {"s2": member(s2.astype(np.uint16)), "hr": member(hr.astype(np.uint8))}
    members |= {f"{name}.mask": member(mask) for name, mask in masks.items()}
    members["label.landcover"] = member((places(height, width, 100)).astype(np.int16)[None, None])
    doy = {"s2": np.array([10, 50, 0, 150, 366], np.int16), "hr": np.array([200], np.int16)}
    return SiteMembers(members, doy, {"s2": np.full(5, 0.99), "hr": np.ones(1)}, 10.0 * width)


def filled(site: SiteMembers, plans: list[ViewPlan], view: ViewConfig = VIEW) -> BatchBuffers:
    buffers = BatchBuffers(2, [view] * len(plans), ("hr", "s2", "s1"), labelled=True)
    for arrays in buffers.views:  # what an earlier batch left behind must not shine through
        for m in arrays.modalities.values():
            m.x_BTCHW[...], m.valid_BTHW[...], m.doy_BT[...] = 77, True, 77
    fill_site(site, plans, buffers.views, 1)
    return buffers


def view_plan(crop: Crop, dates=(0, 2, 4), jitter=0) -> ViewPlan:
    dates = np.array(dates)
    return ViewPlan(
        crop, {"s2": dates, "hr": np.array([0])},
        {"s2": np.full(len(dates), jitter, np.int16), "hr": np.zeros(1, np.int16)}, np.array(NEUTRAL, np.float32),
    )  # fmt: skip


def ground(m, i: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Site metres (x, y) of every canvas pixel centre, by the affine alone."""
    side = m.x_BTCHW.shape[-1]
    column, row = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    x, y = m.affine_B23[i] @ np.stack([column.ravel(), row.ravel(), np.ones(side * side)])
    return x.reshape(side, side), y.reshape(side, side)


@settings(max_examples=60, deadline=None)
@given(CROP, CROP, CROP, st.sampled_from(["npy", "b2nd-lz4", "zarr.zip"]))
def test_every_pixel_lies_where_its_affine_says(a, b, c, codec):
    buffers = filled(coded_site(codec=codec), [view_plan(crop) for crop in (a, b, c)])
    for view in buffers.views:
        s2, hr = view.modalities["s2"], view.modalities["hr"]
        x, y = ground(s2)
        column, row = np.floor(x / 10).astype(int), np.floor(y / 10).astype(int)
        inside = (column >= 0) & (column < 12) & (row >= 0) & (row < 10)
        clear = inside & ~((column == 4) & (row == 3))
        for n, t in enumerate((0, 2, 4)):
            assert np.array_equal(s2.valid_BTHW[1, n], clear)
            assert np.array_equal(s2.x_BTCHW[1, n, 5][inside], (100 * row + column + 1 + 10_000 * t)[inside])
            assert (s2.x_BTCHW[1, n][:, ~inside] == 0).all()
        assert np.array_equal(view.classes_BHW[1][inside], (100 * row + column)[inside])
        assert (view.classes_BHW[1][~inside] == -1).all()
        x, y = ground(hr)
        column, row = np.floor(x / 2.5).astype(int), np.floor(y / 2.5).astype(int)
        inside = (column >= 0) & (column < 48) & (row >= 0) & (row < 40)
        assert np.array_equal(hr.valid_BTHW[1, 0], inside)
        assert np.array_equal(hr.x_BTCHW[1, 0, 0][inside], row[inside])
        assert np.array_equal(hr.x_BTCHW[1, 0, 1][inside], column[inside])
        assert not view.modalities["s1"].valid_BTHW[1].any()
        assert (view.modalities["s1"].doy_BT[1] == 0).all()
        assert (s2.x_BTCHW[0] == 77).all()  # the other row is untouched


@given(st.integers(0, 7))
def test_a_turn_and_its_inverse(turn):
    x = np.arange(2 * 5 * 5).reshape(2, 5, 5)
    assert np.array_equal(unturned(turned(x, turn), turn), x)
    assert np.array_equal(turned(unturned(x, turn), turn), x)
    assert len({turned(x, t).tobytes() for t in range(8)}) == 8


def test_a_known_point():
    """Worked by hand: a 80 m crop at (20, 30), columns flipped; the canvas's left edge is the crop's east edge."""
    assert np.allclose(affine(Crop(20, 30, 80, 1), 8, 10.0) @ [0, 0, 1], [100, 30])
    assert np.allclose(affine(Crop(20, 30, 80, 1), 8, 10.0) @ [8, 8, 1], [20, 110])
    assert np.allclose(affine(Crop(20, 30, 80, 4), 32, 2.5) @ [32, 0, 1], [20, 110])


def test_days_of_year_are_jittered_but_unknown_stays_unknown():
    buffers = filled(coded_site(), [view_plan(Crop(0, 0, 80), (1, 2, 4), jitter=3), view_plan(Crop(0, 0, 80), (0,))])
    assert buffers.views[0].modalities["s2"].doy_BT[1].tolist() == [53, 0, 3]
    assert buffers.views[1].modalities["s2"].doy_BT[1].tolist() == [10, 0, 0]
    assert not buffers.views[1].modalities["s2"].valid_BTHW[1, 1:].any()


@pytest.mark.parametrize("hr_per_px", [5, 3, 7])
@pytest.mark.parametrize("turn", [0, 6])
def test_another_resolution_is_resampled_onto_the_same_ground(hr_per_px, turn):
    """Values are linear in the ground, so that area averages and bilinear values are known exactly (rounding: half)."""
    site = coded_site(width=12, height=12, hr_per_px=hr_per_px)
    hr = filled(site, [view_plan(Crop(20, 10, 80, turn))]).views[0].modalities["hr"]
    x, y = ground(hr)
    assert hr.valid_BTHW[1, 0].all()
    assert np.abs(hr.x_BTCHW[1, 0, 1] - (x / 10 * hr_per_px - 0.5)).max() <= 0.51
    assert np.abs(hr.x_BTCHW[1, 0, 0] - (y / 10 * hr_per_px - 0.5)).max() <= 0.51


def test_a_crop_of_another_scale_leaves_the_rest_of_the_series_canvas_empty():
    view = filled(coded_site(), [view_plan(Crop(10, 20, 50, 3))]).views[0]
    s2, hr = view.modalities["s2"], view.modalities["hr"]
    x, y = ground(s2)
    inside = (x > 10) & (x < 60) & (y > 20) & (y < 70)
    assert inside.sum() == 25
    assert np.array_equal(s2.valid_BTHW[1, 0], inside & ~((x // 10 == 4) & (y // 10 == 3)))
    assert hr.gsd_B[1] == np.float32(50 / 32)
    assert hr.valid_BTHW[1].all()
    x, y = ground(hr)
    assert (x.min() > 10, x.max() < 60, y.min() > 20, y.max() < 70) == (True,) * 4


@settings(deadline=None, max_examples=40)
@given(st.floats(-3, 3), st.floats(0.2, 4), st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_resampling_matches_a_slow_reference(start, step, count, size, random):
    """Area averages by integrating the step function finely; invalid pixels weigh nothing."""
    x = np.array([[random.uniform(0, 100) for _ in range(size)] for _ in range(size)], np.float32)[None, None]
    valid = np.array([[random.random() < 0.8 for _ in range(size)] for _ in range(size)])[None]
    axis = taps(start, step, count, size)
    value, inside = resample(x, valid, axis, axis)
    index, weight = axis
    dense = np.zeros((count, size))
    for j in range(count):
        for i, w in zip(index[j], weight[j]):
            dense[j, i] += w
    if step >= 1:
        for j in range(count):
            fine = start + step * (j + (np.arange(4000) + 0.5) / 4000)
            expected = np.bincount(np.floor(fine[(fine >= 0) & (fine < size)]).astype(int), minlength=size) / 4000
            assert np.allclose(dense[j], expected, atol=2e-3)
    mass = dense @ valid[0] @ dense.T
    wanted = dense @ np.where(valid[0], x[0, 0], 0) @ dense.T
    assert np.array_equal(inside[0], mass >= 0.5) or np.abs(mass - 0.5).min() < 1e-4
    solid = mass > 1e-3
    assert np.allclose(value[0, 0][solid], (wanted / np.maximum(mass, 1e-9))[solid], rtol=1e-3, atol=1e-2)
    assert (nearest(start, step, count, size) < size).all()


@settings(deadline=None)
@given(st.integers(5, 80), st.integers(5, 80), st.integers(0, 10_000))
def test_u_and_v_overlap_and_local_views_share_ground_with_them(width_px, height_px, seed):
    data = DataConfig(views_global=ViewConfig(64, 16, 3, 2), views_local=ViewConfig(32, 8, 2, 2), local_views=3)
    site = SiteFacts(10.0 * width_px, 10.0 * height_px, {"s2": np.ones(5)})
    u, v, *local = plan(site, data, seed, 0, "site")
    for axis, room in (("x0_m", site.width_m), ("y0_m", site.height_m)):
        a, b = getattr(u.crop, axis), getattr(v.crop, axis)
        if room >= 160:
            assert min(a, b) >= 0
            assert max(a, b) + 160 <= room
            assert 160 - abs(a - b) >= MIN_OVERLAP * 160
        for crop in (u.crop, v.crop, *(p.crop for p in local)):
            assert getattr(crop, axis) % GRID_M == 0
        for crop in (p.crop for p in local):
            if room >= 80:
                assert max(min(a, b), 0) <= getattr(crop, axis)
                assert getattr(crop, axis) + 80 <= min(max(a, b) + 160, room)


def test_views_depend_on_their_key_and_nothing_else():
    data = DataConfig(views_global=ViewConfig(64, 16, 3, 2), local_views=1)
    site = SiteFacts(640.0, 640.0, {"s2": np.ones(30), "s1": np.ones(9)})

    def described(plans):
        return [(p.crop, {m: d.tolist() for m, d in p.dates.items()}, p.photometric_P.tolist()) for p in plans]

    first = described(plan(site, data, 0, 0, "a"))
    assert described(plan(site, data, 0, 0, "a")) == first
    more = described(plan(site, dataclasses.replace(data, local_views=4), 0, 0, "a"))
    assert more[:3] == first
    for seed, epoch, key in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert described(plan(site, data, seed, epoch, key)) != first


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 25), st.floats(0, 1))
def test_dates_are_ascending_clear_ones_first(clear, wanted, min_clear):
    clear = np.array(clear)
    chosen = choose_dates(clear, wanted, min_clear, np.random.default_rng(0).random(len(clear)))
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == min(wanted, np.count_nonzero(clear))
    enough = np.flatnonzero((clear >= min_clear) & (clear > 0))
    if len(enough) >= wanted:
        assert set(chosen) <= set(enough)
    else:
        assert set(enough) <= set(chosen)


def test_photometric_columns_are_the_models():
    assert PHOTOMETRIC == MODEL_PHOTOMETRIC
    assert NEUTRAL == MODEL_NEUTRAL
    assert np.array_equal(draw_photometric(np.full(12, 0.99)), np.array(NEUTRAL, np.float32))
    assert np.array_equal(draw_photometric(np.zeros(12), "none"), np.array(NEUTRAL, np.float32))
    jitter = draw_photometric(np.full(12, 1.0), "none", 0.05)
    assert np.allclose(jitter, [*NEUTRAL[:7], 1.05, 0.5])


def test_mild_augmentation_stays_between_nothing_and_dinos():
    generator = np.random.default_rng(0)
    for u in generator.random((200, 12)):
        full, mild = (draw_photometric(u, strength) - np.array(NEUTRAL, np.float32) for strength in ("dino", "mild"))
        assert (np.abs(mild) <= np.abs(full) + 1e-6).all()
        assert mild[5] == mild[6] == 0  # neither solarize nor grayscale


def test_the_whole_view_is_centred_and_takes_dates_evenly():
    whole = plan_whole(SiteFacts(320.0, 320.0, {"s2": np.ones(9)}), ViewConfig(64, 16, 3, 2))
    assert (whole.crop.x0_m, whole.crop.y0_m, whole.crop.turn) == (80.0, 80.0, 0)
    assert whole.dates["s2"].tolist() == [0, 4, 8]


@given(
    st.integers(0, 7),
    st.sampled_from([(3, 128, 128), (128, 128), (1, 2, 130, 130), (1, 129, 136)]),
    st.sampled_from(["u1", "u2", "f2", "?"]),
)
def test_fast_copies_equal_plain_ones(turn, shape, dtype):
    source = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    height, width = shape[-2:]
    canvas = np.zeros((*shape[:-2], 140, 140), dtype)
    wanted = canvas.copy()
    unturned(wanted, turn)[..., 2 : 2 + height, 1 : 1 + width] = source
    copy_turned(source, canvas[..., *turned_box((2, 2 + height), (1, 1 + width), 140, turn)], turn)
    assert np.array_equal(canvas, wanted)


def test_only_a_wholly_clear_date_counts_as_clear():
    """The reader does not decode masks of dates with share 1.0, so rounding must not make one."""
    mask = np.full((2, 2048, 2048), CLEAR, np.uint8)
    mask[1, 5, 5] = CLOUD
    assert clear_fractions(mask) == [1.0, 0.999999]


@pytest.mark.parametrize("codec", ["npy", "b2nd-lz4", "b2nd-zstd", "zarr.zip"])
@pytest.mark.parametrize("side", [8, 40])
def test_several_dates_at_once_are_those_dates(codec, side):
    array = np.random.default_rng(0).integers(0, 3000, (6, 3, side, side)).astype(np.uint16)
    member = open_member(encode(array, codec, tile_px=16), extension(codec))
    out = np.empty((3, 3, side, side), np.uint16)
    member.read_dates([5, 0, 2], out)
    assert np.array_equal(out, array[[5, 0, 2]])
    wide = np.empty((3, 3, side, 2 * side), np.uint16)[..., :side]
    member.read_dates([1, 1, 4], wide)
    assert np.array_equal(wide, array[[1, 1, 4]])
    with pytest.raises(IndexError):
        member.read_dates([0, 6, 1], out)
