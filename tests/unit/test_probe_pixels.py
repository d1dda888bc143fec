"""Pixel statistics, pooling and the view that shows whole sites: each against a reference done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from data_prep.schema import CLEAR, SiteArrays
from data_prep.shards import ShardSet
from model.batch import ModalityView, View
from model.config import ModelConfig, MoEConfig
from model.skysense import SkySense
from pipeline.config import ViewConfig
from pipeline.probes.exam import uncovered
from pipeline.probes.features import SiteFeatures, features_of, maps_of, network, pooled_moments, sites_per_pass
from pipeline.probes.pixels import describe_pixels
from pipeline.probes.sites import view_of_sites, whole_view
from pipeline.probes.tasks import site_scores, spread
from tests.sites import make_site, write_shard_set
from tests.synthetic_batch import make_view

TRAINED = ViewConfig(hr_px=32, series_px=8, s2_dates=2, s1_dates=2)


def _part(rng: np.random.Generator, dates: int, bands: int, size: int, share: float) -> ModalityView:
    x = torch.from_numpy(rng.normal(0, 2, (1, dates, bands, size, size))).float()
    ok = torch.from_numpy(rng.random((1, dates, size, size)) < share)
    x = torch.where(ok[:, :, None], x, torch.nan)  # nothing of an invalid pixel may be read
    return ModalityView(x, ok, torch.ones(1, dates, dtype=torch.int16), torch.ones(1), torch.eye(2, 3).double()[None])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_pixel_statistics_are_those_of_the_valid_pixels(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    parts = {"hr": _part(rng, 1, 3, 9, share), "s2": _part(rng, 3, 10, 4, share)}
    named = describe_pixels(View(parts, torch.zeros(1, 7), None, torch.ones(1)), None, 0)
    for name, part in parts.items():
        x_CN = part.x_BTCHW[0].transpose(0, 1)[:, part.valid_BTHW[0]].numpy()
        found = named[f"pooled:{name}"][0].numpy()
        assert bool(named[f"present:{name}"]) == (x_CN.shape[1] > 0)
        if not x_CN.shape[1]:
            assert not found.any()
            continue
        wanted = [x_CN.mean(1), x_CN.std(1), *(np.quantile(x_CN, q, axis=1) for q in (0.1, 0.9))]
        np.testing.assert_allclose(found[: 4 * len(x_CN)], np.concatenate(wanted), atol=1e-5)
        assert len(found) == 4 * len(x_CN) + (4 if name == "hr" else 0)


def test_texture_is_the_mean_step_between_valid_neighbours() -> None:
    rng = np.random.default_rng(3)
    part = _part(rng, 1, 3, 7, 0.8)
    x, ok = part.x_BTCHW[0, 0].numpy(), part.valid_BTHW[0, 0].numpy()
    wanted = []
    for lag in (1, 2):
        for dy, dx in ((0, lag), (lag, 0)):
            steps = [
                np.abs(x[:, i + dy, j + dx] - x[:, i, j]).mean()
                for i in range(7 - dy) for j in range(7 - dx) if ok[i, j] and ok[i + dy, j + dx]
            ]  # fmt: skip
            wanted.append(np.mean(steps))
    view = View({"hr": part}, torch.zeros(1, 7), None, torch.ones(1))
    np.testing.assert_allclose(describe_pixels(view, None, 0)["pooled:hr"][0, -4:].numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize(("canvas", "labels"), [(8, 8), (32, 8), (4, 8)])
def test_statistics_under_a_label_pixel_are_those_of_the_pixels_it_covers(canvas: int, labels: int) -> None:
    part = _part(np.random.default_rng(1), 2, 10, canvas, 0.7)
    classes = torch.zeros(1, labels, labels, dtype=torch.int16)
    named = describe_pixels(View({"s2": part}, torch.zeros(1, 7), classes, torch.ones(1)), classes, labels * labels)
    x, ok = part.x_BTCHW[0].numpy(), part.valid_BTHW[0].numpy()
    for p in range(labels * labels):
        rows, columns = (
            [i for i in range(canvas) if i * labels // canvas == at] or [at * canvas // labels]
            for at in (p // labels, p % labels)
        )
        box = np.ix_(range(2), rows, columns)
        values = x[:, :, rows][:, :, :, columns].transpose(1, 0, 2, 3)[:, ok[box]]
        assert bool(named["valid:s2"][0, p]) == bool(values.size)
        if values.size:
            wanted = np.concatenate([values.mean(1), values.std(1)])
            np.testing.assert_allclose(
                named["pixels:s2"][0, p, :20].float().numpy(), wanted, atol=5e-3
            )  # half precision


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pooling_is_over_valid_tokens_of_all_dates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    feat, valid = torch.from_numpy(rng.normal(5, 2, (3, 2, 3, 4, 6))), torch.from_numpy(rng.random((3, 2, 3, 4)) < 0.4)
    feat[~valid] = torch.nan
    mean, std = pooled_moments(feat, valid)
    for b in range(3):
        rows = feat[b][valid[b]]
        torch.testing.assert_close(mean[b], rows.mean(0).float() if len(rows) else torch.zeros(6))
        torch.testing.assert_close(std[b], rows.std(0, correction=0).float() if len(rows) else torch.zeros(6))


@pytest.mark.parametrize("separate", [False, True])
@torch.no_grad()
def test_stages_are_the_backbones_own_and_dates_without_pixels_take_no_part(separate: bool) -> None:
    torch.manual_seed(0)
    cfg = ModelConfig(size="debug", moe=MoEConfig(experts=0), separate=separate)
    skysense = SkySense(cfg).eval()
    view = make_view(3, torch.Generator().manual_seed(0))
    for part in view.modalities.values():
        part.x_BTCHW = torch.nan_to_num(part.x_BTCHW.float())
    features = skysense(view, stages=True)
    assert skysense(view).stages == {}
    for name, maps in features.stages.items():
        assert [feat.shape[-1] for feat, _ in maps] == list(cfg.dims)
        norm = (skysense.backbone.each[name] if separate else skysense.backbone).norm
        there = features.dense_valid[name].flatten(2).any(2)
        torch.testing.assert_close(norm(maps[3][0])[there], features.dense[name][there])
        merged = cfg.merges(name)
        strides = [cfg.patch * 2 ** sum(merged[:s]) for s in range(4)]
        assert [stride for _, _, stride in maps_of(features, name, "all")] == strides
        part = view.modalities[name]
        tokens = skysense.backbone(
            name, part.x_BTCHW[:1, 0], part.valid_BTHW[:1, 0], part.gsd_B[:1], pyramid=True
        ).pyramid
        if part.valid_BTHW[0, 0].any():
            torch.testing.assert_close(maps[1][0][0, 0], tokens[1][0][0])
    wide = features_of(features, view, stage="all")
    assert wide["pooled:s2"].shape[1] == 2 * sum(cfg.dims)
    for stage, at in ((1, 0), (3, cfg.dims[0] + cfg.dims[1])):
        one = features_of(features, view, stage=stage, pool="mean")["pooled:s2"]
        torch.testing.assert_close(wide["pooled:s2"][:, at : at + one.shape[1]], one)


def test_the_whole_view_fits_the_largest_site_and_the_longest_series(tmp_path: Path) -> None:
    sites = [
        make_site("a", 1, side_px=8, hr_px=32, dates=2), make_site("b", 2, side_px=12, hr_px=48, dates=5),
        make_site("c", 3, side_px=10, hr_px=40, dates=3),
    ]  # fmt: skip
    shards = ShardSet.open(write_shard_set(str(tmp_path), sites))
    assert whole_view(shards, [0, 1, 2], TRAINED) == ViewConfig(48, 12, 5, 5)
    assert whole_view(shards, [0, 2], TRAINED) == ViewConfig(40, 10, 3, 3)
    seen = view_of_sites([shards.read_sample(row) for row in range(3)], ViewConfig(48, 12, 5, 5), ("hr", "s2", "s1"))
    for row, site in enumerate(sites):
        for name, part in seen.modalities.items():
            mask = site.series[name].mask_THW
            if (mask == CLEAR).mean((1, 2)).min() >= 0.2:  # every clear pixel of every date is shown, and nothing else
                assert int(part.valid_BTHW[row].sum()) == int((mask == CLEAR).sum()), (site.key, name)


def test_the_whole_view_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(write_shard_set(str(tmp_path), [make_site("a", 1, side_px=12, hr_px=48, dates=5)]))
    monkeypatch.setattr("pipeline.probes.sites.WHOLE_PX", 4)
    monkeypatch.setattr("pipeline.probes.sites.WHOLE_DATES", {"s2": 4, "s1": 3})
    assert whole_view(shards, [0], TRAINED) == ViewConfig(32, 8, 4, 3)  # what training sees is never cut
    assert 1 <= sites_per_pass(ViewConfig(4096, 128, 24, 12), ("hr", "s2")) <= sites_per_pass(TRAINED, ("hr", "s2"))


def test_a_smaller_site_is_averaged_like_a_large_one_and_padded() -> None:
    small = make_site("a", 5, modalities=("hr",), side_px=8, hr_px=64, labels=False)
    alone = view_of_sites([small], ViewConfig(32, 8), ("hr",)).modalities["hr"]
    padded = view_of_sites([small], ViewConfig(48, 12), ("hr",)).modalities["hr"]
    assert torch.equal(padded.x_BTCHW[..., 8:40, 8:40], alone.x_BTCHW)
    assert padded.valid_BTHW.sum() == padded.valid_BTHW[..., 8:40, 8:40].sum() == alone.valid_BTHW.sum() == 32 * 32


def test_pixels_of_several_sensors_stand_for_the_fused_row_and_a_missing_sensor_is_flagged() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    named: dict[str, torch.Tensor] = {}
    for i, name in enumerate(("s2", "s1")):
        x = rng.normal(0, 1, (40, 3)) + 4 * labels[:, None]
        present = (np.arange(40) // 2) % 4 != i
        named |= {
            f"pooled:{name}": torch.from_numpy(np.where(present[:, None], x, 0)).float(),
            f"present:{name}": torch.from_numpy(present),
        }
    found = site_scores("linear", SiteFeatures.of(named), labels, 24)
    assert set(found) == {"s2", "s1", "concat", "fused"}
    assert found["fused"] == found["concat"]
    score, outcome = found["fused"]
    assert outcome.tested.all()
    assert score.value == 1.0
    assert not found["s1"][1].tested.all()


def test_collapse_figures_are_of_the_means() -> None:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    features = SiteFeatures({"s2": x}, {"s2": torch.ones(10, dtype=torch.bool)}, {}, {}, None)
    means = SiteFeatures({"s2": x[:, :3]}, features.present, {}, {}, None)
    assert spread(features, "mean_std") == spread(means, "mean") != spread(features, "mean")


def test_classes_without_training_sites_are_named() -> None:
    labels = np.array([0, 1, 1, 0, 2, 2, 1])
    notes = uncovered(labels, 4, ["water", "forest", "city"], "shards")
    assert notes == (
        "shards: no training site of class city (2 test sites); these count as wrong for every row of the probe",
    )
    assert uncovered(labels[:4], 2, [], "x") == ()
    with pytest.raises(UsageError, match="all 2 training sites are of one class"):
        uncovered(np.array([1, 1, 0]), 2, [], "x")


def test_a_describer_leaves_the_view_and_the_network_as_they_were() -> None:
    torch.manual_seed(0)
    skysense = SkySense(ModelConfig(size="debug", moe=MoEConfig(experts=0))).double().train()
    view = make_view(2, torch.Generator().manual_seed(0))
    for part in view.modalities.values():
        part.x_BTCHW = torch.nan_to_num(part.x_BTCHW.float())
    with torch.no_grad():
        network(skysense)(view, None, 0)
    assert skysense.training
    assert view.modalities["s2"].x_BTCHW.dtype == torch.float32


def _blank() -> SiteArrays:
    return SiteArrays("", "", (0, 0, 0, 0), (0.0, 0.0, 80.0, 80.0), {}, "")


def test_a_blank_site_has_no_statistics() -> None:
    seen = view_of_sites([_blank()], TRAINED, ("hr", "s2", "s1"))
    named = describe_pixels(seen, None, 0)
    assert not any(named[f"present:{name}"].any() or named[f"pooled:{name}"].any() for name in ("hr", "s2", "s1"))
