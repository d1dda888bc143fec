"""The whole way on a real SLURM of two nodes: an array build, training, and every way to be interrupted.

One uninterrupted run on this machine is the reference. Jobs of the same layout must end in the same weights, bit by bit,
whatever happened to them on the way.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from cluster.rundir import RunDir
from cluster.slurm.requeue import UNDECIDED
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 40
CONFIG = f"""
run: {{dir: unset}}
data:
  url: shards
  views_global: {{hr_px: 64, series_px: 8, s2_dates: 2, s1_dates: 1}}
  views_local: {{hr_px: 32, series_px: 4, s2_dates: 1, s1_dates: 1}}
  threads: 1
model: {{size: debug, moe: {{experts: 4, blocks: 1}}}}
objective: {{prototypes: 64, head_hidden: 32, head_bottleneck: 16, queries: 2, pixel_pairs: 16, object_clusters: 2}}
train: {{steps: {STEPS}, batch: 4, precision: fp32, log_every: 1}}
optimizer: {{lr: 1.0e-3, warmup: 16}}
parallel: {{zero_stage: 2, ep: 2}}
checkpoint: {{every: 5}}
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=2, cpus=8, gpus=0) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with scenes and a config; its name has a space, as people's folders do."""
    path = tmp_path_factory.mktemp("a run")
    (path / "train.yaml").write_text(CONFIG)
    command(path, "data_prep", "simulate", "scenes", "--sites", "12", "--seed", "1")
    return path


