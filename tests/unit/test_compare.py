"""Comparison: what differs comes first, unfair comparisons are named, figures are read at the same samples, offline HTML."""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.config import load
from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.commands import compare as command
from pipeline.compare.ablation import effects
from pipeline.compare.figures import summarise
from pipeline.compare.load import load_runs
from pipeline.compare.report import html_report
from pipeline.compare.verdict import judge
from pipeline.config import PretrainConfig
from pipeline.tracking import Dataset, RunFacts
from pipeline.tracking.experts import TAG
from pipeline.tracking.mirror import add_tag, write_record


def _run(
    folder: Path, name: str, overrides: list[str] | None = None, steps: int = 40, manifest: str = "a", statistics: str = "s",
    split: float = 5.0, score: float = 0.5,
) -> str:  # fmt: skip
    config = load(PretrainConfig, None, [f"run.dir={folder / name}", *(overrides or [])])
    rundir = RunDir(config.run.dir)
    rundir.write_resolved(config)
    rundir.start_metrics(0)
    for step in range(1, steps + 1):
        line: dict[str, float | int] = {
            "step": step, "samples": 8 * step, "loss": 10 / step, "loss/mgcl_hr": 5 / step, "samples_per_s": 4.0,
            "gpu_hours": step * 8 / 4.0 * 2 / 3600,
        }  # fmt: skip
        if step % 10 == 0:
            line |= {
                "probe/knn/fused": score,
                "probe/knn/fused/low": score - 0.05,
                "probe/knn/fused/high": score + 0.05,
                "probe/split": split,
            }
        rundir.append_metrics(line)
    rundir.close()
    write_record(rundir, "test", name, RunFacts(2, "two", (Dataset("shards", manifest * 64, statistics * 64),)))
    return config.run.dir


def test_one_changed_key_stands_alone_and_the_runs_are_comparable(tmp_path: Path) -> None:
    runs = load_runs([_run(tmp_path, "a"), _run(tmp_path, "b", ["model.moe.experts=4"])])
    verdict = judge(runs)
    assert verdict.comparable
    assert verdict.reasons == []
    assert verdict.differs == {"model.moe.experts": [8, 4]}


def test_model_settings_come_before_training_ones(tmp_path: Path) -> None:
    runs = load_runs(
        [_run(tmp_path, "a"), _run(tmp_path, "b", ["train.seed=3", "optimizer.lr=0.5", "model.prompts=0"])]
    )
    assert list(judge(runs).differs) == ["model.prompts", "optimizer.lr", "train.seed"]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"manifest": "b"}, "saw different data \\(manifest aaaaaaaaaaaa and bbbbbbbbbbbb\\)"),
        ({"statistics": "t"}, "different normalisation statistics"),
        ({"split": 6.0}, "probed on different splits"),
    ],
)
def test_unfair_comparisons_are_named(tmp_path: Path, other: dict, why: str) -> None:
    verdict = judge(load_runs([_run(tmp_path, "first"), _run(tmp_path, "second", **other)]))
    assert not verdict.comparable
    assert len(verdict.reasons) == 1
    assert re.search(why, verdict.reasons[0])
    assert "first and second" in verdict.reasons[0]


def test_figures_are_read_at_the_samples_all_have_seen(tmp_path: Path) -> None:
    runs = load_runs([_run(tmp_path, "long", steps=40), _run(tmp_path, "short", steps=20)])
    long, short = summarise(runs)
    assert long.samples == short.samples == 160
    assert long.losses == short.losses
    assert long.gpu_hours == pytest.approx(160 / 4 * 2 / 3600)
    assert any("320, 160" in note for note in judge(runs).notes)


def test_intervals_and_dead_experts_are_noted(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "a"), _run(tmp_path, "b")]
    notes = judge(load_runs(runs)).notes
    assert any("none is of a difference" in note for note in notes)
    assert not any("dead experts" in note for note in notes)
    add_tag(RunDir(runs[0]), TAG, "none since step 9")
    add_tag(RunDir(runs[1]), TAG, "layer 1 expert 3 (hr)")
    notes = judge(load_runs(runs)).notes
    assert [note for note in notes if "dead experts" in note] == ["b ended with dead experts: layer 1 expert 3 (hr)"]


def test_other_objectives_are_noted(tmp_path: Path) -> None:
    runs = load_runs([_run(tmp_path, "a"), _run(tmp_path, "b", ["objective.qsacl_weight=0.0"])])
    assert any("rank by probes" in note for note in judge(runs).notes)


def test_ablation_marks_clear_effects_and_unclean_runs(tmp_path: Path) -> None:
    runs = load_runs([
        _run(tmp_path, "base"), _run(tmp_path, "near", ["model.prompts=0"], score=0.52), _run(tmp_path, "far", ["model.prompts=0"], score=0.8),
        _run(tmp_path, "two", ["model.prompts=0", "train.seed=1"]),
    ])  # fmt: skip
    base, near, far, two = effects(runs, summarise(runs))
    assert base.changed == []
    assert near.is_clean
    assert near.probes["probe/knn/fused"][1:] == (pytest.approx(0.02), False)
    assert far.probes["probe/knn/fused"][1:] == (pytest.approx(0.3), True)
    assert not two.is_clean


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_the_report_needs_no_network_and_no_script(tmp_path: Path) -> None:
    runs = load_runs([_run(tmp_path, "<b>bold</b>".replace("/", "")), _run(tmp_path, "b", ["model.prompts=0"])])
    page = html_report(runs, judge(runs), summarise(runs), ablation=True)
    links = _Links()
    links.feed(page)
    assert links.outside == []
    assert "script" not in links.tags
    assert links.tags.count("svg") >= 2
    assert "<b>bold" not in page
    assert page.index("model.prompts") < page.index("Figures at")
    assert page == html_report(runs, judge(runs), summarise(runs), ablation=True)


def test_the_command_prints_differences_first_and_json_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_run(tmp_path, "a"), _run(tmp_path, "b", ["model.moe.experts=4"], manifest="b")]
    out = tmp_path / "report.html"
    args = argparse.Namespace(runs=runs, out=str(out), ablation=False, uri=None, json=True)
    assert command.main(args) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert next(i for i, line in enumerate(lines) if "model.moe.experts" in line) < next(
        i for i, line in enumerate(lines) if "NOT COMPARABLE" in line
    )
    verdict = json.loads(lines[-1])
    assert verdict["comparable"] is False
    assert verdict["differs"] == {"model.moe.experts": [8, 4]}
    assert out.exists()


def test_unknown_runs_say_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="no run directory"):
        load_runs([str(tmp_path / "nothing")])
    rundir = RunDir(str(tmp_path / "empty"))
    rundir.write_resolved(PretrainConfig())
    with pytest.raises(UsageError, match="no metrics yet"):
        load_runs([rundir.url])
