"""A scan: a run made with secrets in its tracking URI and environment leaves none of them anywhere, down to exports and SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.data_folder import REPOSITORY
from tests.integration.test_train import SMALL, shards
from tests.mlflow_server import MlflowServer
from tests.patience import patience

__all__ = ["shards"]
pytestmark = pytest.mark.integration

CANARIES = {
    "uri": "Canary/uri:x?1", "configured": "Canary@configured", "aws": "CanaryAwsSecretKey", "token": "CanaryMlflowToken",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    server = MlflowServer(f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts"), folder)
    server.start()
    yield server
    server.kill()


def call(folder: Path, name: str, *arguments: str, code: int = 0, **environment: str) -> None:
    """A command whose output is kept as one more artefact to search."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300 * patience(),
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AWS_SECRET_ACCESS_KEY": CANARIES["aws"], **environment},
    )  # fmt: skip
    (folder / f"{name}.output").write_text(done.stdout + done.stderr)
    assert done.returncode == code, done.stderr[-3000:]


def found_in(folder: Path) -> list[str]:
    """Where a canary stands, also as a URL has it, or its tail from the middle on: a mask may leave the end of one that it cut
    wrongly."""
    forms = {form for value in CANARIES.values() for form in (value, quote(value, safe=""))}
    needles = sorted({needle.encode() for value in forms for needle in (value, value[len(value) // 2 :])})
    return [
        f"{path.relative_to(folder)}: {needle.decode()}"
        for path in sorted(folder.rglob("*")) if path.is_file()
        for data in [path.read_bytes()] for needle in needles if needle in data
    ]  # fmt: skip


def test_no_secret_is_left_anywhere(shards: str, tmp_path: Path, server: MlflowServer) -> None:
    run, host = tmp_path / "run", server.uri.removeprefix("http://")
    train = ["pipeline", "train", "tests/runs/small.yaml", f"data.url={shards}", f"run.dir={run}",
             *[word for word in SMALL if not word.startswith("tracking.")], "train.steps=2", "parallel.ep=1"]  # fmt: skip
    secret = f"http://user:{quote(CANARIES['uri'], safe='')}@{host}"
    call(tmp_path, "train", *train, "tracking.uri=env", GEOLOOM_TRACKING_URI=secret)
    assert (run / "tracking.json").exists(), (tmp_path / "train.output").read_text()[-2000:]
    # the same in a setting, for a server that is away: errors, logs and the resumed run's files
    away = f"tracking.uri=http://user:{CANARIES['configured']}@127.0.0.1:9"
    call(tmp_path, "away", *train, away, "train.steps=3")
    call(tmp_path, "export", "pipeline", "export", str(run), str(tmp_path / "backbone.safetensors"), "--json")
    call(tmp_path, "dry-run", *train, away, "--dry-run", "--json")
    call(tmp_path, "refused", "cluster", "submit", *train[1:], away, "--dry-run", code=2)
    call(
        tmp_path,
        "script",
        "cluster",
        "submit",
        *train[1:],
        "tracking.uri=env",
        "--dry-run",
        GEOLOOM_TRACKING_URI=secret,
    )
    call(
        tmp_path,
        "sync",
        "pipeline",
        "sync",
        str(run),
        "--json",
        GEOLOOM_TRACKING_URI=secret,
        MLFLOW_TRACKING_TOKEN=CANARIES["token"],
    )
    call(tmp_path, "compare", "pipeline", "compare", str(run), str(run), "--out", str(tmp_path / "report.html"))
    assert "export GEOLOOM_TRACKING_URI" in (tmp_path / "refused.output").read_text()
    assert {"resolved.json", "metrics.jsonl"} <= {path.name for path in run.iterdir()}
    assert found_in(tmp_path) == []
    assert found_in(server.folder) == []


def test_the_scan_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0" + CANARIES["configured"][8:].encode() + b"\0")
    assert len(found_in(tmp_path)) == 1
