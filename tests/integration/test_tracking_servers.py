"""Tracking against real MLflow servers (PostgreSQL and SQLite stores, artifacts on an S3 server) that die and come back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.rundir import RunDir
from pipeline.compare.load import load_run
from pipeline.config import PretrainConfig, RunConfig, TrackingConfig
from pipeline.tracking import Dataset, RunFacts, Tracker, open_tracker
from pipeline.tracking.mirror import Mirror, read_record
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.store import Point, StoreUnavailable
from tests.mlflow_server import MlflowServer, postgresql
from tests.require import require
from tests.s3_server import S3Server

pytestmark = pytest.mark.integration
FACTS = RunFacts(2, "world=2 zero=2 ep=2", (Dataset("s3://shards/demo", "a" * 64, "b" * 64, "train", 10),))


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server
) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    artifacts = f"s3://mlflow/{request.param}"
    environment = {**s3_server.environment, "MLFLOW_S3_ENDPOINT_URL": s3_server.endpoint}
    if request.param == "sqlite":
        running = MlflowServer(f"sqlite:///{folder}/mlflow.db", artifacts, folder, environment)
        running.start()
        yield running
        running.kill()
        return
    with postgresql() as backend:
        running = MlflowServer(backend, artifacts, folder, environment)
        running.start()
        yield running
        running.kill()


def _line(step: int, slope: float = 1.0) -> dict[str, float | int]:
    moe = {f"moe/load/{m}/{e}": 0.25 for m in ("hr", "s2", "s1") for e in range(4)}
    return {
        "step": step,
        "samples": step * 8,
        "time": time.time(),
        "loss": slope / step,
        "loss/mgcl_hr": 2.0 / step,
        **moe,
    }


def _start(folder: Path, uri: str, name: str, at: int = 0) -> tuple[RunDir, Tracker]:
    cfg = PretrainConfig(
        run=RunConfig(dir=str(folder / name)), tracking=TrackingConfig(uri=uri, experiment="integration")
    )
    rundir = RunDir(cfg.run.dir)
    rundir.write_resolved(cfg)
    rundir.start_metrics(at)
    return rundir, open_tracker(cfg, rundir, FACTS)


def _log(rundir: RunDir, tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, step * 8, rundir.append_metrics(_line(step)))


def _steps(rundir: RunDir) -> list[int]:
    return [line["step"] for line in rundir.read_metrics()]


def _until(condition, what: str, seconds: float = 90) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def test_server_killed_and_restarted_mid_run(server: MlflowServer, tmp_path: Path) -> None:
    rundir, tracker = _start(tmp_path, server.uri, "outage")
    _log(rundir, tracker, range(1, 20))
    _until(lambda: tracker.run_id, "the first answer")
    server.kill()
    _log(rundir, tracker, range(20, 60))
    _until(lambda: tracker.failures > 0, "the outage to be noticed")
    _log(rundir, tracker, range(60, 80))
    assert _steps(rundir) == list(range(1, 80))  # the steps went on, and the store knows nothing of them
    assert tracker.newest_step < 20
    server.start()
    _log(rundir, tracker, range(80, 100))
    (tmp_path / "sheet.png").write_bytes(b"picture")
    tracker.artifact(str(tmp_path / "sheet.png"))
    tracker.checkpoint("s3://shards/run/checkpoints/step-00000080", 80, {"probe/knn/fused": 0.5})
    _until(lambda: tracker.is_level, "the store to be level again")
    tracker.close()
    assert Mirror(rundir, MlflowStore(server.uri)).differences() == []
    store = MlflowStore(server.uri)
    run = store.client.get_run(rundir.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.moe.experts"] == "8"
    assert run.data.tags["geoloom.layout"] == FACTS.layout
    assert [entry.dataset.source for entry in run.inputs.dataset_inputs] == ["s3://shards/demo"]
    assert {"sheet.png", "resolved.json", "loss.png"} <= {
        file.path for file in store.client.list_artifacts(rundir.run_id)
    }
    (model,) = store.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{rundir.run_id}'")
    assert model.tags["geoloom.checkpoint_url"] == "s3://shards/run/checkpoints/step-00000080"


def test_steps_go_on_while_the_server_hangs(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    rundir, tracker = _start(tmp_path, server.uri, "hanging")
    _log(rundir, tracker, range(1, 20))
    _until(lambda: tracker.newest_step == 19, "nineteen steps")
    server.signal(signal.SIGSTOP)
    try:
        _log(rundir, tracker, range(20, 60))
        _until(lambda: tracker.failures > 0, "the first call to be given up")
        _log(rundir, tracker, range(60, 80))
        assert _steps(rundir) == list(range(1, 80))
        assert tracker.newest_step == 19
    finally:
        server.signal(signal.SIGCONT)
    _until(lambda: tracker.newest_step == 79, "the store to catch up")
    tracker.close()
    assert Mirror(rundir, MlflowStore(server.uri)).differences() == []


def test_running_finds_the_runs_of_a_directory(server: MlflowServer, tmp_path: Path) -> None:
    """Through the server and straight from its database; a start then ends what nobody writes."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    folder = tmp_path / 'it\'s 100 % "quoted"'
    rundir, tracker = _start(folder, server.uri, "mine")
    _until(lambda: tracker.is_level, "the run to be opened")
    store, tags = MlflowStore(server.uri), read_record(rundir)["tags"]
    stale = store.open_run(None, "integration", "stale", tags | {"geoloom.pid": str(done.pid)})
    elsewhere = store.open_run(None, "integration", "elsewhere", tags | {"geoloom.run_dir": "/elsewhere"})
    ended = store.open_run(None, "integration", "ended", tags)
    store.end_run(ended, "FINISHED")
    for uri in (server.uri, server.backend):
        found = dict(MlflowStore(uri).running("integration", rundir.url))
        assert found.keys() == {stale, rundir.run_id}
        assert found[stale]["geoloom.pid"] == str(done.pid)
    assert Mirror(rundir, store).close_stale() == [stale]
    assert [run_id for run_id, _ in store.running("integration", rundir.url)] == [rundir.run_id]
    assert store.running("integration", "/elsewhere")[0][0] == elsewhere
    tracker.close()
    assert store.running("integration", rundir.url) == []


