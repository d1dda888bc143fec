"""Probes: classifiers, intervals, splits by place, and features that depend on nothing but the site and the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from data_prep.build import build
from data_prep.config import BuildConfig, OutputConfig, SourceConfig, SplitConfig
from data_prep.schema import SiteArrays
from data_prep.shards import ShardSet
from data_prep.simulate.write import simulate
from model.config import ModelConfig, MoEConfig
from model.pretrained import Pretrained
from model.skysense import SkySense
from pipeline.config import DataConfig, PretrainConfig, ProbeConfig, ViewConfig
from pipeline.examples.segmentation import SegmentationModel, finetune, pixel_accuracy
from pipeline.probes.classify import beside, knn, loo_error, ridge, thin_svd
from pipeline.probes.features import extract, network
from pipeline.probes.in_loop import obstacle, run_probes, statistics_dict
from pipeline.probes.outcomes import pixels_url, read_outcomes, split_number, url_of
from pipeline.probes.picture import feature_sheet
from pipeline.probes.plan import plan_probe, raster_name
from pipeline.probes.scores import accuracy, confusion, difference, mean_iou, total_score
from pipeline.probes.sites import view_of_sites
from pipeline.probes.split import split_of
from pipeline.reader.whole import whole_site_view

VIEW = ViewConfig(hr_px=64, series_px=8, s2_dates=3, s1_dates=2)
MODALITIES = ("hr", "s2", "s1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("probes")
    catalog = simulate(str(folder / "sites"), 24, seed=1, side_m=80)
    split = SplitConfig(fractions={"train": 0.5, "val": 0.0, "probe": 0.5})
    build(BuildConfig(SourceConfig((catalog,)), OutputConfig(str(folder / "shards")), split=split, workers=1))
    return ShardSet.open(str(folder / "shards"))


@pytest.fixture(scope="module")
def skysense() -> SkySense:
    torch.manual_seed(0)
    return SkySense(ModelConfig(size="debug", moe=MoEConfig(experts=2, blocks=1)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 5))
def test_both_classifiers_separate_what_is_separable(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (classes, 16))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = np.arange(classes * 12) % classes
    x = 10 * centres[labels] + rng.normal(0, 0.05, (len(labels), 16))
    for classifier in (knn, ridge):
        np.testing.assert_array_equal(
            classifier(x[: classes * 8], labels[: classes * 8], x[classes * 8 :]), labels[classes * 8 :]
        )


def test_knn_ignores_scale_and_shift_ridge_any_invertible_axis_scaling() -> None:
    rng = np.random.default_rng(0)
    x, labels, y = rng.normal(size=(40, 8)), rng.integers(0, 3, 40), rng.normal(size=(20, 8))
    np.testing.assert_array_equal(knn(x, labels, y), knn(3 * x + 7, labels, 3 * y + 7))
    scale = rng.uniform(0.5, 2, 8)
    np.testing.assert_array_equal(ridge(x, labels, y), ridge(x * scale, labels, y * scale))


@pytest.mark.parametrize(("rows", "dims"), [(20, 6), (12, 40), (13, 12)])
@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 10.0])
def test_the_leave_one_out_error_is_that_of_leaving_one_out(rows: int, dims: int, penalty: float) -> None:
    """Also with more features than rows, where every row is fitted and a naive closed form sees no error at all."""
    rng = np.random.default_rng(rows + dims)
    x, y = rng.normal(size=(rows, dims)), rng.normal(size=(rows, 2))
    wanted = []
    for i in range(rows):
        others = np.arange(rows) != i
        mean, offset = x[others].mean(0), y[others].mean(0)
        centred = x[others] - mean
        weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(dims), centred.T @ (y[others] - offset))
        wanted.append(y[i] - offset - (x[i] - mean) @ weights)
    u, s, v = thin_svd(x - x.mean(0))
    np.testing.assert_allclose((u * s) @ v.T, x - x.mean(0), atol=1e-9)
    assert loo_error(u, s, y - y.mean(0), penalty) == pytest.approx(np.mean(np.square(wanted)), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_features_side_by_side_know_what_is_missing_and_nothing_of_the_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(3, 5, (12, dim)), rng.random(12) < 0.7) for dim in (2, 3)]
    is_train = np.arange(12) < 7
    joint, present = beside(parts, is_train)
    np.testing.assert_array_equal(present, parts[0][1] | parts[1][1])
    at = 0
    for x, there in parts:
        block, flag = joint[:, at : at + x.shape[1]], joint[:, at + x.shape[1]]
        at += x.shape[1] + 1
        np.testing.assert_array_equal(flag, there)
        assert not block[~there].any()
        if (there & is_train).sum() > 1:
            np.testing.assert_allclose(block[there & is_train].mean(0), 0, atol=1e-5)
    spoilt = [(np.where(is_train[:, None], x, np.nan), there) for x, there in parts]
    np.testing.assert_array_equal(beside(spoilt, is_train)[0][is_train], joint[is_train])


def test_intervals_hold_the_score_and_shrink_with_sites() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    predicted = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    few, many = accuracy(predicted[:40], truth[:40], truth), accuracy(predicted, truth, truth)
    for score in (few, many):
        assert score.low <= score.value <= score.high
    assert many.high - many.low < few.high - few.low
    assert many.chance == pytest.approx((truth == 0).mean() ** 2 + (truth == 1).mean() ** 2)


def test_mean_iou_against_counts_done_by_hand() -> None:
    counts = confusion(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, -1]), 3)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [1, 2, 0], [0, 0, 0]])
    assert mean_iou(counts[None], 0).value == pytest.approx((1 / 2 + 2 / 3) / 2)  # class 2 does not occur


def test_split_is_by_place_bounded_and_named(shards: ShardSet) -> None:
    split = split_of(shards, 100, "scene")
    cells = shards.read_index(["cell"])["cell"].to_pylist()
    assert not {cells[row] for row in split.train} & {cells[row] for row in split.test}
    assert split.digest == split_of(shards, 100, "scene").digest
    fewer = split_of(shards, 3, "scene")
    assert len(fewer.train) == len(fewer.test) == 3
    assert fewer.digest != split.digest
    with pytest.raises(UsageError, match="no scalar label 'biome'; it has scene"):
        split_of(shards, 10, "biome")


def test_views_equal_the_readers(shards: ShardSet) -> None:
    view = ViewConfig(hr_px=256, series_px=8, s2_dates=3, s1_dates=2)
    ours = view_of_sites([shards.read_sample(row) for row in (0, 5)], view, MODALITIES)
    theirs = whole_site_view(shards, [0, 5], MODALITIES, view)
    for name in MODALITIES:
        a, b = ours.modalities[name], theirs.modalities[name]
        assert torch.equal(a.valid_BTHW, b.valid_BTHW), name
        seen = a.valid_BTHW[:, :, None].expand_as(a.x_BTCHW)
        assert torch.equal(a.x_BTCHW[seen].float(), b.x_BTCHW[seen].float()), name
        assert torch.equal(a.doy_BT, b.doy_BT)
        torch.testing.assert_close(a.affine_B23, b.affine_B23)


def test_features_do_not_depend_on_the_batch(shards: ShardSet, skysense: SkySense) -> None:
    rows, statistics = list(range(5)), statistics_dict(shards)
    describers = [network(skysense, stage="all")]
    one, three = (
        extract(describers, MODALITIES, shards.read_sample, rows, VIEW, statistics, "landcover", batch=batch)[0]
        for batch in (1, 3)
    )
    for name in (*MODALITIES, "fused"):
        torch.testing.assert_close(one.pooled[name], three.pooled[name], atol=1e-5, rtol=1e-4)
        assert torch.equal(one.present[name], three.present[name])
        assert torch.equal(one.pixel_valid[name], three.pixel_valid[name])
    assert torch.equal(one.classes, three.classes)  # type: ignore[arg-type]


def test_a_missing_modality_is_absent_from_features(shards: ShardSet, skysense: SkySense) -> None:
    def read(row: int) -> SiteArrays:
        site = shards.read_sample(row)
        del site.series["s1"]
        return site

    features = extract([network(skysense)], MODALITIES, read, [0, 1], VIEW, statistics_dict(shards))[0]
    assert features.present["hr"].all()
    assert not features.present["s1"].any()


def test_run_probes_names_scores_and_costs(shards: ShardSet, skysense: SkySense) -> None:
    cfg = PretrainConfig(
        probe=ProbeConfig(tasks=("knn", "linear", "segment"), samples=12), data=DataConfig(views_global=VIEW)
    )
    was_training = skysense.train().training
    figures = run_probes(skysense, cfg, shards)
    assert skysense.training == was_training
    for task in ("knn", "linear", "segment"):
        for name in (*MODALITIES, "fused"):
            low, value, high = (figures[f"probe/{task}/{name}{end}"] for end in ("/low", "", "/high"))
            assert 0 <= low <= high <= 1
            assert 0 <= value <= 1
    assert {key: figures[key] for key in figures if key != "probe/seconds"} == {
        key: value for key, value in run_probes(skysense, cfg, shards).items() if key != "probe/seconds"
    }


def test_run_probes_keeps_every_row_and_pairs_them(
    shards: ShardSet, skysense: SkySense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained rows are those of step 0, pixel rows those of their file, differences those of the two: and neither is made twice."""
    tasks, rows = ("knn", "linear", "segment"), (*MODALITIES, "fused")
    cfg = PretrainConfig(probe=ProbeConfig(tasks=tasks, samples=12), data=DataConfig(views_global=VIEW))
    untrained = run_probes(skysense, cfg, shards, rundir_url=str(tmp_path), step=0)
    torch.manual_seed(1)
    other = SkySense(skysense.cfg)
    monkeypatch.setattr("pipeline.probes.in_loop.describe_pixels", None)  # a later round must not need it
    figures = run_probes(other, cfg, shards, rundir_url=str(tmp_path), step=20)
    kept, base = (read_outcomes(url_of(str(tmp_path), step)) for step in (20, 0))
    pixels = read_outcomes(pixels_url(str(tmp_path), kept.split))
    assert split_number(kept.split) == figures["probe/split"]
    plan = plan_probe(shards, cfg.probe, VIEW)
    assert (kept.keys, kept.split) == (plan.keys, plan.digest)
    names = {f"{task}/{name}" for task in tasks for name in rows} | {"knn/concat", "linear/concat"}
    assert set(kept.by_name) == set(base.by_name) == set(pixels.by_name) == names
    for name, outcome in kept.by_name.items():
        assert figures[f"probe/{name}"] == pytest.approx(total_score(outcome))
        assert figures[f"probe/{name}/untrained"] == untrained[f"probe/{name}"]
        assert figures[f"probe/{name}/pixels"] == untrained[f"probe/{name}/pixels"] == total_score(pixels.by_name[name])
        for what, row in (("untrained", base), ("pixels", pixels)):
            over = difference(outcome, row.by_name[name])
            found = [figures[f"probe/{name}/over_{what}{end}"] for end in ("", "/low", "/high")]
            assert over is not None
            assert found == [over.value, over.low, over.high]
        assert untrained[f"probe/{name}/over_untrained"] == 0


