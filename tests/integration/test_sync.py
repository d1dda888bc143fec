"""`python -m pipeline sync` on a real MLflow store (SQLite): what a killed run leaves behind is closed, what cannot be is named."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.rundir import RunDir
from pipeline.commands import sync
from pipeline.config import PretrainConfig, RunConfig
from pipeline.tracking import RunFacts
from pipeline.tracking.mirror import read_record, write_record
from pipeline.tracking.mlflow_store import MlflowStore

pytestmark = pytest.mark.integration


def _line(step: int) -> dict[str, float | int]:
    return {"step": step, "samples": step * 8, "time": 1000.0 + step, "loss": 1.0 / step}


def _dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_sync_ends_a_killed_run_and_names_redone_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rundir, uri = RunDir(str(tmp_path / "run")), f"sqlite:///{tmp_path}/mlflow.db"
    rundir.write_resolved(PretrainConfig(run=RunConfig(dir=rundir.url)))
    rundir.start_metrics(0)
    for step in range(1, 7):
        rundir.append_metrics(_line(step))
    write_record(rundir, "test", "a run", RunFacts())
    rundir.claim()
    writer = tmp_path / "run" / "writer.json"
    writer.write_text(json.dumps(json.loads(writer.read_text()) | {"pid": _dead_pid()}))
    store = MlflowStore(uri)
    tags = read_record(rundir)["tags"] | {"geoloom.pid": str(_dead_pid())}
    stale = store.open_run(None, "test", "stale", tags)
    args = argparse.Namespace(run_dir=rundir.url, uri=uri, check=False, json=True)
    assert sync.main(args) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["status"], figures["closed"], figures["redone"]) == ("KILLED", [stale], [])
    assert store.client.get_run(stale).info.status == store.client.get_run(rundir.run_id).info.status == "KILLED"
    assert store.running("test", rundir.url) == []

    rundir.start_metrics(4)
    for step in (5, 6):
        rundir.append_metrics(_line(step) | {"loss": 0.25})
    rundir.claim()  # this process writes now
    assert sync.main(args) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "steps 5-6 were redone after a resume" in lines[-2]
    run = store.client.get_run(rundir.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["geoloom.redone_steps"].startswith("5-6")
    assert store.running("test", rundir.url)[0][0] == rundir.run_id