def test_points_arrive_bit_for_bit_and_a_refusal_is_an_error(server: MlflowServer) -> None:
    store = MlflowStore(server.uri)
    run_id = store.open_run(None, "integration", "points", {})
    values = [0.1, 1 / 3, -1e-300, 1.7976931348623157e308, 123456789.123456789, -0.0, 7.0]
    points = [Point("odd/value", value, step, 1_700_000_000_123 + step) for step, value in enumerate(values)]
    store.log_points(run_id, points)
    store.log_points(run_id, points)  # an answer was lost: the same again changes nothing
    assert store.history(run_id, "odd/value") == list(enumerate(values))
    times = [metric.timestamp for metric in store.client.get_metric_history(run_id, "odd/value")]
    assert sorted(times) == [point.time_ms for point in points]
    with pytest.raises(StoreUnavailable, match="not found"):
        store.log_points("0" * 32, points)


def test_resume_continues_the_same_run_each_step_once(server: MlflowServer, tmp_path: Path) -> None:
    rundir, tracker = _start(tmp_path, server.uri, "resumed")
    _log(rundir, tracker, range(1, 31))
    _until(lambda: tracker.is_level, "thirty steps")
    first = tracker.run_id  # killed here: no close; the last checkpoint stands at step 20
    again, second = _start(tmp_path, server.uri, "resumed", at=20)
    _log(again, second, range(21, 51))
    second.close("FINISHED")
    assert second.run_id == first
    assert Mirror(again, MlflowStore(server.uri)).differences() == []
    found = load_run(first, server.uri)  # type: ignore[arg-type]
    assert [line["step"] for line in found.lines] == list(range(1, 51))


def test_mlflows_own_pages_show_both_runs(server: MlflowServer, tmp_path: Path) -> None:
    """The comparison page names both, the metric page draws one curve each under the name the run directory uses."""
    require(Path("/usr/bin/chromium").exists(), "Chromium")
    from playwright.sync_api import sync_playwright

    runs = []
    for name in ("moe", "dense"):
        rundir, tracker = _start(tmp_path, server.uri, name)
        _log(rundir, tracker, range(1, 30))
        tracker.close()
        runs.append(tracker.run_id)
    experiment = MlflowStore(server.uri).client.get_experiment_by_name("integration").experiment_id
    chosen = "[" + ",".join(f'"{run}"' for run in runs) + "]"
    curves = (
        f'{server.uri}/#/metric?runs={chosen}&metric="loss/mgcl_hr"&experiments=["{experiment}"]&plot_metric_keys=["loss/mgcl_hr"]'
        '&plot_layout={"autosize":true,"xaxis":{},"yaxis":{}}&x_axis=step&y_axis_scale=linear&line_smoothness=1&show_point=false'
        "&deselected_curves=[]&last_linear_y_axis_range=[]"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 1600})
        page.goto(f'{server.uri}/#/compare-runs?runs={chosen}&experiments=["{experiment}"]')
        page.get_by_text("loss/mgcl_hr").first.wait_for(timeout=60_000)
        text = page.inner_text("body")
        page.screenshot(path=str(tmp_path / "compare.png"))
        page.goto(curves)
        page.reload()
        page.wait_for_selector(".scatterlayer .trace", timeout=60_000)
        drawn, named = page.locator(".scatterlayer .trace").count(), page.inner_text("body")
        page.screenshot(path=str(tmp_path / "curves.png"))
        browser.close()
    assert "moe" in text
    assert "dense" in text
    assert drawn >= len(runs)
    assert "moe" in named
    assert "dense" in named