def test_another_look_at_the_sites_is_another_split(shards: ShardSet, skysense: SkySense, tmp_path: Path) -> None:
    probes = [
        ProbeConfig(samples=12), ProbeConfig(samples=12, pool="mean"), ProbeConfig(samples=12, stage=2),
        ProbeConfig(samples=12, views=VIEW), ProbeConfig(samples=11), ProbeConfig(samples=12, views=replace(VIEW, s1_dates=1)),
    ]  # fmt: skip
    assert len({plan_probe(shards, probe, VIEW).digest for probe in probes}) == len(probes)


def test_untrained_rows_of_another_split_are_left_out(
    shards: ShardSet, skysense: SkySense, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(views_global=VIEW)
    run_probes(skysense, PretrainConfig(probe=ProbeConfig(samples=12), data=data), shards, "cpu", str(tmp_path), 0)
    later = PretrainConfig(probe=ProbeConfig(samples=12, pool="mean"), data=data)
    figures = run_probes(skysense, later, shards, "cpu", str(tmp_path), 10)
    assert "probe/knn/fused/pixels" in figures
    assert not any("untrained" in key for key in figures)
    assert "probed on other sites or views" in caplog.text
    caplog.clear()
    figures = run_probes(skysense, later, shards, "cpu", str(tmp_path / "new"), 10)
    assert "probe/knn/fused/over_pixels" in figures
    assert "kept no probe of its untrained network" in caplog.text


def test_unknown_task_is_refused(shards: ShardSet, skysense: SkySense) -> None:
    with pytest.raises(UsageError, match="'kmeans'"):
        run_probes(skysense, PretrainConfig(probe=ProbeConfig(tasks=("kmeans",))), shards)


def test_what_stands_in_the_way_of_a_probe_is_told_before_training(shards: ShardSet) -> None:
    def told(**probe: object) -> str | None:
        return obstacle(PretrainConfig(probe=ProbeConfig(**probe), data=DataConfig(url=shards.url)))  # type: ignore[arg-type]

    assert told(tasks=("knn", "segment"), samples=12) is None
    assert "no scalar label 'species'" in str(told(label="species"))
    assert "'moss'" in str(told(tasks=("segment",), raster="moss"))
    with pytest.raises(UsageError, match="'kmeans'"):
        told(tasks=("kmeans",))


def test_rasters_are_found_by_themselves(shards: ShardSet) -> None:
    assert raster_name(shards, None) == "landcover"
    assert raster_name(shards, "other") == "other"


def test_the_feature_sheet_is_a_picture(shards: ShardSet, skysense: SkySense) -> None:
    picture = feature_sheet(skysense, PretrainConfig(data=DataConfig(views_global=VIEW)), shards)
    assert picture.startswith(b"\x89PNG")


def test_the_segmentation_example_learns(shards: ShardSet) -> None:
    torch.manual_seed(0)
    backbone = Pretrained(ModelConfig(size="debug", moe=MoEConfig(experts=2, blocks=1)), statistics_dict(shards))
    model = SegmentationModel(backbone, "s2", len(shards.classes["landcover"]))
    losses = finetune(model, shards, "landcover", steps=24, batch=8, lr=3e-3)
    assert sum(losses[-6:]) < sum(losses[:6])
    assert 0 <= pixel_accuracy(model, shards, "probe", "landcover") <= 1
