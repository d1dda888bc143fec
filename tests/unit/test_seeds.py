"""Seeds decide: groups of runs, the two-level interval, the noise floor, and how often they cry wolf."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands import compare as command
from pipeline.compare.figures import summarise
from pipeline.compare.findings import find
from pipeline.compare.groups import group_runs
from pipeline.compare.load import load_runs
from pipeline.compare.seeds import BETTER, OPEN, WORSE, Noise, pool, two_level, verdict
from pipeline.probes.scores import Difference, Outcome, difference
from tests.unit.test_compare import make_run, sites


def outcome(right: np.ndarray) -> Outcome:
    return Outcome(np.ones(len(right), bool), right.astype(np.uint8))


def test_one_seed_is_the_paired_interval_over_sites() -> None:
    rng = np.random.default_rng(0)
    a, b = (outcome(rng.random(80) < share) for share in (0.7, 0.5))
    assert two_level([(a, b)]) == difference(a, b)


def test_seeds_that_disagree_widen_the_interval() -> None:
    places = np.arange(200)
    agree = [(outcome(places < 120), outcome(places < 100))] * 3
    disagree = [(outcome(places < n), outcome(places < 100)) for n in (90, 120, 150)]
    narrow, wide = two_level(agree), two_level(disagree)
    assert narrow is not None
    assert wide is not None
    assert narrow.value == pytest.approx(wide.value) == pytest.approx(0.1)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert narrow.is_clear
    assert not wide.is_clear


def test_confusion_matrices_and_untested_sites() -> None:
    rng = np.random.default_rng(1)
    tested = np.arange(40) < 30
    a, b = (Outcome(tested, rng.integers(0, 9, (40, 3, 3)).astype(np.uint8) * tested[:, None, None]) for _ in range(2))
    assert two_level([(a, b)]) == difference(a, b)
    assert two_level([(a, outcome(np.ones(40)))]) is None
    assert two_level([]) is None


def test_the_floor_is_what_two_means_of_one_setting_differ_by() -> None:
    noise = pool([[0.1, 0.3], [0.5, 0.5, 0.5], [0.9]])
    assert noise.freedom == 3
    assert noise.sd == pytest.approx((0.02 / 3) ** 0.5)
    rng = np.random.default_rng(2)
    passed = []
    for _ in range(500):
        groups = rng.normal(0, 1, (2, 3))
        floor = pool(groups.tolist()).floor(3, 3)
        assert floor is not None
        passed.append(abs(groups[0].mean() - groups[1].mean()) > floor)
    assert 0.02 < np.mean(passed) < 0.08
    assert Noise(None, 0).floor(1, 1) is None
    assert pool([[0.5], [0.6]]).sd is None


def test_decided_needs_interval_and_floor() -> None:
    assert verdict(Difference(0.1, 0.02, 0.2), 0.05) == BETTER
    assert verdict(Difference(-0.1, -0.2, -0.02), 0.05) == WORSE
    assert verdict(Difference(0.1, 0.02, 0.2), 0.11) == OPEN  # inside the noise of seeds
    assert verdict(Difference(0.1, -0.01, 0.2), 0.05) == OPEN  # other sites might say otherwise
    assert verdict(Difference(0.1, 0.02, 0.2), None) == OPEN  # one seed: nobody knows the noise
    assert verdict(None, 0.0) == OPEN


def simulate(rng: np.random.Generator, effect: float, spread: float, seeds: int = 3, number: int = 40) -> str:
    """Runs of two settings on the same sites: a site has its own difficulty, a seed moves the score of its run."""
    difficulty = rng.normal(0, 1, number)
    scores = []
    for shift in (effect, 0.0):
        runs = [difficulty + shift + rng.normal(0, spread) + rng.normal(0, 0.5, number) > 0 for _ in range(seeds)]
        scores.append([outcome(right) for right in runs])
    floor = pool([[float(o.counts.mean()) for o in group] for group in scores]).floor(seeds, seeds)
    return verdict(two_level(list(zip(*scores)), int(rng.integers(1 << 30))), floor)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_equal_settings_are_called_different_at_most_as_often_as_stated(spread: float, monkeypatch) -> None:
    """Of 100 comparisons without an effect, 5 may pass at 5 %; with 3 standard deviations of luck 11."""
    monkeypatch.setattr("pipeline.probes.scores.DRAWS", 100)
    monkeypatch.setattr("pipeline.compare.seeds.DRAWS", 100)
    rng = np.random.default_rng(3)
    alarms = sum(simulate(rng, 0.0, spread) != OPEN for _ in range(100))
    assert alarms <= 11
    assert sum(simulate(rng, 2.0, spread) == BETTER for _ in range(10)) >= 9


def seeded(folder: Path, setting: str, shares: list[float], overrides: list[str], first: int = 0) -> list[str]:
    """Run directories of one setting, a seed each, that name these shares of their test sites rightly."""
    return [
        make_run(folder, f"{setting}-seed-{seed}", [*overrides, f"train.seed={seed}"], right=sites(share), score=share)
        for seed, share in enumerate(shares, start=first)
    ]  # fmt: skip


def test_runs_that_differ_in_their_seed_only_are_one_group(tmp_path: Path) -> None:
    urls = [
        *seeded(tmp_path, "x-base", [0.5] * 3, []), *seeded(tmp_path, "x-none", [0.5] * 2, ["model.prompts=0"]),
        make_run(tmp_path, "again", ["train.seed=1"], right=sites(0.5)), make_run(tmp_path, "other-data", ["train.seed=7"], manifest="b"),
        make_run(tmp_path, "elsewhere", ["train.seed=9", "tracking.experiment=other", "data.cache_gb=7"], right=sites(0.5)),
    ]  # fmt: skip
    groups = group_runs(load_runs(urls))
    assert [(group.name, group.seeds) for group in groups] == [
        ("x-base-seed-0", (0, 1, 2, 9)), ("x-none", (0, 1)), ("again", (1,)), ("other-data", (7,)),
    ]  # fmt: skip
    assert [group.name for group in group_runs(load_runs(urls[:5]))] == ["x-base", "x-none"]


def test_effects_are_told_from_the_noise_of_seeds(tmp_path: Path) -> None:
    urls = [
        *seeded(tmp_path, "base", [0.50, 0.52, 0.48], []), *seeded(tmp_path, "good", [0.70, 0.72, 0.68], ["model.prompts=0"]),
        *seeded(tmp_path, "luck", [0.54, 0.55, 0.51], ["model.prompts=2"]), *seeded(tmp_path, "bad", [0.3], ["model.prompts=1"], first=1),
    ]  # fmt: skip
    runs = load_runs(urls)
    figures, notes = find(runs, summarise(runs), group_runs(runs))
    base, good, luck, bad = figures
    found = [one.against["probe/knn/fused"] for one in (good, luck, bad)]
    assert [finding.verdict for finding in found] == [BETTER, OPEN, WORSE]
    assert [finding.value for finding in found] == pytest.approx([0.2, 0.1 / 3, -0.22])
    assert [finding.seeds for finding in found] == [3, 3, 1]
    assert luck.against["probe/knn/fused"].low > 0  # other sites and seeds' bootstrap alone would have called it better
    assert luck.against["probe/knn/fused"].floor > 0.033
    assert (base.probes["probe/knn/fused"].mean, base.probes["probe/knn/fused"].sd) == pytest.approx((0.5, 0.02))
    assert base.over["pixels"]["probe/knn/fused"].value == pytest.approx(0.2)
    assert base.over["untrained"]["probe/knn/fused"].verdict == BETTER
    assert any("bad-seed-1 has seeds 1, base 0, 1, 2" in note for note in notes)
    assert any("one seed only: bad-seed-1" in note for note in notes)


def test_each_setting_stands_against_its_own_reference(tmp_path: Path) -> None:
    urls = [
        *seeded(tmp_path, "base", [0.5, 0.5], []), *seeded(tmp_path, "all", [0.8, 0.8], ["model.prompts=0"]),
        *seeded(tmp_path, "minus", [0.7, 0.7], ["model.prompts=1"]),
    ]  # fmt: skip
    runs = load_runs(urls)
    figures, _ = find(runs, summarise(runs), group_runs(runs), {"minus": "all"})
    assert [one.reference for one in figures] == [None, "base", "all"]
    assert [one.against["probe/knn/fused"].value for one in figures[1:]] == pytest.approx([0.3, -0.1])


def test_without_sites_to_pair_nothing_is_decided(tmp_path: Path) -> None:
    urls = [
        make_run(tmp_path, f"{n}-{s}", [f"model.prompts={n}", f"train.seed={s}"], score=n / 10)
        for n in (4, 1)
        for s in (0, 1)
    ]
    runs = load_runs(urls)
    figures, notes = find(runs, summarise(runs), group_runs(runs))
    finding = figures[1].against["probe/knn/fused"]
    assert (finding.low, finding.verdict) == (None, OPEN)
    assert finding.value == pytest.approx(-0.3)
    assert any("no test sites to pair" in note for note in notes)


def test_the_command_says_verdicts_and_claims(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    urls = [*seeded(tmp_path, "base", [0.5, 0.52], []), *seeded(tmp_path, "none", [0.3, 0.31], ["model.prompts=0"])]
    page = tmp_path / "page.html"
    asked = command.Asked(["base", "base", "none", "none"], {}, {"none": "prompts help"})
    told = command.run(urls, str(page), asked=asked)
    printed = capsys.readouterr().out
    for text in (printed, page.read_text()):
        assert "not decided" in text
        for wanted in ("prompts help", "holds", "worse", "model.prompts", "pixel statistics"):
            assert wanted in text
    assert told["differs"] == {"model.prompts": [4, 0]}
    assert told["findings"]["none"]["probe/knn/fused"]["verdict"] == WORSE
    assert told["groups"]["base"]["seeds"] == [0, 1]
    assert command.main(argparse.Namespace(runs=urls, out=None, ablation=False, uri=None, json=True)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["comparable"] is True
    assert last["groups"].keys() == {"base", "none"}
