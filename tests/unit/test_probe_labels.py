"""Few labels and training on labels: who is labelled, what is learnt, and that rows differ in nothing but their weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from model.batch import View
from model.config import ModelConfig, MoEConfig
from model.pretrained import Pretrained
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.exam import Exam
from pipeline.probes.features import SiteFeatures, pooled_moments
from pipeline.probes.few import draw_labels, few_labels, finetune, supervise
from pipeline.probes.labelled import Recipe, _drawn, _span, finetuned, stacked, train_on_labels
from pipeline.probes.offline import Prepared, probe_model
from pipeline.probes.source import Source

STATISTICS = {"s2": {"mean": [0.0] * 10, "std": [1.0] * 10}, "s1": {"mean": [0.0] * 2, "std": [1.0] * 2}}
TRAIN, TEST = 32, 24
LABELS = np.arange(TRAIN + TEST) % 4


def _exam() -> Exam:
    keys = tuple(f"site-{i}" for i in range(TEST))
    return Exam(("knn", "linear"), TRAIN, keys, LABELS, ("a", "b", "c", "d"), 0, "0123456789abcdef", ())


@pytest.fixture(scope="module")
def model() -> Pretrained:
    torch.manual_seed(0)
    cfg = ModelConfig(size="debug", modalities=("s2", "s1"), drop_path=0.1, moe=MoEConfig(experts=2, blocks=1))
    return Pretrained(cfg, STATISTICS).eval()


def _source(model: Pretrained) -> Source:
    """Sites whose class is told by which of four bands is bright; s1 is missing in every third."""

    def view(positions: list[int]) -> View:
        rng = np.random.default_rng(positions)
        s2 = rng.normal(0, 0.3, (len(positions), 3, 10, 8, 8))
        for row, i in enumerate(positions):
            s2[row, :, LABELS[i]] += 2.0
        s1 = rng.normal(0, 1, (len(positions), 2, 2, 8, 8))
        there = torch.tensor([i % 3 != 0 for i in positions])[:, None, None, None].expand(-1, 2, 8, 8)
        images = {"s2": torch.from_numpy(s2).float(), "s1": torch.from_numpy(s1).float()}
        return model.view(images, valid={"s1": there})

    def describe(*_: object) -> list[SiteFeatures]:
        raise AssertionError("not asked here")

    return Source(_exam(), describe, view, ViewConfig(32, 4, 2, 1))  # type: ignore[arg-type]


def _features(seed: int, signal: float) -> SiteFeatures:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, 1, (TRAIN + TEST, 8)) + signal * np.eye(8)[LABELS]).float()
    everywhere = torch.ones(len(x), dtype=torch.bool)
    return SiteFeatures({"s2": x, "fused": x.clone()}, {"s2": everywhere, "fused": everywhere}, {}, {}, None)


def _prepared(model: Pretrained) -> Prepared:
    features = {"trained": _features(1, 3.0), "untrained": _features(2, 0.0), "pixels": _features(3, 1.0)}
    return Prepared(model, model, _source(model), features, ProbeConfig(), "cpu")


@settings(max_examples=20, deadline=None)
@given(per_class=st.integers(1, 8), draw=st.integers(0, 50))
def test_a_draw_labels_so_many_of_each_class_and_training_sites_only(per_class: int, draw: int) -> None:
    chosen = draw_labels(_exam(), per_class, draw)
    assert chosen == sorted(set(chosen))
    assert np.bincount(LABELS[chosen]).tolist() == [per_class] * 4
    assert max(chosen) < TRAIN
    assert chosen == draw_labels(_exam(), per_class, draw)


def test_draws_differ_and_too_few_sites_are_named() -> None:
    assert len({tuple(draw_labels(_exam(), 3, draw)) for draw in range(5)}) == 5
    with pytest.raises(UsageError, match="--labels-per-class 9: class a has 8 training sites"):
        draw_labels(_exam(), 9, 0)


def test_few_labels_are_means_over_draws_with_their_spread(model: Pretrained) -> None:
    prepared = _prepared(model)
    by_draws = [few_labels(prepared, 4, draws) for draws in (1, 2, 3)]
    knn, linear = by_draws[-1]
    for which, result in enumerate((knn, linear)):
        told = result.to_json()
        assert (told["labels_per_class"], told["draws"]) == (4, 3)
        assert told["score"] > told["pixels"] > told["untrained"]
        assert told["over_pixels"] == pytest.approx(told["score"] - told["pixels"])
        assert told["over_pixels_low"] > 0
        totals = [found[which].trained["s2"].value * (i + 1) for i, found in enumerate(by_draws)]
        each = np.diff([0.0, *totals])
        assert result.trained["s2"].value == pytest.approx(each.mean())
        assert result.sd["trained"]["s2"] == pytest.approx(each.std(ddof=1))
    spoilt = {row: replace(f) for row, f in prepared.features.items()}
    unlabelled = sorted(set(range(TRAIN)) - {i for draw in range(3) for i in draw_labels(_exam(), 4, draw)})
    assert unlabelled
    for f in spoilt.values():
        f.pooled = {name: x.clone() for name, x in f.pooled.items()}
        for x in f.pooled.values():
            x[unlabelled] = 1e6  # sites without a label in any draw: nobody looks at them
    again = few_labels(replace(prepared, features=spoilt), 4, 3)
    assert [r.rows for r in again] == [knn.rows, linear.rows]


def test_training_on_labels_learns_and_is_reproducible(model: Pretrained) -> None:
    source = _source(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(samples=320, batch=16, lr=3e-3)
    outcomes = train_on_labels(model, source, range(TRAIN), recipe, "test")
    short, again = (
        train_on_labels(model, source, range(TRAIN), Recipe(samples=32, batch=16), "test") for _ in range(2)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert set(outcomes) == {"s2", "s1", "fused"}
    for name, outcome in outcomes.items():
        np.testing.assert_array_equal(short[name].counts, again[name].counts)
        assert len(outcome.counts) == TEST
    assert outcomes["s2"].counts.mean() > 0.9
    expected = [i % 3 != 0 for i in range(TRAIN, TRAIN + TEST)]
    assert outcomes["s1"].tested.tolist() == expected
    with pytest.raises(UsageError, match="1 labelled training sites"):
        train_on_labels(model, source, [0], recipe, "test")


def test_pooling_has_a_finite_slope_where_nothing_varies() -> None:
    feat = torch.ones(2, 1, 2, 2, 3, requires_grad=True)
    valid = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 2, 2)
    mean, std = pooled_moments(feat, valid)
    (mean.sum() + std.sum()).backward()
    assert feat.grad is not None
    assert torch.isfinite(feat.grad).all()
    assert feat.grad[0].sum() == pytest.approx(3.0)


def test_a_frozen_start_moves_the_heads_only(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def examined(network: Pretrained, *_: object) -> dict[str, object]:
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {}

    monkeypatch.setattr("pipeline.probes.labelled._examined", examined)
    recipe = Recipe(samples=32, batch=16)
    assert finetuned(recipe).backbone_share < recipe.backbone_share
    for how in (replace(finetuned(recipe), frozen_share=1.0), finetuned(recipe)):
        train_on_labels(model, _source(model), range(TRAIN), how, "test")
    frozen, moved = ([not torch.equal(value, model.state_dict()[name]) for name, value in one.items()] for one in seen)
    assert not any(frozen)
    assert any(moved)


def test_supervised_and_finetuned_rows_stand_beside_the_others(model: Pretrained) -> None:
    prepared = _prepared(model)
    results = supervise(prepared, probe_model(prepared), 64)
    for result in results:
        told = result.to_json()
        assert set(told["supervised"]) == {"s2", "s1", "fused"}
        assert told["supervised_samples"] == 64
        assert set(result.over) == {"untrained", "pixels", "supervised"}
    results = finetune(prepared, few_labels(prepared, 2, 2), 2, 2, 32)
    for result in results:
        told = result.to_json()
        assert told["finetune_samples"] == 32
        wanted = told["finetuned"]["fused"]["value"] - told["scratch"]["fused"]["value"]
        assert told["differences"]["finetuned_over_scratch"]["fused"]["value"] == pytest.approx(wanted)
        assert "fused" in told["differences"]["finetuned_over_pixels"]
        assert told["sd"]["finetuned"]["fused"] >= 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_training_crop_shows_the_same_ground_to_every_sensor(seed: int) -> None:
    """Pixels hold the number of their 10 m cell: after crop and turn every sensor shows the same cells in the same places."""
    rng = np.random.default_rng(seed)
    cells = torch.arange(144.0).reshape(1, 1, 1, 12, 12)
    cfg = ModelConfig(size="debug", moe=MoEConfig(experts=0))
    statistics = {**STATISTICS, "hr": {"mean": [0.0] * 3, "std": [100.0] * 3}}
    statistics["s2"], statistics["s1"] = ({"mean": [0.0] * n, "std": [100.0] * n} for n in (10, 2))
    with torch.device("meta"):
        model = Pretrained(cfg, statistics)
    view = model.view(
        {
            "hr": cells.repeat_interleave(4, -1).repeat_interleave(4, -2).expand(1, 1, 3, 48, 48) + 1,
            "s2": cells.expand(1, 5, 10, 12, 12) + 1,
            "s1": cells.expand(1, 3, 2, 12, 12) + 1,
        }
    )
    drawn = _drawn(view, ViewConfig(hr_px=32, series_px=8, s2_dates=2, s1_dates=2), rng)
    hr, s2, s1 = (drawn.modalities[name].x_BTCHW for name in ("hr", "s2", "s1"))
    assert (hr.shape, s2.shape, s1.shape) == ((1, 1, 3, 32, 32), (1, 2, 10, 8, 8), (1, 2, 2, 8, 8))
    assert torch.equal(s2[0, 0, 0], s1[0, 0, 0])
    assert torch.equal(hr[0, 0, 0, ::4, ::4], s2[0, 0, 0])
    assert len(s2[0, 0, 0].unique()) == 64


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 40), side=st.integers(1, 40), place=st.floats(0, 0.999), cells=st.sampled_from([1.0, 4.0, 6.5])
)
def test_a_crop_lies_inside(size: int, side: int, place: float, cells: float) -> None:
    found = _span(size, side, place, cells)
    assert found.start >= 0
    assert found.stop <= size
    assert found.stop - found.start == min(size, side)


def test_views_of_several_sizes_are_refused(model: Pretrained) -> None:
    a, b = (model.view({"s2": torch.ones(1, 1, 10, size, size)}) for size in (8, 12))
    assert stacked([a, a]).modalities["s2"].x_BTCHW.shape[0] == 2
    with pytest.raises(UsageError, match="images of one size"):
        stacked([a, b])
