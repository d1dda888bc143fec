"""A start that was frozen and comes back after another has taken its run over: it writes nothing, and says why it ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.exit_codes import FENCED
from tests.integration.test_train import Job, metrics, shards
from tests.mlflow_server import MlflowServer

__all__ = ["shards"]
pytestmark = pytest.mark.integration


def family(job: Job) -> list[psutil.Process]:
    """The launcher last: it would take its stopped ranks for dead otherwise."""
    return [*job.ranks(), psutil.Process(job.process.pid)]


def content(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*")) if path.is_file()
    }  # fmt: skip


def run_in_mlflow(uri: str, run: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return client, client.get_run(json.loads((run / "tracking.json").read_text())["run_id"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"), tmp_path)
    server.start()
    yield server
    server.kill()


def test_a_thawed_predecessor_writes_nothing(shards: str, tmp_path: Path, server: MlflowServer) -> None:
    run, uri = tmp_path / "run", f"tracking.uri={server.uri}"
    first = Job(shards, run, uri, "train.steps=100000")
    first.reach_step(5)
    first.reach((run / "tracking.json").exists)
    frozen = family(first)
    for process in frozen:
        process.suspend()
    reached = metrics(run)[-1]["step"]
    steps = reached + 6
    second = Job(shards, run, uri, f"train.steps={steps}")
    assert second.wait() == 0, second.text()
    before = content(run)
    _, seen = run_in_mlflow(uri.removeprefix("tracking.uri="), run)

    for process in frozen:
        process.resume()
    assert first.wait() == FENCED, first.text()
    assert "a later start of this run on" in first.text()
    assert content(run) == before
    assert [line["step"] for line in metrics(run)] == list(range(1, steps + 1))
    client, after = run_in_mlflow(uri.removeprefix("tracking.uri="), run)
    assert after.info.status == "FINISHED"
    assert after.to_dictionary() == seen.to_dictionary()
    sent = [point.step for point in client.get_metric_history(after.info.run_id, "loss")]
    assert sorted(sent) == list(range(1, steps + 1))


def test_a_second_start_beside_a_living_one_is_refused(shards: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Job(shards, run, "train.steps=100000")
    first.reach_step(2)
    second = Job(shards, run)
    assert second.wait() == 2
    assert "is being written by process" in second.text()
    first.process.terminate()
    assert first.wait() == 85, first.text()
