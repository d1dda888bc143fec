"""Missing is a mask: what is invalid never reaches a valid token, and no input, however empty, gives a NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backbone import Backbone, Images
from model.batch import ModalityView, View
from model.config import FusionConfig, ModelConfig, MoEConfig
from model.fusion import cell_under
from model.skysense import Features, SkySense
from model.validity import first_tokens, routed_tokens
from model.view_tokens import view_validity
from tests.model_views import random_view, randomise

CONFIGS = {
    "default": ModelConfig(size="debug", window=4),
    "window_top2": ModelConfig(size="debug", window=4, attention="window", moe=MoEConfig(experts=4, top_k=2)),
    "learned_dense": ModelConfig(size="debug", position="learned", prompts=0, moe=MoEConfig(experts=0)),
    "separate_average": ModelConfig(size="debug", separate=True, fusion=FusionConfig(depth=0)),
}


def build(cfg: ModelConfig, seed: int = 0) -> SkySense:
    torch.manual_seed(seed)
    model = SkySense(cfg).eval()
    randomise(model, seed, std=0.05)
    return model


def with_part(view: View, name: str, **changes: Tensor) -> View:
    parts = {**view.modalities, name: replace(view.modalities[name], **changes)}
    return replace(view, modalities=parts)


def assert_same_valid(a: Features, b: Features, tolerance: float = 1e-6) -> None:
    for name in a.dense:
        assert torch.equal(a.dense_valid[name], b.dense_valid[name])
        valid = a.dense_valid[name]
        torch.testing.assert_close(a.dense[name][valid], b.dense[name][valid], rtol=tolerance, atol=tolerance)
    assert torch.equal(a.fused_valid, b.fused_valid)
    torch.testing.assert_close(a.fused[a.fused_valid], b.fused[a.fused_valid], rtol=tolerance, atol=tolerance)


def random_validity(view: View, seed: int, absent: frozenset[str]) -> View:
    """Clouds as rectangles, missing dates, missing modalities."""
    generator = torch.Generator().manual_seed(seed)
    for name, part in view.modalities.items():
        valid = torch.ones_like(part.valid_BTHW)
        for b in range(valid.shape[0]):
            for t in range(valid.shape[1]):
                y, x, h, w = (int(torch.randint(0, valid.shape[2], (1,), generator=generator)) for _ in range(4))
                valid[b, t, y : y + h, x : x + w] = False
                if torch.rand((), generator=generator) < 0.25:
                    valid[b, t] = False
        if name in absent:
            valid[:] = False
        view = with_part(view, name, valid_BTHW=valid)
    return view


def poisoned(view: View, value: float) -> View:
    for name, part in view.modalities.items():
        x = torch.where(part.valid_BTHW[:, :, None], part.x_BTCHW, value)
        gone = ~part.valid_BTHW.flatten(2).any(2)
        view = with_part(view, name, x_BTCHW=x, doy_BT=torch.where(gone, 123, part.doy_BT.int()).to(torch.int16))
    return view


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 10**6),
    value=st.sampled_from([float("nan"), float("inf"), -1e30, 7.0]),
    absent=st.sets(st.sampled_from(["hr", "s2", "s1"]), max_size=2),
)
def test_invalid_values_change_nothing(kind: str, seed: int, value: float, absent: set[str]) -> None:
    model = build(CONFIGS[kind])
    view = random_validity(random_view(2, hr=(40, 56), series=(10, 14), seed=seed), seed, frozenset(absent))
    with torch.no_grad():
        a, b = model(view), model(poisoned(view, value))
    assert_same_valid(a, b)
    for ours, theirs in zip(a.moe, b.moe):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs))  # nor do they count in router statistics


def pad_view(view: View, hr: tuple[int, int], series: tuple[int, int], dates: int) -> View:
    """Larger canvases (down and right) and more dates, all of it NaN and invalid."""
    for name, part in view.modalities.items():
        rows, columns = hr if name == "hr" else series
        extra = 0 if name == "hr" else dates
        n, t, c, h, w = part.x_BTCHW.shape
        x = part.x_BTCHW.new_full((n, t + extra, c, h + rows, w + columns), torch.nan)
        x[:, :t, :, :h, :w] = part.x_BTCHW
        valid = torch.zeros(n, t + extra, h + rows, w + columns, dtype=torch.bool)
        valid[:, :t, :h, :w] = part.valid_BTHW
        doy = torch.cat([part.doy_BT, part.doy_BT.new_full((n, extra), 77)], 1)
        view = with_part(view, name, x_BTCHW=x, valid_BTHW=valid, doy_BT=doy)
    return view


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=4)
@given(rows=st.integers(0, 6), columns=st.integers(0, 6), dates=st.integers(0, 2), seed=st.integers(0, 1000))
def test_padding_canvas_and_dates_changes_nothing(kind: str, rows: int, columns: int, dates: int, seed: int) -> None:
    """Any amount of padding, below and above a window, with sizes that are no multiple of patch, merge or window."""
    model = build(CONFIGS[kind]).double()
    view = random_view(1, hr=(40, 56), series=(10, 14), seed=seed, dtype=torch.float64)
    view = random_validity(view, seed, frozenset())
    padded = pad_view(view, (4 * rows, 4 * columns), (rows, columns), dates)
    with torch.no_grad():
        a, b = model(view), model(padded)
    for name in a.dense:
        _, t, h, w = a.dense_valid[name].shape
        assert torch.equal(b.dense_valid[name][:, :t, :h, :w], a.dense_valid[name])
        assert int(b.dense_valid[name].sum()) == int(a.dense_valid[name].sum())
        valid = a.dense_valid[name]
        torch.testing.assert_close(b.dense[name][:, :t, :h, :w][valid], a.dense[name][valid], rtol=1e-9, atol=1e-9)
    h, w = a.fused_valid.shape[1:]
    valid = a.fused_valid & b.fused_valid[:, :h, :w]
    if int(b.fused_valid.sum()) > int(a.fused_valid.sum()):
        return  # a token reaches past the canvas: over padding it asks for a fused feature there too, which the cell's others see
    # a place is a share of the canvas times its width: float32 rotary angles of a padded canvas differ in their last bits
    torch.testing.assert_close(b.fused[:, :h, :w][valid], a.fused[valid], rtol=1e-6, atol=1e-6)
    assert torch.equal(valid, a.fused_valid)


@pytest.mark.parametrize(("modality", "height", "width"), [("s2", 6, 6), ("hr", 37, 53), ("s1", 1, 3), ("hr", 5, 130)])
def test_any_size_equals_the_same_pixels_in_a_larger_canvas(modality: str, height: int, width: int) -> None:
    cfg = ModelConfig(size="debug")
    backbone = randomise(Backbone(cfg).double(), std=0.05).eval()
    bands = {"hr": 3, "s2": 10, "s1": 2}[modality]
    x = torch.randn(1, bands, height, width, dtype=torch.float64)
    large = torch.full((1, bands, 96, 160), torch.nan, dtype=torch.float64)
    large[:, :, :height, :width] = x
    valid = torch.zeros(1, 96, 160, dtype=torch.bool)
    valid[:, :height, :width] = True
    gsd = torch.tensor([0.3])
    with torch.no_grad():
        all_valid, merges = torch.ones(1, height, width, dtype=torch.bool), cfg.merges(modality)
        [small] = backbone([Images(modality, x, all_valid, gsd, None, merges)])
        [big] = backbone([Images(modality, large, valid, gsd, None, merges)])
    rows, columns = small.valid_Nhw.shape[1:]
    assert bool(small.valid_Nhw.all())
    assert int(big.valid_Nhw.sum()) == rows * columns
    assert rows == -(-height // small.stride)
    assert columns == -(-width // small.stride)
    torch.testing.assert_close(big.feat_NhwD[:, :rows, :columns], small.feat_NhwD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_valid_is_finite_forward_and_backward_and_reaches_every_parameter(kind: str) -> None:
    model = build(CONFIGS[kind]).train()
    view = poisoned(random_validity(random_view(2), 0, frozenset({"hr", "s2", "s1"})), float("nan"))
    features = model(view, torch.arange(2))
    loss = features.fused.sum() + sum(d.square().mean() for d in features.dense.values())
    loss = loss + sum((s.prob_ME.sum() + s.z_M.sum() for s in features.moe), torch.zeros(()))
    loss.backward()
    assert not features.fused_valid.any()
    assert bool(loss.isfinite())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_one_cloudy_site_does_not_touch_its_neighbour_in_the_batch() -> None:
    model = build(CONFIGS["default"])
    view = random_validity(random_view(2), 3, frozenset())
    alone = View(
        {
            n: ModalityView(*(getattr(p, f)[:1] for f in ("x_BTCHW", "valid_BTHW", "doy_BT", "gsd_B", "affine_B23")))
            for n, p in view.modalities.items()
        },
        view.photometric_BP[:1], None, view.side_m_B[:1],
    )  # fmt: skip
    with torch.no_grad():
        both, one = model(view), model(alone)
    for name in one.dense:
        torch.testing.assert_close(both.dense[name][:1], one.dense[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.fused[:1], one.fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_validity_and_routed_tokens_are_known_before_the_model_runs(kind: str) -> None:
    model = build(CONFIGS[kind])
    view = random_validity(random_view(2, hr=(40, 56), series=(10, 14)), 5, frozenset({"s1"}))
    with torch.no_grad():
        features = model(view)
    [first], _ = first_tokens(model.cfg, [view])
    validity = view_validity(model.cfg, view, first)
    assert validity.dense.keys() == features.dense_valid.keys()
    for name, valid in validity.dense.items():
        assert torch.equal(valid, features.dense_valid[name])
    assert torch.equal(validity.fused, features.fused_valid)
    assert validity.fused_like == features.fused_like
    assert routed_tokens(model.cfg, first).tolist() == [float(s.tokens_M.sum()) for s in features.moe]


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 8))
def test_cells_under_a_grid_are_the_ones_that_hold_its_centres(tokens: int, canvas: int, r: int) -> None:
    """Against the definition in fractions of the canvas."""
    stride, lead_stride = 4, 32
    lead_canvas = lead_stride * tokens
    cells = cell_under(tokens, lead_stride, lead_canvas, r, stride, canvas)
    for i, cell in enumerate(cells):
        centre = (i + 0.5) / tokens * canvas * r / stride  # in cells of the other grid
        assert cell == min(int(centre + 1e-9), -(-canvas // stride) * r - 1)
