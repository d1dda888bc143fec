"""`python -m pipeline ablate` from outside: two settings times three seeds, killed twice and continued, as one process after another on
this machine and as a job array on a real SLURM; either way one report with group means, noise floor and verdict.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.rundir import RunDir
from tests.data_folder import REPOSITORY
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]
STEPS, SEEDS = 6, (0, 1, 2)
SMALL = [
    "data.views_global.hr_px=64", "data.views_global.series_px=4", "data.views_local.hr_px=32", "data.views_local.series_px=4",
    "data.views_global.s2_dates=2", "data.views_global.s1_dates=2", f"train.steps={STEPS}", "train.batch=4", "train.log_every=1",
    f"probe.every={STEPS}", "probe.tasks=[knn]", "parallel.ep=1", "parallel.zero_stage=0", "checkpoint.every=2", "--seeds", "3",
]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def run(*words: str, **more: str) -> list[str]:
    """Lines that a command prints on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**more),
    )
    assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    run("data_prep", "simulate", str(folder / "scenes"), "--sites", "24")
    catalog = f"source.catalog=[{folder}/scenes/catalog.parquet]"
    run("data_prep", "build", "data_prep/runs/demo.yaml", catalog, f"output.url={folder}/shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=2, cpus=4, gpus=0) as cluster:
        yield cluster


def check_runs(root: Path, other: str) -> None:
    """Every run has every step once, whoever made it, and its last checkpoint."""
    for setting in ("base", other):
        for seed in SEEDS:
            found = RunDir(str(root / setting / f"seed-{seed}"))
            assert [line["step"] for line in found.read_metrics()] == list(range(1, STEPS + 1)), found.url
            assert f"step-{STEPS:08d}" in (Path(found.checkpoints_url) / "LATEST").read_text()


def check_report(root: Path, other: str, change: str) -> dict[str, Any]:
    """One report: group means, a finding with interval, noise floor and verdict, on the page as in the figures."""
    figures = json.loads((root / "ablation.json").read_text())
    assert [group["seeds"] for group in figures["groups"].values()] == [list(SEEDS), list(SEEDS)]
    assert figures["groups"][other]["reference"] == "base"
    assert set(figures["differs"]) == {change}
    probe = figures["groups"][other]["probes"]["probe/knn/fused"]
    assert probe["sd"] is not None
    finding = figures["findings"][other]["probe/knn/fused"]
    assert finding["seeds"] == 3
    assert finding["floor"] is not None
    assert finding["low"] <= finding["value"] <= finding["high"]
    assert finding["verdict"] in ("better", "worse", "not decided")
    page = (root / "ablation.html").read_text()
    assert "Means ± standard deviation between seeds" in page
    assert finding["verdict"] in page
    return figures


def test_killed_twice_and_continued_ends_in_one_report(shards: Path, tmp_path: Path) -> None:
    """Killed once in the first run and once in another, past a checkpoint each time; the ranks die too. Finished runs are not made
    again."""
    root = tmp_path / "runs"
    words = ["pipeline", "ablate", "tests/runs/small.yaml", f"data.url={shards}", f"run.dir={root}", "model.prompts=4,0",
             *SMALL, "--processes", "1", "--json"]  # fmt: skip
    for victim in ("base/seed-0", "prompts_0/seed-1"):
        latest, said = root / victim / "checkpoints" / "LATEST", tmp_path / "said.txt"
        with open(said, "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words], cwd=REPOSITORY, stdout=log, stderr=log, env=environment()
            )
        while not latest.exists() and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert latest.exists(), said.read_text()[-3000:]
    finished = root / "base" / "seed-0" / "metrics.jsonl"
    before = finished.stat()

    told = json.loads(run(*words)[-1])
    assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    names = [f"{setting}/seed-{seed}" for setting in ("base", "prompts_0") for seed in SEEDS]
    assert told["runs"] == [f"{root}/{name}" for name in names]
    check_runs(root, "prompts_0")
    figures = check_report(root, "prompts_0", "model.prompts")
    assert told["findings"] == figures["findings"]
    last = [RunDir(url).read_metrics()[-1] for url in told["runs"]]
    assert len({line["loss"] for line in last}) == 6  # key and seed did reach the model


def test_a_job_array_is_interrupted_and_ends_in_the_same_report(
    slurm: SlurmCluster, shards: Path, tmp_path: Path
) -> None:
    """The same command with --slurm: of six tasks one loses its rank to SIGKILL, another is requeued by an operator; the job after
    the array compares."""
    root, conf = tmp_path / "runs", {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    sent = json.loads(run("pipeline", "ablate", "tests/runs/small.yaml", f"data.url={shards}", f"run.dir={root}",
                          "model.moe.experts=4,0", *SMALL, "--slurm", "--parallel", "2", "--json", **conf)[-1])  # fmt: skip
    array, report = sent["jobs"]
    job_dir = Path(sent["job_dir"])

    def has_checkpoint(name: str) -> bool:
        return (root / name / "checkpoints" / "LATEST").exists()

    slurm.wait(lambda: has_checkpoint("base/seed-0"), "a checkpoint of task 0", timeout=300)
    writer = RunDir(str(root / "base/seed-0")).read_writer()
    assert writer is not None
    os.kill(writer["pid"], signal.SIGKILL)
    slurm.wait(lambda: has_checkpoint("experts_0/seed-0"), "a checkpoint of task 1", timeout=300)
    slurm.run("scontrol", "requeue", f"{array}_1", check=False)  # it may just have finished: then nothing is to requeue

    slurm.wait_state(report, "COMPLETED", timeout=1500)
    attempts = json.loads((job_dir / "00000" / "attempts.json").read_text())
    assert [one["action"] for one in attempts] == ["requeue", "done"]
    check_runs(root, "experts_0")
    check_report(root, "experts_0", "model.moe.experts")
    dense = RunDir(str(root / "experts_0/seed-2")).read_metrics()[-1]
    assert not any(key.startswith("moe/") for key in dense)
    shown = run("cluster", "status", str(root), **conf)
    assert any(line.startswith("  6 of 6 runs at their last step") for line in shown), shown
    one = json.loads(run("cluster", "status", f"{root}/base/seed-0", "--json", **conf)[-1])
    assert one["last_decision"].startswith("done")
