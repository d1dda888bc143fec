"""`python -m pipeline train` from outside: killed, preempted, stalled, poisoned; what stands in the run directory afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.exit_codes import REQUEUE
from pipeline.checkpoint import committed, open_checkpoint
from tests.data_folder import REPOSITORY
from tests.patience import patience

pytestmark = pytest.mark.integration
STEPS = 12
SMALL = [
    "data.views_global.hr_px=64", "data.views_global.series_px=4", "data.views_local.hr_px=32", "data.views_local.series_px=4",
    "data.views_global.s2_dates=2", "data.views_global.s1_dates=2", "train.batch=4", "tracking.uri=none", "probe.every=0",
    "train.log_every=1", "checkpoint.every=2", f"train.steps={STEPS}",
]  # fmt: skip


def command(box: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", box, *arguments]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    scenes, url = folder / "scenes", str(folder / "shards")
    config = REPOSITORY / "data_prep" / "runs" / "demo.yaml"
    for step in (
        command("data_prep", "simulate", str(scenes), "--sites", "14"),
        command("data_prep", "build", str(config), f"source.catalog=[{scenes}/catalog.parquet]", f"output.url={url}"),
    ):
        subprocess.run(step, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    return url


class Job:
    """A training job in the background; its output is kept in `log`."""

    def __init__(self, shards: str, run: Path, *overrides: str, config: str = "small") -> None:
        self.run, self.log = run, run.parent / f"{run.name}.log"
        arguments = [f"data.url={shards}", f"run.dir={run}", *SMALL, *overrides, "--processes", "2"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command("pipeline", "train", f"tests/runs/{config}.yaml", *arguments),
                cwd=REPOSITORY, stdout=log, stderr=log, env=env,
            )  # fmt: skip

    def wait(self) -> int:
        return self.process.wait(240 * patience())

    def text(self) -> str:
        return self.log.read_text()

    def reach(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240 * patience()
        while not what():
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.02)

    def reach_step(self, step: int) -> None:
        self.reach(lambda: any(line["step"] >= step for line in metrics(self.run)))

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def learned(run: Path) -> list[dict[str, Any]]:
    """Metrics lines without what depends on the clock and the machine."""
    clocked = ("samples_per_s", "data_wait", "gpu_hours", "eta_s", "mfu", "time", "system/", "data/")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in metrics(run)]


def test_killed_and_preempted_equals_uninterrupted(shards: str, tmp_path: Path) -> None:
    whole = Job(shards, tmp_path / "whole", config="all_terms")
    assert whole.wait() == 0, whole.text()

    run = tmp_path / "run"
    first = Job(shards, run, config="all_terms")
    first.reach_step(3)
    ranks = first.ranks()
    first.process.kill()
    first.wait()
    assert not psutil.wait_procs(ranks, timeout=10)[1]  # the ranks die with their launcher
    assert committed(str(run / "checkpoints"))

    second = Job(shards, run, config="all_terms")
    second.reach_step(6)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == REQUEUE, second.text()
    stopped = metrics(run)[-1]["step"]
    assert open_checkpoint(committed(str(run / "checkpoints"))[0]).step == stopped < STEPS

    third = Job(shards, run, config="all_terms")
    assert third.wait() == 0, third.text()
    assert f"step-{stopped:08d}" in third.text()
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert learned(run) == learned(tmp_path / "whole")  # losses, gradients, loads: bit by bit

    files = {p.name for p in (run / "checkpoints").iterdir()}
    assert files == {"LATEST", "step-00000010", "step-00000012"}
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000012\n"
    assert {"resolved.json", "metrics.jsonl", "logs", "checkpoints"} <= {p.name for p in run.iterdir()}


def test_a_non_finite_loss_stops_all_ranks_by_name(shards: str, tmp_path: Path) -> None:
    job = Job(shards, tmp_path / "run", "optimizer.lr=1e30", "optimizer.warmup=0")
    assert job.wait() == 1
    [line] = [line for line in job.text().splitlines() if "error:" in line]
    assert "step 2: loss" in line
    assert "samples rank 0: sim" in line
    assert "rank 1: sim" in line
    assert "expert loads {" in line
    failure = json.loads((tmp_path / "run" / "logs" / "failure-00000.json").read_text())
    assert failure["step"] == 2


def test_a_stalled_rank_is_named(shards: str, tmp_path: Path) -> None:
    job = Job(shards, tmp_path / "run", "train.stall_timeout_s=15", "train.steps=10000", "checkpoint.every=0")
    job.reach_step(2)
    stopped = job.ranks()[1]
    stopped.suspend()
    assert job.wait() == 1
    assert "rank 1 is silent" in job.text()
    assert not psutil.wait_procs([stopped], timeout=10)[1]


def test_a_dying_rank_ends_the_job(shards: str, tmp_path: Path) -> None:
    job = Job(shards, tmp_path / "run", "train.steps=10000", "checkpoint.every=0")
    job.reach_step(1)
    job.ranks()[1].kill()
    assert job.wait() != 0
    assert "rank 1 of 2 was killed by SIGKILL" in job.text()


def test_resume_never_and_changed_data_are_refused(shards: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert Job(shards, run, "train.steps=2").wait() == 0
    again = Job(shards, run, "train.steps=2", "--resume", "never")
    assert again.wait() == 2
    assert "holds checkpoints up to step-00000002" in again.text()
    manifest = next((run / "checkpoints").glob("step-*/manifest.json"))
    tree = json.loads(manifest.read_text())
    tree["data"]["manifest_sha256"] = "0" * 64
    del tree["digest"]  # as of a version that wrote none; with it, the manifest is damaged
    manifest.write_text(json.dumps(tree))
    other = Job(shards, run, "train.steps=4")
    assert other.wait() == 2
    assert "was trained on a shard set with manifest 000000000000" in other.text()