def command(folder: Path, box: str, *arguments: str, **environment: str) -> str:
    """stdout of `python -m BOX …` in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", box, *arguments], cwd=folder, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


BUILD = [
    str(REPOSITORY / "data_prep" / "runs" / "demo.yaml"),
    "source.catalog=[scenes/catalog.parquet]",
    "shards.max_samples=2",
]


@pytest.fixture(scope="module")
def shards(slurm: SlurmCluster, folder: Path) -> Path:
    """Built by four array tasks and a merge job."""
    conf = slurm.environment["SLURM_CONF"]
    sent = json.loads(command(folder, "cluster", "submit", "build", *BUILD, "output.url=shards", "--tasks", "4", "--json",
                              SLURM_CONF=conf).splitlines()[-1])  # fmt: skip
    merge = sent["jobs"][-1]
    slurm.wait_state(merge, "COMPLETED", timeout=180)
    return folder / "shards"


@pytest.fixture(scope="module")
def reference(shards: Path, folder: Path) -> RunDir:
    command(folder, "pipeline", "train", "train.yaml", "run.dir=reference", "--processes", "2")
    return RunDir(str(folder / "reference"))


class Run:
    """A training job on two nodes, one task each."""

    def __init__(self, slurm: SlurmCluster, folder: Path, name: str, *arguments: str) -> None:
        sent = json.loads(command(
            folder, "cluster", "submit", "train", "train.yaml", f"run.dir={name}", "--nodes", "2", "--tasks-per-node", "1",
            *arguments, "--json", SLURM_CONF=slurm.environment["SLURM_CONF"],
        ).splitlines()[-1])  # fmt: skip
        self.slurm, self.run, self.job = slurm, RunDir(str(folder / name)), sent["jobs"][0]
        self.job_dir = Path(sent["job_dir"])

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(Path(self.run.logs_url).glob("*.log")))

    def at_step(self, step: int) -> None:
        self.slurm.wait(lambda: (self.run.last_step() or 0) >= step, f"step {step}\n{self.log()}", timeout=180)

    def trainers(self, node: str) -> list[int]:
        tasks = self.slurm.task_processes(node, self.job)
        return [p for p in tasks if re.search(rb"\0pipeline\0train\0", _command_line(p))]

    def decided(self) -> list[dict[str, Any]]:
        """Starts that have ended and of which it is decided what becomes of them."""
        path = self.job_dir / "attempts.json"
        attempts = json.loads(path.read_text()) if path.exists() else []
        return [attempt for attempt in attempts if attempt["action"] != UNDECIDED]

    def ends(self) -> dict[str, str]:
        try:
            return self.slurm.wait_state(self.job, "COMPLETED", timeout=300)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-6000:]}") from None

    def assert_equals(self, reference: RunDir) -> None:
        """Each step once in the file, the same losses, the same final weights, moments and teacher."""
        text = Path(self.run.metrics_url).read_text()
        assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, STEPS + 1))
        losses = [[line["loss"] for line in run.read_metrics()] for run in (self.run, reference)]
        assert losses[0] == losses[1]
        last = f"checkpoints/step-{STEPS:08d}"
        files = [sorted(Path(run.url, last).glob("*.safetensors")) for run in (self.run, reference)]
        assert files[1]
        for own, file in zip(*files, strict=True):  # one per rank; their names say which start wrote them
            mine, theirs = load_file(own), load_file(file)
            assert mine.keys() == theirs.keys()
            assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_array_build_equals_a_local_one(shards: Path, folder: Path) -> None:
    command(folder, "data_prep", "build", *BUILD, "output.url=local_shards")
    names = sorted(path.name for path in shards.iterdir() if path.suffix in (".tar", ".parquet"))
    assert sum(name.endswith(".tar") for name in names) >= 4
    for name in names:
        assert (shards / name).read_bytes() == (folder / "local_shards" / name).read_bytes(), name
    ours, theirs = (json.loads((where / "manifest.json").read_text()) for where in (shards, folder / "local_shards"))
    assert ours["content_sha256"] == theirs["content_sha256"]


def test_a_job_on_two_nodes_equals_a_local_run(slurm: SlurmCluster, folder: Path, reference: RunDir) -> None:
    run = Run(slurm, folder, "job")
    run.ends()
    run.assert_equals(reference)
    status = command(folder, "cluster", "status", "job", SLURM_CONF=slurm.environment["SLURM_CONF"])
    assert f"step        {STEPS} of {STEPS}" in status
    assert f"checkpoint  step-{STEPS:08d}" in status


def test_time_limit_and_requeue_leave_one_continuous_run(slurm: SlurmCluster, folder: Path, reference: RunDir) -> None:
    """The time limit strikes mid-epoch: the ranks are held still at some step until SLURM's signal has come. Then an operator
    requeues the job as well. MLflow holds one run, each step once."""
    import mlflow

    uri = f"sqlite:///{folder}/mlflow.db"
    run = Run(slurm, folder, "limited", f"tracking.uri={uri}", "--time", "2", "--signal-s", "80")
    run.at_step(3)
    held = [process for node in slurm.names for process in run.trainers(node)]
    for process in held:
        os.kill(process, signal.SIGSTOP)
    ended = len(run.decided())

    def asked() -> bool:  # in this start: earlier ones may have been asked while they started up
        return run.log().count("USR1: asking the ranks") >= run.log().count(f"job {run.job}, start ")

    slurm.wait(asked, "the signal ahead of the time limit", timeout=150)
    for process in held:
        os.kill(process, signal.SIGCONT)
    slurm.wait(lambda: len(run.decided()) > ended, "the start has ended and its end is decided", timeout=60)
    first = run.decided()[ended]
    assert (first["action"], first["checkpointed"], first["asked_to_stop"]) == ("requeue", True, True)
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=UNLIMITED")  # once is enough for this test
    run.at_step(first["step"] + 4)
    slurm.run(
        "scontrol", "requeue", run.job, check=False
    )  # it may just have finished: then there is nothing to requeue
    run.ends()
    run.assert_equals(reference)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("geoloom")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [r.info.run_id for r in runs] == [run.run.run_id]
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "loss")] == list(range(1, STEPS + 1))


def test_a_killed_rank_and_a_crashed_node_are_survived(slurm: SlurmCluster, folder: Path, reference: RunDir) -> None:
    run = Run(slurm, folder, "crashed")
    run.at_step(7)
    os.kill(run.trainers("node2")[0], signal.SIGKILL)
    slurm.wait(run.decided, "the whole job has ended", timeout=60)
    ended = run.decided()[0]
    assert (ended["action"], ended["checkpointed"]) == ("requeue", False)
    run.at_step(min(ended["step"] + 6, STEPS - 5))
    slurm.crash_node("node2")
    slurm.wait(lambda: slurm.job(run.job).get("JobState") != "RUNNING", "the crash noticed", timeout=60)
    slurm.start_node("node2")
    assert int(run.ends()["Restarts"]) >= 2
    run.assert_equals(reference)
