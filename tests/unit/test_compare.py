"""Comparison: what differs comes first, unfair comparisons are named, figures are read at the same samples, offline HTML."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import load
from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.commands import compare as command
from pipeline.compare.ablation import effects, legend
from pipeline.compare.curves import curve_data, thin
from pipeline.compare.figures import curve_names, level, summarise
from pipeline.compare.load import RunData, load_runs
from pipeline.compare.paired import Pairs, pair
from pipeline.compare.report import html_report
from pipeline.compare.verdict import judge
from pipeline.config import PretrainConfig
from pipeline.probes.outcomes import Outcomes, keep_round, url_of, write_outcomes
from pipeline.probes.scores import Difference, Outcome, difference
from pipeline.tracking import Dataset, RunFacts
from pipeline.tracking.experts import TAG
from pipeline.tracking.mirror import add_tag, write_record
from tests.data_folder import REPOSITORY


def make_run(
    folder: Path, name: str, overrides: list[str] | None = None, steps: int = 40, manifest: str = "a", statistics: str = "s",
    split: float = 5.0, score: float = 0.5, right: np.ndarray | None = None,
) -> str:  # fmt: skip
    """right: keeps 0/1 per test site at every probe; untrained all of them are wrong, pixel statistics get the first 30 % right."""
    config = load(PretrainConfig, None, [f"run.dir={folder / name}", *(overrides or [])])
    rundir = RunDir(config.run.dir)
    rundir.write_resolved(config)
    rundir.start_metrics(0)
    if right is not None:
        pixels = _outcomes(sites(0.3), split)
        keep_round(_outcomes(right * 0, split), pixels, rundir.url, 0)
    for step in range(1, steps + 1):
        line: dict[str, float | int] = {
            "step": step, "samples": 8 * step, "loss": 10 / step, "loss/mgcl_hr": 5 / step, "samples_per_s": 4.0,
            "gpu_hours": step * 8 / 4.0 * 2 / 3600,
        }  # fmt: skip
        if right is not None and step % 10 == 0:
            line |= keep_round(_outcomes(right, split), pixels, rundir.url, step)
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


def _outcomes(right: np.ndarray, split: float) -> Outcomes:
    keys = tuple(f"site-{i}" for i in range(len(right)))
    return Outcomes(
        f"{int(split):012x}beef", keys, {"knn/fused": Outcome(np.ones(len(right), bool), right.astype(np.uint8))}
    )


def sites(share: float, number: int = 100) -> np.ndarray:
    """The first `share` of the sites are named rightly: of two runs one is right wherever the other is."""
    return (np.arange(number) < round(share * number)).astype(np.uint8)


def _pairs(runs: list[RunData]) -> Pairs:
    return pair(runs, summarise(runs)[0].samples)


def test_one_changed_key_stands_alone_and_the_runs_are_comparable(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b", ["model.moe.experts=4"])])
    verdict = judge(runs)
    assert verdict.comparable
    assert verdict.reasons == []
    assert verdict.differs == {"model.moe.experts": [8, 4]}


def test_model_settings_come_before_training_ones(tmp_path: Path) -> None:
    runs = load_runs(
        [make_run(tmp_path, "a"), make_run(tmp_path, "b", ["train.seed=3", "optimizer.lr=0.5", "model.prompts=0"])]
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
    verdict = judge(load_runs([make_run(tmp_path, "first"), make_run(tmp_path, "second", **other)]))
    assert not verdict.comparable
    assert len(verdict.reasons) == 1
    assert re.search(why, verdict.reasons[0])
    assert "first and second" in verdict.reasons[0]


def test_figures_are_read_at_the_samples_all_have_seen(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path, "long", steps=40), make_run(tmp_path, "short", steps=20)])
    long, short = summarise(runs)
    assert long.samples == short.samples == 160
    assert long.losses == short.losses
    assert long.gpu_hours == pytest.approx(160 / 4 * 2 / 3600)
    assert any("320, 160" in note for note in judge(runs).notes)


def test_dead_experts_are_noted(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b")]
    notes = judge(load_runs(runs)).notes
    assert not any("dead experts" in note for note in notes)
    add_tag(RunDir(runs[0]), TAG, "none since step 9")
    add_tag(RunDir(runs[1]), TAG, "layer 1 expert 3 (hr)")
    notes = judge(load_runs(runs)).notes
    assert [note for note in notes if "dead experts" in note] == ["b ended with dead experts: layer 1 expert 3 (hr)"]


def test_other_objectives_are_noted(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b", ["objective.qsacl_weight=0.0"])])
    assert any("rank by probes" in note for note in judge(runs).notes)


def test_without_outcomes_the_notes_say_how_to_read_the_intervals(tmp_path: Path) -> None:
    pairs = _pairs(
        load_runs([make_run(tmp_path, "a"), make_run(tmp_path, "b"), make_run(tmp_path, "other", split=6.0)])
    )
    assert pairs.differences == [{}, {}, {}]
    assert [note for note in pairs.notes if "cannot be paired" in note] == [
        pairs.notes[0]
    ]  # other: not comparable anyway
    assert pairs.notes[0].startswith(
        "a and b cannot be paired site by site (a and b kept no outcomes of the last probe); their"
    )
    assert _pairs(load_runs([make_run(tmp_path, "alone")])).notes == []


def test_runs_are_paired_over_their_test_sites(tmp_path: Path) -> None:
    runs = load_runs([
        make_run(tmp_path, "base", right=sites(0.5)), make_run(tmp_path, "better", right=sites(0.58)), make_run(tmp_path, "same", right=sites(0.5)),
        make_run(tmp_path, "elsewhere", right=sites(0.9), split=6.0),
    ])  # fmt: skip
    pairs = _pairs(runs)
    wanted = difference(*(_outcomes(sites(share), 5.0).by_name["knn/fused"] for share in (0.58, 0.5)))
    assert pairs.differences == [{}, {"probe/knn/fused": wanted}, {"probe/knn/fused": Difference(0, 0, 0)}, {}]
    assert wanted is not None
    assert wanted.is_clear
    assert any("another training seed" in note for note in pairs.notes)
    for row, height in (("untrained", 0.0), ("pixels", 0.3)):
        found = [summary.over[row]["probe/knn/fused"].value for summary in summarise(runs)]
        assert found == pytest.approx([share - height for share in (0.5, 0.58, 0.5, 0.9)])
        assert [summary.rows[row]["probe/knn/fused"] for summary in summarise(runs)] == pytest.approx([height] * 4)


def test_a_probe_curve_has_the_levels_of_what_costs_nothing(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path, "a", right=sites(0.5)), make_run(tmp_path, "b")])
    assert [name for name in curve_names(runs) if name.startswith("probe/")] == ["probe/knn/fused"]
    assert (level(runs[0], "probe/knn/fused", "pixels"), level(runs[1], "probe/knn/fused", "pixels")) == (0.3, None)
    [plot] = [plot for plot in curve_data(runs, [0, 1])["plots"] if plot["key"] == "probe/knn/fused"]
    assert [curve["levels"] for curve in plot["curves"]] == [{"untrained": 0.0, "pixels": 0.3}, {}]
    assert plot["curves"][0]["low"] is not None


@given(st.lists(st.floats(-1e3, 1e3), max_size=300), st.integers(4, 50))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float], points: int) -> None:
    kept = thin(np.array(values), points)
    assert len(kept) <= points
    assert kept == sorted(set(kept))
    if values:
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        chosen = [values[i] for i in kept]
        assert (min(chosen), max(chosen)) == (min(values), max(values))
    if len(values) <= points:
        assert kept == list(range(len(values)))


def test_the_probe_that_both_have_seen_is_paired(tmp_path: Path) -> None:
    """The long run's last probe lies beyond the short one's samples; its file of step 20 counts, not that of step 40."""
    long = make_run(tmp_path, "long", right=sites(0.5))
    short = make_run(tmp_path, "short", steps=20, right=sites(0.5))
    write_outcomes(url_of(long, 40), _outcomes(sites(0.9), 5.0))
    assert _pairs(load_runs([long, short])).differences[1] == {"probe/knn/fused": Difference(0, 0, 0)}
    uneven = make_run(tmp_path, "uneven", steps=29, right=sites(0.5))
    (tmp_path / "uneven" / "probes" / "step-00000020.npz").rename(tmp_path / "uneven" / "probes" / "kept")
    pairs = _pairs(load_runs([short, uneven]))
    assert pairs.differences[1] == {}
    assert "short and uneven cannot be paired site by site (uneven kept no outcomes" in pairs.notes[0]


def test_unreadable_and_foreign_outcomes_are_notes(tmp_path: Path) -> None:
    base, torn, foreign = (make_run(tmp_path, name, right=sites(0.5)) for name in ("base", "torn", "foreign"))
    Path(url_of(torn, 40)).write_bytes(Path(url_of(torn, 40)).read_bytes()[:200])
    write_outcomes(url_of(foreign, 40), _outcomes(sites(0.9), 6.0))
    pairs = _pairs(load_runs([base, torn, foreign]))
    assert pairs.differences == [{}, {}, {}]
    assert [note for note in pairs.notes if "torn/probes/step-00000040.npz holds no readable" in note]
    assert [note for note in pairs.notes if "foreign/probes/step-00000040.npz is of another probe split" in note]
    assert sum("cannot be paired" in note for note in pairs.notes) == 2


def test_offline_probes_are_paired_by_task_and_split(tmp_path: Path) -> None:
    a, b = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    for url, share in ((a, 0.5), (b, 0.6)):
        write_outcomes(url_of(url, 30, "knn-00000000000fbeef"), _outcomes(sites(0.1), 15.0))
        write_outcomes(url_of(url, 40, "knn-00000000000fbeef"), _outcomes(sites(share), 15.0))
    write_outcomes(url_of(b, 40, "knn-00000000000ebeef"), _outcomes(sites(0.9), 14.0))
    pairs = _pairs(load_runs([a, b]))
    assert list(pairs.differences[1]) == ["probe/knn/fused (00000000)"]
    assert pairs.differences[1]["probe/knn/fused (00000000)"].value == pytest.approx(0.1)
    assert any("kept no outcomes of the last probe" in note for note in pairs.notes)  # of the in-loop one
    Path(url_of(a, 40, "knn-00000000000fbeef")).unlink()
    notes = _pairs(load_runs([a, b])).notes
    assert any(note.startswith("a was last probed at 240 samples, b at 320") for note in notes)


def test_ablation_marks_clear_effects_and_unclean_runs(tmp_path: Path) -> None:
    runs = load_runs([
        make_run(tmp_path, "base"), make_run(tmp_path, "near", ["model.prompts=0"], score=0.52), make_run(tmp_path, "far", ["model.prompts=0"], score=0.8),
        make_run(tmp_path, "two", ["model.prompts=0", "train.seed=1"]),
    ])  # fmt: skip
    found = effects(runs, summarise(runs), _pairs(runs))
    base, near, far, two = found
    assert base.changed == []
    assert near.is_clean
    changes = [effect.probes["probe/knn/fused"] for effect in (near, far)]
    assert [(change.difference, change.clear) for change in changes] == [
        (pytest.approx(0.02), False),
        (pytest.approx(0.3), True),
    ]
    assert [str(change) for change in changes] == ["0.520 +0.020", "0.800 +0.300 †"]
    assert not two.is_clean
    assert "† = no outcomes to pair, the runs' own intervals do not touch; one seed each" in legend(
        found, ["probe/knn/fused"]
    )


def test_ablation_goes_by_the_paired_interval_where_it_can(tmp_path: Path) -> None:
    """+0.04 with own intervals of ±0.05: clear in pairs only; the run without outcomes is judged by the older rule."""
    runs = load_runs([
        make_run(tmp_path, "base", right=sites(0.5)), make_run(tmp_path, "paired", ["model.prompts=0"], score=0.54, right=sites(0.54)),
        make_run(tmp_path, "bare", ["model.prompts=0"], score=0.54),
    ])  # fmt: skip
    found = effects(runs, summarise(runs), _pairs(runs))
    paired, bare = (effect.probes["probe/knn/fused"] for effect in found[1:])
    assert (paired.clear, bare.clear) == (True, False)
    assert str(paired).startswith("0.540 +0.040 [+0.01, +0.0")
    assert str(paired).endswith("] *")
    assert bare.paired is None
    assert {"*", "†"} <= set(legend(found, ["probe/knn/fused"]))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_the_report_needs_no_network(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path, "<b>bold</b>".replace("/", "")), make_run(tmp_path, "b", ["model.prompts=0"])])
    page = html_report(runs, judge(runs), summarise(runs), _pairs(runs), ablation=True)
    links = _Links()
    links.feed(page)
    assert [link for link in links.outside if not link.startswith("data:")] == []
    assert "default-src 'none'" in page
    assert "<b>bold" not in page  # in no table, and not in the curves' data either
    data = json.loads(page.partition('id="curves">')[2].partition("</script>")[0])
    assert [run["name"] for run in data["runs"]] == ["<b>bold<b>", "b"]
    [loss] = [plot for plot in data["plots"] if plot["key"] == "loss"]
    assert loss["curves"][0]["x"] == [line["samples"] for line in runs[0].lines]
    assert not data["thinned"]
    assert page.index("model.prompts") < page.index("Figures at")
    assert page == html_report(runs, judge(runs), summarise(runs), _pairs(runs), ablation=True)


def test_the_command_prints_differences_first_and_json_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", ["model.moe.experts=4"], manifest="b")]
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


def test_differences_are_shown_in_the_terminal_the_report_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    runs = [make_run(tmp_path, "a", right=sites(0.5)), make_run(tmp_path, "b", ["model.prompts=0"], right=sites(0.6))]
    out = tmp_path / "report.html"
    assert command.main(argparse.Namespace(runs=runs, out=str(out), ablation=True, uri=None, json=True)) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed.strip().splitlines()[-1])
    found = Difference(**told["differences"]["b"]["probe/knn/fused"])
    assert str(found).startswith("+0.100 [+0.0")
    assert found.is_clear
    gain, over_pixels = (Difference(**told[f"over_{row}"]["b"]["probe/knn/fused"]) for row in ("untrained", "pixels"))
    assert (gain.value, over_pixels.value) == (pytest.approx(0.6), pytest.approx(0.3))
    for text in (printed, out.read_text()):
        for wanted in (
            "knn/fused to a", "knn/fused over untrained", "knn/fused over pixel statistics", str(found), str(gain), str(over_pixels),
            "    pixel statistics",
        ):  # fmt: skip
            assert wanted in text
    assert any("1 in 20 does by chance" in note for note in told["notes"])


def test_comparing_needs_no_torch() -> None:
    code = "import sys, pipeline.compare.report, pipeline.compare.paired; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def test_unknown_runs_say_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="no run directory"):
        load_runs([str(tmp_path / "nothing")])
    rundir = RunDir(str(tmp_path / "empty"))
    rundir.write_resolved(PretrainConfig())
    with pytest.raises(UsageError, match="no metrics yet"):
        load_runs([rundir.url])
