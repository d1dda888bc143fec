"""From a checkpoint to results: all kinds of rows end to end on tiny sets, what is kept, what is refused, what `compare` says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UsageError
from model.config import FusionConfig, ModelConfig, MoEConfig
from model.pretrained import Pretrained
from pipeline.commands.evaluate import read_suite, row_of
from pipeline.compare.evaluated import compare_evaluations, rows_of
from pipeline.evaluate.bands import Bands
from pipeline.evaluate.classify import knn, logistic
from pipeline.evaluate.dense import LinearHead, UPerNet, pixel_loss, whole
from pipeline.evaluate.encode import Network, PixelStatistics, make_batch
from pipeline.evaluate.metrics import difference_of
from pipeline.evaluate.registry import S2_12, Row, row_named
from pipeline.evaluate.results import RESULTS, read_items, read_lines
from pipeline.evaluate.run import Settings, evaluate_row
from pipeline.evaluate.track import send
from pipeline.probes import classify
from pipeline.tracking.store import MemoryStore
from tests import published

STATISTICS = {
    "hr": {"mean": [120.0] * 3, "std": [50.0] * 3}, "s2": {"mean": [1500.0] * 10, "std": [900.0] * 10},
    "s1": {"mean": [-9.0, -16.0], "std": [3.0, 3.0]},
}  # fmt: skip


def tiny_model(seed: int = 0, modalities: tuple[str, ...] = ("hr", "s2", "s1")) -> Pretrained:
    torch.manual_seed(seed)
    cfg = ModelConfig(
        size="debug", modalities=modalities, moe=MoEConfig(experts=0), fusion=FusionConfig(depth=1, dim=16, heads=2)
    )
    return Pretrained(cfg, {name: STATISTICS[name] for name in modalities}, {"step": 7}).eval()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluate.dense.train_head.__defaults__", (4, 2))
    monkeypatch.setattr("pipeline.evaluate.boxes.train_detector.__defaults__", (1,))


def made(name: str, root: Path) -> tuple[Row, str]:
    published.MAKERS[name](root, np.random.default_rng(0))
    row = row_named(name)
    return replace(row, tile_px=min(row.tile_px, 32)) if row.tile_px else row, str(root)


def settings(folder: Path, **change: object) -> Settings:
    return Settings(**{"out": str(folder / "out"), "cache": str(folder / "cache")} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "eurosat_rgb",
        "oscd",
        "levir_cd",
        "benv2",
        "pastis",
        "flair2",
        "dynamic_earthnet_scs",
        "nwpu_vhr10",
        "dior_r",
        "fair1m",
    ],
)
def test_row_runs_end_to_end_beside_its_baselines(name: str, tmp_path: Path) -> None:
    row, root = made(name, tmp_path / "set")
    results = evaluate_row(tiny_model(), row, root, settings(tmp_path))
    assert [result.head for result in results] == list(row.heads[: 2 if row.kind in ("class", "labels") else 1])
    for result in results:
        line = result.to_json()
        assert {
            "task",
            "mode",
            "split",
            "metric",
            "score",
            "low",
            "high",
            "untrained",
            "pixels",
            "seeds",
            "seconds",
        } <= set(line)
        assert 0 <= line["low"] <= line["high"] <= 1
        assert set(result.gains) == {"untrained", "pixels"}
        assert any("test items" in note for note in result.notes)
    kept = read_lines(str(tmp_path / "out"))
    assert [line["head"] for line in kept] == [result.head for result in results]
    keys, records = read_items(str(tmp_path / "out"), kept[0])
    assert keys == [item.key for item in row.read(root, row).of("test")]
    again = evaluate_row(tiny_model(), row, root, settings(tmp_path))  # from cached features, on the same seeds
    assert [r.score for r in again] == [r.score for r in results]
    assert len(read_lines(str(tmp_path / "out"))) == len(results)
    assert difference_of(records, read_items(str(tmp_path / "out"), kept[0])[1]).value == 0  # type: ignore[union-attr]


def test_a_shuffled_band_order_and_a_wrong_unit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    row, root = made("benv2", tmp_path / "set")
    s2, s1 = row.bands
    order = list(s2.order)
    np.random.default_rng(1).shuffle(order)
    wrong = {
        "not in the declared order": (replace(s2, order=tuple(order)), s1),
        "exchanged": (s2, replace(s1, order=("VV", "VH"))),
        "they are dB": (s2, replace(s1, unit="linear")),
        "as of reflectance x 10000": (replace(s2, unit="reflectance"), s1),
    }
    for says, bands in wrong.items():
        with pytest.raises(UsageError, match=says):
            evaluate_row(tiny_model(), replace(row, bands=bands), root, settings(tmp_path))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_a_resized_image_is_named_and_a_missing_sensor_refused(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    (first, _) = evaluate_row(tiny_model(), row, root, settings(tmp_path))
    assert any("32 px, published are 64 px" in note for note in first.notes)
    with pytest.raises(UsageError, match="needs hr, this checkpoint reads s2, s1"):
        evaluate_row(tiny_model(modalities=("s2", "s1")), row, root, settings(tmp_path))
    with pytest.raises(UsageError, match="--head forest"):
        evaluate_row(tiny_model(), row, root, settings(tmp_path, heads=("forest",)))


def test_seeds_and_shares_are_part_of_a_result(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    (result,) = evaluate_row(tiny_model(), row, root, settings(tmp_path, seeds=3, labels=0.5, heads=("knn",)))
    assert len(result.by_seed) == 3
    assert result.score.value == pytest.approx(np.mean(result.by_seed))
    assert (result.labels, result.seeds) == (0.5, 3)
    _, records = read_items(str(tmp_path / "out"), read_lines(str(tmp_path / "out"))[0])
    assert len(records) == 3


def test_compare_pairs_equal_splits_and_refuses_others(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"run{seed}"
        evaluate_row(tiny_model(seed), row, root, settings(folder, heads=("knn",)))
        folders.append(str(folder / "out"))
    found = compare_evaluations(["a", "b"], folders)
    assert found.reasons == []
    (name,) = found.lines
    scores = [line["score"] for line in found.lines[name] if line]
    pair = found.differences[1][name]
    assert pair.value == pytest.approx(scores[1] - scores[0])
    assert pair.low <= pair.value <= pair.high
    assert str(pair) in rows_of(found)[0][1][1]
    (tmp_path / "set" / "Airport" / "airport_3.jpg").unlink()
    evaluate_row(tiny_model(1), row, root, settings(tmp_path / "other", heads=("knn",)))
    apart = compare_evaluations(["a", "c"], [folders[0], str(tmp_path / "other" / "out")])
    assert "different splits of eurosat_rgb frozen knn" in apart.reasons[0]
    assert apart.differences[1] == {}


def test_compare_of_folders_says_so_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from pipeline.commands.compare import main

    row, root = made("eurosat_rgb", tmp_path / "set")
    for seed in (0, 1):
        evaluate_row(tiny_model(seed), row, root, settings(tmp_path / f"run{seed}", heads=("knn",)))
    runs = [str(tmp_path / f"run{seed}" / "out") for seed in (0, 1)]
    assert main(Namespace(runs=runs, uri=None, out=None, ablation=False, json=True)) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["comparable"] is True
    assert "difference" in str(line["evaluations"])


def test_the_five_likeliest_classes_are_told_where_there_are_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcdef":
        for i in range(6):
            published.picture(tmp_path / "set" / name / f"{i}.png", published.rgb(rng, 32))
    (result,) = evaluate_row(
        tiny_model(), row_named("eurosat_rgb"), str(tmp_path / "set"), settings(tmp_path, heads=("knn",))
    )
    assert result.score.value <= result.to_json()["top5"] <= 1
    assert any("five likeliest" in note for note in result.notes)


def test_dense_heads_learn_from_what_chose_their_rate_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.evaluate import dense

    row, root = made("flair2", tmp_path / "set")
    learnt: list[int] = []
    train_head = dense.train_head

    def counted(
        head: torch.nn.Module, load: dense.Loader, rows: Sequence[int], seed: int, rate: float
    ) -> torch.nn.Module:
        learnt.append(len(rows))
        return train_head(head, load, rows, seed, rate)

    monkeypatch.setattr("pipeline.evaluate.dense.train_head", counted)
    (result,) = evaluate_row(tiny_model(), row, root, settings(tmp_path))
    train, val = result.items["train"], result.items["val"]
    assert (
        learnt == [train, train, train + val] * 3
    )  # two rates, then the better one on all; trained, untrained, pixels


def test_damaged_results_and_items_are_named(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    evaluate_row(tiny_model(), row, root, settings(tmp_path, heads=("knn",)))
    out = str(tmp_path / "out")
    (line,) = read_lines(out)
    (path,) = (tmp_path / "out" / "items").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="no readable items"):
        read_items(out, line)
    (tmp_path / "out" / RESULTS).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        read_lines(out)


def test_knn_is_the_probes_own_and_logistic_chooses_on_validation() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8)) * 2
    labels = rng.integers(0, 3, 240)
    x = centres[labels] + rng.normal(size=(240, 8))
    x = (x - x[:160].mean(0)) / x[:160].std(0)
    one_hot = np.eye(3, dtype=bool)[labels]
    votes = knn(x[:160], one_hot[:160], x[160:])
    assert votes.argmax(1).tolist() == classify.knn(x[:160], labels[:160], x[160:], 20).tolist()

    def quality(scores: np.ndarray, truth: np.ndarray) -> float:
        return float((scores.argmax(1) == truth.argmax(1)).mean())

    scores, strength = logistic(x[:120], one_hot[:120], x[120:160], one_hot[120:160], x[160:], quality)
    assert quality(scores, one_hot[160:]) > 0.8
    assert strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


def test_loss_at_points_reads_what_the_whole_map_has() -> None:
    """With every pixel drawn, the loss at points is the loss of the whole upsampled map."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 3, 4, 5), torch.randn(1, 3, 2, 3)]
    labels = torch.randint(-1, 3, (1, 16, 20))
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(320, (1, 320), generator=torch.Generator().manual_seed(0))
    scores = whole(parts, (16, 20)).flatten(2).gather(2, at[:, None].expand(1, 3, 320))
    expected = torch.nn.functional.cross_entropy(scores, labels.flatten(1).gather(1, at), ignore_index=-1)
    torch.testing.assert_close(pixel_loss(parts, labels, generator), expected)


