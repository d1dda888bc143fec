"""Fine-tuning: interrupted and continued equals uninterrupted; layers learn at their own rates; the network learns what the head cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import RunFailure
from pipeline.evaluate.finetune import Tuned, Tuning, layer_rates
from pipeline.evaluate.registry import row_named
from pipeline.evaluate.results import read_lines
from pipeline.evaluate.run import evaluate_row
from tests import published
from tests.unit.test_evaluate_run import made, settings, tiny_model


def weights(tuning: Tuning) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tuning.tuned.state_dict().items()}


def tuning_of(name: str, folder: Path, url: Path, epochs: int = 5) -> Tuning:
    row, root = made(name, folder)
    labelled = row.read(root, row)
    items = [item for item in labelled.of("train") if row.kind != "boxes" or len(item.read().target.labels)][:6]  # type: ignore[union-attr]
    chosen = settings(folder, mode="finetune", epochs=epochs, batch=2)
    torch.manual_seed(0)
    tuned = Tuned(
        tiny_model(),
        row,
        labelled,
        row.heads[0] if row.kind != "class" else "linear",
        "concat",
        chosen,
        items[0].read(),
    )
    return Tuning(tuned, items, chosen, 0, str(url))


@pytest.mark.parametrize("name", ["eurosat_rgb", "flair2", "levir_cd", "nwpu_vhr10", "dior_r"])
def test_interrupted_and_continued_equals_uninterrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuning_of(name, tmp_path / "set", tmp_path / "a", 3)
    whole.run(lambda: 0.5)
    save = Tuning.save

    def interrupted(self: Tuning) -> None:
        save(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    broken = tuning_of(name, tmp_path / "set", tmp_path / "b", 3)
    with monkeypatch.context() as patched:
        patched.setattr(Tuning, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broken.run(lambda: 0.5)
    torch.rand(7)  # whatever a new process has drawn before
    second = tuning_of(name, tmp_path / "set", tmp_path / "b", 3)
    second.run(lambda: 0.9)
    expected, found = weights(whole), weights(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert second.notes == {"train_score_frozen": 0.5}  # from before the interruption
    before = tuning_of(name, tmp_path / "set", tmp_path / "c", 3)
    assert any(not torch.equal(expected[key], value) for key, value in weights(before).items())


def test_the_backbone_stands_still_for_a_fifth_of_the_epochs(tmp_path: Path) -> None:
    tuning = tuning_of("eurosat_rgb", tmp_path / "set", tmp_path / "a", 5)
    start = weights(tuning)
    seen = {}

    def look() -> float:
        seen.update(weights(tuning))
        return 0.0

    tuning.run(look)
    assert tuning.frozen_epochs == 1
    network = [name for name in start if name.startswith("network.skysense.backbone.stages")]
    assert all(torch.equal(start[name], seen[name]) for name in network)
    assert any(not torch.equal(start[name], seen[name]) for name in start if name.startswith("head"))
    assert any(not torch.equal(start[name], weights(tuning)[name]) for name in network)


def test_layers_nearer_to_the_pixels_learn_more_slowly(tmp_path: Path) -> None:
    tuning = tuning_of("eurosat_rgb", tmp_path / "set", tmp_path / "a")
    names = {id(p): name for name, p in tuning.tuned.named_parameters()}
    rate = {names[id(p)]: group["lr_scale"] for group in tuning.optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(names)
    stage = [next(r for name, r in rate.items() if f"backbone.stages.{s}.0." in name) for s in range(4)]
    tokens = next(r for name, r in rate.items() if "tokenizers.hr" in name)
    assert tokens < stage[0] < stage[1] < stage[2] < stage[3] < 0.1 + 1e-9
    assert {r for name, r in rate.items() if name.startswith("head")} == {1.0}
    assert layer_rates(tiny_model())["network.skysense.backbone.tokenizers"] == pytest.approx(0.1 * 0.9**6)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    tuning = tuning_of("eurosat_rgb", tmp_path / "set", tmp_path / "a", 1)
    tuning.run(lambda: 0.0)
    (path,) = (tmp_path / "a").glob("step-*/state.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunFailure, match=r"state\.safetensors has"):
        tuning_of("eurosat_rgb", tmp_path / "set", tmp_path / "a", 2).run(lambda: 0.0)


def test_finetuned_row_stands_beside_frozen_untrained_scratch_and_pixels(tmp_path: Path) -> None:
    row, root = made("eurosat_rgb", tmp_path / "set")
    (result,) = evaluate_row(tiny_model(), row, root, settings(tmp_path, mode="finetune", epochs=2))
    assert set(result.baselines) == {"scratch", "frozen", "untrained", "pixels"}
    assert {"train_score", "train_score_frozen"} <= set(result.chosen)
    assert f"{result.chosen['train_score']:.3f} at the end" in result.notes[-1]
    assert any("test items: the row runs" in note for note in result.notes)
    (line,) = read_lines(str(tmp_path / "out"))
    assert line["mode"] == "finetune"
    (again,) = evaluate_row(tiny_model(), row, root, settings(tmp_path, mode="finetune", epochs=2))
    assert again.score == result.score
    assert np.isfinite(list(result.chosen.values())).all()
    assert row_named("eurosat_rgb").heads == ("knn", "logistic")


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_boxes_of_images_whose_coarsest_map_is_one_cell(mode: str, tmp_path: Path) -> None:
    """32 pixels at stride 32: one value per channel, of which no batch statistics can be taken."""
    published.nwpu(tmp_path / "set", np.random.default_rng(0), 32)
    (result,) = evaluate_row(
        tiny_model(), row_named("nwpu_vhr10"), str(tmp_path / "set"), settings(tmp_path, mode=mode, epochs=2)
    )
    assert np.isfinite(result.score.value)


@pytest.mark.parametrize("name", ["flair2", "eurosat_rgb"])
def test_fine_tuning_takes_the_features_that_the_frozen_mode_kept(name: str, tmp_path: Path) -> None:
    row, root = made(name, tmp_path / "set")
    evaluate_row(tiny_model(), row, root, settings(tmp_path))
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    evaluate_row(tiny_model(), row, root, settings(tmp_path, mode="finetune", epochs=1))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == kept
    assert len(kept) == 3  # trained, untrained, pixels
