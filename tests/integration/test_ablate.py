"""`python -m pipeline ablate` from outside: base and variants are trained, and one comparison says what each key did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.rundir import RunDir
from tests.data_folder import REPOSITORY

pytestmark = pytest.mark.integration
SMALL = [
    "data.views_global.hr_px=64", "data.views_global.series_px=4", "data.views_local.hr_px=32", "data.views_local.series_px=4",
    "data.views_global.s2_dates=2", "data.views_global.s1_dates=2", "train.batch=4", "train.steps=4", "train.log_every=1",
    "tracking.uri=none", "probe.every=4", "parallel.ep=1", "parallel.zero_stage=0", "checkpoint.every=0",
]  # fmt: skip


def run(*words: str) -> list[str]:
    """Lines that a command prints on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def shards_of(tmp_path: Path, sites: int = 24) -> Path:
    scenes, shards = tmp_path / "scenes", tmp_path / "shards"
    run("data_prep", "simulate", str(scenes), "--sites", str(sites))
    catalog = f"source.catalog=[{scenes}/catalog.parquet]"
    run("data_prep", "build", "data_prep/runs/demo.yaml", catalog, f"output.url={shards}")
    return shards


def test_base_and_variants_end_in_one_comparison(tmp_path: Path) -> None:
    shards, root = shards_of(tmp_path), tmp_path / "runs"
    words = ["pipeline", "ablate", "tests/runs/small.yaml", f"data.url={shards}", f"run.dir={root}", *SMALL, "--set",
             "model.prompts=0", "--set", "model.moe.experts=0", "--processes", "1"]  # fmt: skip

    first = run(*words, "--tasks", "2", "--task", "1")  # as one task of a job array: the second run only
    assert first[-1].startswith("1 of 3 runs are finished")
    assert RunDir(f"{root}/prompts_0/seed-0").last_step() == 4
    assert not (root / "base").exists()
    before = (root / "prompts_0" / "seed-0" / "metrics.jsonl").read_bytes()

    lines = run(*words, "--json")
    assert (root / "prompts_0" / "seed-0" / "metrics.jsonl").read_bytes() == before  # a finished run is not made again
    figures = json.loads(lines[-1])
    assert figures["runs"] == [f"{root}/{name}/seed-0" for name in ("base", "prompts_0", "experts_0")]
    assert any(line.startswith("comparable: same data") for line in lines)
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Ablation of")) : -1]  # the last is JSON
    rows = {
        name: line for line in table for name in ("base", "prompts_0", "experts_0") if f"runs-{name}-seed-0" in line
    }
    assert "base " in rows["base"]
    assert "model.prompts: 4 → 0" in rows["prompts_0"]
    assert "model.moe.experts: 4 → 0" in rows["experts_0"]
    assert "NOT ONE KEY" not in "".join(table)
    assert "knn/fused" in "".join(table)
    assert (root / "ablation.html").read_text().count("<svg") >= 2
    metrics = [set(RunDir(url).read_metrics()[-1]) for url in figures["runs"]]
    assert any(key.startswith("moe/") for key in metrics[0])
    assert not any(key.startswith("moe/") for key in metrics[2])
    losses = [RunDir(url).read_metrics()[-1]["loss"] for url in figures["runs"]]
    assert len(set(losses)) == 3  # the keys did reach the model


def test_seeds_killed_and_continued_end_in_one_report(tmp_path: Path) -> None:
    """Two settings with two seeds each; killed once a run has a checkpoint, the ranks die too, and the same command continues it."""
    shards, root = shards_of(tmp_path), tmp_path / "runs"
    small = [word for word in SMALL if not word.startswith(("checkpoint.", "train.steps", "parallel.ep"))]
    words = ["pipeline", "ablate", "tests/runs/small.yaml", f"data.url={shards}", f"run.dir={root}", *small, "train.steps=8",
             "checkpoint.every=2", "parallel.ep=1", "model.prompts=4,0", "--seeds", "2", "--processes", "1", "--json"]  # fmt: skip
    first = root / "base" / "seed-0"
    started = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    latest = first / "checkpoints" / "LATEST"
    deadline = time.monotonic() + 300
    while not latest.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    started.kill()
    started.wait()
    assert latest.exists()

    figures = json.loads(run(*words)[-1])
    names = ["base/seed-0", "base/seed-1", "prompts_0/seed-0", "prompts_0/seed-1"]
    assert figures["runs"] == [f"{root}/{name}" for name in names]
    steps = [line["step"] for line in RunDir(str(first)).read_metrics()]
    assert steps == list(range(1, 9))  # each step once, whoever made it
    assert figures["groups"]["base"]["seeds"] == [0, 1]
    finding = figures["findings"]["prompts_0"]["probe/knn/fused"]
    assert finding["seeds"] == 2
    assert finding["floor"] is not None
    assert finding["verdict"] in ("better", "worse", "not decided")
    kept = json.loads((root / "ablation.json").read_text())
    assert kept["findings"] == figures["findings"]
    assert "Means ± standard deviation between seeds" in (root / "ablation.html").read_text()