@pytest.mark.parametrize("head", [LinearHead, UPerNet])
def test_dense_heads_learn_a_picture(head: type[LinearHead] | type[UPerNet]) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (4, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps = [
        torch.nn.functional.one_hot(labels[:, ::4, ::4]).permute(0, 3, 1, 2).float().repeat(1, 4, 1, 1),
        torch.randn(4, 8, 4, 4),
    ]
    built = head([8, 8], 2)
    optimizer = torch.optim.AdamW(built.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        pixel_loss(built(maps), labels, generator).backward()
        optimizer.step()
    predicted = whole(built.eval()(maps), (32, 32)).argmax(1)
    assert float((predicted == labels).float().mean()) > 0.85


def test_pixel_statistics_are_numpys_and_see_only_valid_pixels() -> None:
    rng = np.random.default_rng(0)
    row = replace(row_named("ucmerced"), bands=(Bands("hr", ("R", "G", "B"), "uint8", 0.3),))
    from pipeline.evaluate.items import Sample

    pixels = rng.integers(0, 255, (1, 3, 16, 16)).astype(np.uint8)
    model = tiny_model()
    batch = make_batch(model, row, [Sample({"hr": pixels}, 0, inside=(12, 16))])
    found = PixelStatistics(row)(batch, dense=True)
    seen = (pixels[0, :, :12].reshape(3, -1).astype(float) - 120) / 50
    expected = np.concatenate([seen.mean(1), seen.std(1), *np.quantile(seen, [0.1, 0.9], axis=1)])
    np.testing.assert_allclose(found.pooled[0][0, :12].numpy(), expected, atol=1e-5)
    cell = (pixels[0, :, 4:8, 8:12].reshape(3, -1).astype(float) - 120) / 50
    expected = np.concatenate([cell.mean(1), cell.std(1), *np.quantile(cell, [0.1, 0.9], axis=1)])
    np.testing.assert_allclose(found.maps[0][0][0, :, 1, 2].numpy(), expected, atol=1e-5)
    assert [m.shape[-1] for m in found.maps[0]] == [4, 2, 1]
    assert not found.maps[0][0][0, :, 3].any()  # the row of cells beyond the tile
    whole_tile = Network("trained", model, row, "concat", "mean", None)(batch, dense=True)
    poisoned = make_batch(
        model, row, [Sample({"hr": np.where(np.arange(16)[:, None] < 12, pixels, 99)}, 0, inside=(12, 16))]
    )
    torch.testing.assert_close(
        Network("trained", model, row, "concat", "mean", None)(poisoned, True).pooled[0], whole_tile.pooled[0]
    )


def test_results_go_to_the_tracking_store(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    (result,) = evaluate_row(tiny_model(), row, root, settings(tmp_path, heads=("knn",)))
    store = MemoryStore()
    run_id = store.open_run(None, "e", "n", {})
    send(store, run_id, [result.to_json()], str(tmp_path / "out" / RESULTS))
    assert store.history(run_id, "evaluate/eurosat_rgb/frozen/knn/score") == [(7, result.score.value)]
    assert "evaluate/results.jsonl" in store.runs[run_id]["artifacts"]


def test_suite_entries_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    defaults = {"mode": "frozen", "seeds": 1}
    path.write_text("- {task: eurosat_rgb, data: a, seeds: 3}\n- {task: oscd, data: b}\n")
    assert [(job["task"], job["seeds"]) for job in read_suite(str(path), defaults)] == [("eurosat_rgb", 3), ("oscd", 1)]
    for content, says in (
        ("- {task: x}", "entry 1 needs task and data"),
        ("- {task: x, data: y, size: 3}", "entry 1 has size"),
        ("{}", "must be a list"),
        ("- [", "no YAML"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=says):
            read_suite(str(path), defaults)
    with pytest.raises(UsageError, match="does not exist"):
        read_suite(str(tmp_path / "none.yaml"), defaults)


def test_images_of_ones_own_are_a_row_when_declared_whole(tmp_path: Path) -> None:
    published.MAKERS["eurosat_rgb"](tmp_path / "set", np.random.default_rng(0))
    said = {"task": "folders", "sensor": "hr", "bands": "R,G,B", "unit": "uint8", "gsd": 0.3}
    own = evaluate_row(tiny_model(), row_of(said), str(tmp_path / "set"), settings(tmp_path, heads=("knn",)))
    rng = np.random.default_rng(0)
    for name in ("Farm", "Port"):
        for i in range(8):
            published.tiff(tmp_path / "s2" / name / f"{i}.tif", published.sentinel2(rng, S2_12, 16))
    series = row_of({**said, "sensor": "s2", "bands": ",".join(S2_12), "unit": "reflectance x 10000", "gsd": 10})
    (result,) = evaluate_row(tiny_model(), series, str(tmp_path / "s2"), settings(tmp_path, heads=("knn",)))
    assert [own[0].task, result.task] == ["folders", "folders"]
    assert result.facts["bands"] == [f"s2 from {' '.join(S2_12)} (reflectance x 10000, 10 m)"]
    with pytest.raises(UsageError, match="reflectance"):
        evaluate_row(tiny_model(), replace(series, bands=(replace(series.bands[0], unit="reflectance"),)), str(tmp_path / "s2"), settings(tmp_path))  # fmt: skip
    for change, says in (
        ({"unit": None}, "needs --unit"),
        ({"unit": "DN"}, "undeclared"),
        ({"bands": "R,G"}, "has no B"),
        ({"task": "oscd"}, "--sensor goes with --task folders"),
    ):
        with pytest.raises(UsageError, match=says):
            row_of({**said, **change})


def test_classes_that_only_the_test_has_are_named() -> None:
    from pipeline.evaluate.frozen import Sides, Targets, unseen
    from pipeline.evaluate.items import LabelledSet

    labelled = LabelledSet((), ("oak", "beech", "pine"), "")
    dense = Targets([np.array([[0, -1]]), np.array([[1, 0]]), np.array([[2, 1]])], [(1, 2)] * 3)
    assert unseen(labelled, dense, Sides([0], [1], [2])) == [
        "no training item has pine, which the test has: nothing can score there"
    ]
    assert unseen(labelled, Targets([0, 1, 0], [(1, 1)] * 3), Sides([0], [1], [2])) == []
    several = Targets([np.array([True, False, False]), np.array([True, False, True])], [(1, 1)] * 2)
    assert "pine" in unseen(labelled, several, Sides([0], [], [1]))[0]
