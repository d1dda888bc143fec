"""What the network takes: normalisation, hr augmentation, collapse figures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cluster.errors import UsageError
from model.augment import NEUTRAL, PHOTOMETRIC, apply_photometric, photometric
from model.collapse import USAGE_WINDOW, effective_rank, feature_metrics, update_age
from model.inputs import CLIP, normalise
from pipeline.reader import views
from tests.synthetic_batch import STATISTICS, make_batch


def test_normalisation_is_per_band_over_valid_pixels_and_nan_never_passes() -> None:
    view = make_batch(2).u
    s2 = view.modalities["s2"]
    s2.x_BTCHW = torch.where(s2.valid_BTHW[:, :, None], torch.arange(10.0)[:, None, None] * 100 + 7, float("nan"))
    statistics = {**STATISTICS, "s2": {"mean": [100.0 * b for b in range(10)], "std": [7.0] * 10}}
    x = normalise(view, statistics).modalities["s2"].x_BTCHW
    assert x.dtype == torch.float32
    assert torch.equal(x, s2.valid_BTHW[:, :, None].float().expand_as(x))


def test_stored_dtypes_and_outliers() -> None:
    view = make_batch(1).u
    s2 = view.modalities["s2"]
    s2.x_BTCHW = torch.full_like(s2.x_BTCHW, 60_000).to(torch.uint16)
    x = normalise(view, STATISTICS).modalities["s2"].x_BTCHW
    assert float(x.max()) == CLIP


def test_statistics_that_do_not_fit_are_named() -> None:
    view = make_batch(1).u
    with pytest.raises(UsageError, match="no statistics of s1"):
        normalise(view, {k: v for k, v in STATISTICS.items() if k != "s1"})
    with pytest.raises(UsageError, match="s2 have 2 bands"):
        normalise(view, {**STATISTICS, "s2": {"mean": [0, 1], "std": [1, 1]}})


def test_the_reader_draws_what_is_applied_here() -> None:
    assert views.PHOTOMETRIC == PHOTOMETRIC
    assert tuple(views.NEUTRAL) == NEUTRAL


def rows(**values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name, neutral) for name, neutral in zip(PHOTOMETRIC, NEUTRAL)]])


@pytest.fixture
def image() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(1, 20, 24, dtype=torch.bool)
    valid[:, 5:9, 3:8] = False
    return torch.rand(1, 3, 20, 24, generator=generator), valid


def test_neutral_parameters_change_nothing(image) -> None:
    x, valid = image
    assert torch.equal(apply_photometric(x, valid, rows()), torch.where(valid[:, None], x, 0))
    view = make_batch(2).u
    view.photometric_BP = rows().expand(2, -1)
    hr, changed = view.modalities["hr"], photometric(view).modalities["hr"]
    good = hr.valid_BTHW[:, :, None].expand_as(hr.x_BTCHW)
    torch.testing.assert_close(changed.x_BTCHW[good], hr.x_BTCHW[good], rtol=1e-5, atol=1e-4)
    for name in ("s2", "s1"):
        torch.testing.assert_close(
            photometric(view).modalities[name].x_BTCHW, view.modalities[name].x_BTCHW.float(), equal_nan=True
        )


def test_series_take_one_gain_or_offset_per_site() -> None:
    view = make_batch(2, seed=9).u
    view.photometric_BP = torch.cat([rows(s2_gain=1.05, s1_offset_db=-0.5), rows()])
    got = photometric(view).modalities
    for name, expected in (
        ("s2", view.modalities["s2"].x_BTCHW[0] * 1.05),
        ("s1", view.modalities["s1"].x_BTCHW[0] - 0.5),
    ):
        torch.testing.assert_close(got[name].x_BTCHW[0], expected, equal_nan=True)
        torch.testing.assert_close(got[name].x_BTCHW[1], view.modalities[name].x_BTCHW[1], equal_nan=True)


def test_colour_steps_follow_their_formulas(image) -> None:
    x, valid = image
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    here = valid[:, None].expand_as(x)

    def check(expected: torch.Tensor, **values: float) -> None:
        got = apply_photometric(x, valid, rows(**values))
        torch.testing.assert_close(got[here], expected.expand_as(x).clamp(0, 1)[here], rtol=1e-5, atol=1e-5)

    check(1.3 * x, brightness=1.3)
    check(luma[valid].mean() * 0.4 + 0.6 * x, contrast=0.6)
    check(luma[:, None] * 1.5 - 0.5 * x, saturation=-0.5)
    check(luma[:, None], grayscale=1.0)
    check(torch.where(x >= 0.5, 1 - x, x), solarize_threshold=0.5)


def test_hue_keeps_luma_and_a_full_turn_is_nothing(image) -> None:
    x, valid = 0.4 + 0.2 * image[0], torch.ones_like(image[1])
    turned = apply_photometric(x, valid, rows(hue=0.1))
    weight = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((turned * weight).sum(1), (x * weight).sum(1), rtol=1e-3, atol=1e-3)
    assert float((turned - x).abs().max()) > 0.01
    torch.testing.assert_close(apply_photometric(x, valid, rows(hue=1.0)), x, rtol=1e-4, atol=1e-4)


def test_blur_is_gaussian_and_nothing_leaks_from_invalid_pixels() -> None:
    x, valid = torch.zeros(1, 3, 21, 21), torch.ones(1, 21, 21, dtype=torch.bool)
    x[:, :, 10, 10] = 1
    got = apply_photometric(x, valid, rows(blur_sigma=1.5))
    kernel = [math.exp(-0.5 * (i / 1.5) ** 2) for i in range(-6, 7)]
    expected = torch.tensor([[a * b for b in kernel] for a in kernel]) / sum(kernel) ** 2
    torch.testing.assert_close(got[0, 0, 4:17, 4:17], expected, rtol=1e-4, atol=1e-6)
    grey = torch.full((1, 3, 21, 21), 0.5)
    valid[:, :, :10] = False
    grey[:, :, :, :10] = float("nan")
    edge = apply_photometric(grey, valid, rows(blur_sigma=2.0))
    torch.testing.assert_close(edge[..., 10:], torch.full((1, 3, 21, 11), 0.5))


def test_a_site_s_pixels_do_not_depend_on_its_batch() -> None:
    view = make_batch(4, seed=2).u
    view.photometric_BP = torch.cat([rows(blur_sigma=1.0, hue=0.05), rows(contrast=0.7), rows(grayscale=1), rows()])
    whole = photometric(view).modalities["hr"].x_BTCHW
    batch = replace(make_batch(4, seed=2), u=view)
    for i in range(4):
        alone = photometric(batch.part(i, i + 1).u).modalities["hr"].x_BTCHW
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-6, atol=1e-4)


def test_effective_rank_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 8, generator=generator)
    full = float(effective_rank(base))
    assert full == pytest.approx(8, rel=0.01)
    assert float(effective_rank(base * 1e6)) == pytest.approx(full, rel=1e-4)
    low = base[:, :2] @ torch.randn(2, 8, generator=generator) + 5
    assert 1.0 <= float(effective_rank(low)) <= 2.01
    assert float(effective_rank(torch.ones(10, 8))) == 0.0
    assert float(effective_rank(torch.ones(1, 8))) == 0.0
    by_svd = torch.linalg.svdvals((base[:20] - base[:20].mean(0)).double())
    share = by_svd / by_svd.sum()
    assert float(effective_rank(base[:20])) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)


def test_feature_metrics_look_at_valid_rows_only() -> None:
    features = torch.randn(2, 5, 5, 8)
    valid = torch.rand(2, 5, 5) > 0.5
    expected = feature_metrics(features, valid)
    features[~valid] = 1e6
    for name, value in feature_metrics(features, valid).items():
        assert float(value) == float(expected[name])
    nothing = feature_metrics(features, torch.zeros_like(valid))
    assert [float(v) for v in nothing.values()] == [0.0, 0.0]


def test_prototype_usage_forgets_after_the_window() -> None:
    age = torch.full((4,), 1 << 40)
    hit = torch.tensor([True, True, False, False])
    assert float(update_age(age, hit)) == 0.5
    for _ in range(USAGE_WINDOW - 1):
        share = update_age(age, torch.tensor([True, False, False, False]))
    assert float(share) == 0.5
    assert float(update_age(age, torch.tensor([True, False, False, False]))) == 0.25
