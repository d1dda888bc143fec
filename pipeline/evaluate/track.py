"""Results of a run's checkpoint in the run's MLflow entry: metrics `evaluate/<row>/<mode>/<head>` and the table as an artifact."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from cluster import storage
from cluster.rundir import RunDir
from pipeline.evaluate.results import RESULTS, read_lines

log = logging.getLogger(__name__)
ARTIFACT = "evaluation.jsonl"  # under the run directory's `artifacts/`, which `pipeline sync` brings to MLflow


def track(out: str, lines: list[dict[str, Any]]) -> str | None:
    """Sends lines just written to `out` if that is the `evaluate/` of a tracked run. Returns why nothing was sent, for a note."""
    rundir = RunDir(out.rstrip("/").rpartition("/")[0])
    if storage.name(out) != "evaluate" or rundir.read_resolved() is None:
        return None
    table = "".join(json.dumps(line) + "\n" for line in read_lines(out))
    storage.write_atomic(storage.join(rundir.url, "artifacts", ARTIFACT), table.encode())
    resolved = rundir.read_resolved()
    uri = (resolved or {}).get("config", {}).get("tracking", {}).get("uri", "none")
    if uri == "none" or rundir.run_id is None:
        return None
    from pipeline.tracking.mlflow_store import MlflowStore
    from pipeline.tracking.store import StoreUnavailable

    try:
        send(MlflowStore(uri), rundir.run_id, lines, storage.join(out, RESULTS))
    except StoreUnavailable as error:
        return f"MLflow ({uri}) does not answer ({error}); the results are kept, python -m pipeline sync {rundir.url} brings the table"
    return None


def send(store: Any, run_id: str, lines: list[dict[str, Any]], table: str) -> None:
    """One metric per score, its interval and baselines, at the checkpoint's step; the table beside them."""
    from pipeline.tracking.store import Point

    now = int(time.time() * 1000)
    points = []
    for line in lines:
        base = f"evaluate/{line['task'].replace('[', '.').replace(']', '').replace(',', '.')}/{line['mode']}/{line['head']}"
        values = {
            name: line[name]
            for name in ("score", "low", "high", "untrained", "pixels", "scratch", "chance")
            if name in line
        }
        points += [
            Point(f"{base}/{name}", float(value), int(line.get("step") or 0), now) for name, value in values.items()
        ]
    store.log_points(run_id, points)
    if storage.is_local(table):
        store.log_artifact(run_id, storage.local_path(table), "evaluate")
