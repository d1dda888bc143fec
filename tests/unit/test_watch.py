"""`probe.outside`: a run watched on rows of `evaluate`, beside the same baselines as its own labels; what cannot be is refused first."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UsageError
from model.config import ModelConfig, MoEConfig
from model.skysense import SkySense
from pipeline.compare.load import load_runs
from pipeline.compare.paired import pair
from pipeline.compare.verdict import judge
from pipeline.config import PretrainConfig, ProbeConfig
from pipeline.evaluate import in_loop
from pipeline.evaluate.in_loop import Watched, describe_items, plan_watched, watch
from pipeline.evaluate.items import Item, Sample
from pipeline.evaluate.registry import ROWS, row_named
from pipeline.probes.outcomes import list_offline, read_outcomes, url_of
from pipeline.probes.pixels import describe_pixels
from pipeline.probes.scores import total_score
from tests import published
from tests.unit.test_compare import make_run
from tests.unit.test_evaluate_run import STATISTICS, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("named")
    published.class_folders(root, np.random.default_rng(0))
    published.picture(
        root / "Airport" / "airport_3.jpg", published.rgb(np.random.default_rng(1), 48), "JPEG"
    )  # of another size
    return root


def config(folder: Path, name: str = "eurosat_rgb", **probe: object) -> PretrainConfig:
    cfg = PretrainConfig(model=ModelConfig(size="debug", moe=MoEConfig(experts=2, blocks=1)))
    return replace(cfg, probe=ProbeConfig(every=5, outside={name: str(folder)}, **probe))  # type: ignore[arg-type]


def planned(folder: Path, **probe: object) -> tuple[PretrainConfig, Watched]:
    cfg = config(folder, **probe)
    (watched,) = plan_watched(cfg)
    return cfg, watched


def network(seed: int) -> SkySense:
    torch.manual_seed(seed)
    return SkySense(ModelConfig(size="debug", moe=MoEConfig(experts=2, blocks=1)))


def test_a_row_is_scored_beside_its_baselines_and_two_runs_are_paired(folder: Path, tmp_path: Path) -> None:
    cfg, watched = planned(folder)
    runs = [make_run(tmp_path, name) for name in ("a", "b")]
    scores = []
    for seed, run in enumerate(runs):
        first = watch(network(7), cfg, watched, STATISTICS, rundir_url=run, step=0)
        found = watch(network(seed), cfg, watched, STATISTICS, rundir_url=run, step=10)
        for task in ("knn", "linear"):
            name = f"probe/{task}/eurosat_rgb"
            assert found[f"{name}/low"] <= found[name] <= found[f"{name}/high"]
            assert found[f"{name}/untrained"] == first[name]
            assert found[f"{name}/pixels"] == first[f"{name}/pixels"]
            assert found[f"{name}/over_pixels"] == pytest.approx(found[name] - found[f"{name}/pixels"])
        kept = read_outcomes(url_of(run, 10, f"eurosat_rgb-{watched.digest}"))
        assert kept.keys == watched.keys
        assert total_score(kept.by_name["knn/eurosat_rgb"]) == found["probe/knn/eurosat_rgb"]
        assert (10, f"eurosat_rgb-{watched.digest}") in list_offline(run)
        scores.append(found["probe/linear/eurosat_rgb"])
    loaded = load_runs(runs)
    pairs = pair(loaded, 8 * 40)
    assert pairs.differences[1]["probe/linear/eurosat_rgb"].value == pytest.approx(scores[1] - scores[0])
    for run, split in zip(loaded, (1.0, 2.0)):
        run.lines[-1]["probe/eurosat_rgb/split"] = split
    assert "probed on different splits of eurosat_rgb" in judge(loaded).reasons[0]


def test_images_of_several_sizes_are_described_as_one_by_one(folder: Path) -> None:
    _, watched = planned(folder)
    model = tiny_model()
    (together,) = describe_items([describe_pixels], model, watched, "cpu")
    assert len({item.read().images["hr"].shape for item in watched.items}) == 2
    for i in (0, len(watched.items) - 1):
        (alone,) = describe_items([describe_pixels], model, replace(watched, items=watched.items[i : i + 1]), "cpu")
        torch.testing.assert_close(together.pooled["hr"][i], alone.pooled["hr"][0])


def test_images_are_read_once_per_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, watched = planned(folder)
    monkeypatch.setattr(in_loop, "BATCH", 3)
    reads: Counter[str] = Counter()

    def counted(item: Item) -> Item:
        def read() -> Sample:
            reads[item.key] += 1
            return item.read()

        return replace(item, read=read)

    asked = replace(watched, items=tuple(counted(item) for item in watched.items))
    (found,) = describe_items([describe_pixels], tiny_model(), asked, "cpu")
    assert reads == dict.fromkeys((item.key for item in watched.items), 1)
    monkeypatch.undo()
    (whole,) = describe_items([describe_pixels], tiny_model(), watched, "cpu")
    torch.testing.assert_close(found.pooled["hr"], whole.pooled["hr"])


def test_what_is_looked_at_is_part_of_the_split_and_nested_in_the_number(folder: Path) -> None:
    few, many = planned(folder, samples=6)[1], planned(folder)[1]
    assert few.num_train == 6
    assert len(few.keys) <= 6
    assert {item.key for item in few.items} < {item.key for item in many.items}
    others = [few, many, planned(folder, pool="mean")[1], planned(folder, stage=2)[1]]
    assert len({one.digest for one in others}) == 4
    assert planned(folder)[1].digest == many.digest


def test_labels_of_a_class_row_are_its_readers(tmp_path: Path) -> None:
    """The plan takes labels from the list of items, without opening an image."""
    for row in ROWS:
        if row.kind == "class":
            published.MAKERS[row.name](tmp_path / row.name, np.random.default_rng(0))
            labelled = row.read(str(tmp_path / row.name), row)
            assert all(labelled.classes[int(item.read().target)] == item.label for item in labelled.items)  # type: ignore[arg-type]


def test_what_cannot_be_watched_is_refused_before_a_step(folder: Path, tmp_path: Path) -> None:
    off = config(folder)
    assert plan_watched(replace(off, probe=replace(off.probe, every=0))) == ()
    with pytest.raises(UsageError, match="benv2 is of kind labels"):
        plan_watched(config(folder, "benv2"))
    with pytest.raises(UsageError, match=r"probe\.outside eurosat: no such row; near it: eurosat_rgb"):
        plan_watched(config(folder, "eurosat"))
    cfg = config(folder)
    with pytest.raises(UsageError, match=r"needs hr, which model\.modalities lacks"):
        plan_watched(replace(cfg, model=replace(cfg.model, modalities=("s2", "s1"))))
    with pytest.raises(UsageError, match="nowhere holds 0 folders"):
        plan_watched(config(tmp_path / "nowhere"))
    for name in ("Airport", "Beach"):
        for i in range(12):
            published.picture(tmp_path / "masks" / name / f"{i}.png", np.ones((3, 16, 16), np.uint8))
    with pytest.raises(UsageError, match=r"probe\.outside: .*none is above 1"):
        plan_watched(config(tmp_path / "masks"))
    with pytest.raises(UsageError, match="training images, a probe needs 4"):
        plan_watched(config(folder, samples=3))
    assert row_named("eurosat_rgb").kind == "class"
