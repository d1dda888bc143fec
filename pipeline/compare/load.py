"""Finds a run by its directory, its MLflow run id or its name, and reads what comparison needs.

The run directory is the truth; MLflow's copy serves where the directory is out of reach.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import storage
from cluster.config import flatten
from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.tracking.facts import RunFacts
from pipeline.tracking.mirror import read_record


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: what tables call it; unique among the runs compared.
        settings: flattened resolved config, values as JSON types.
        lines: metrics lines in step order, each with `step` and `samples`.
        facts: data sets and layout.
        tags: revision and the like.
        folder: run directory, None where only MLflow's copy is in reach.
    """

    name: str
    where: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    facts: RunFacts
    tags: dict[str, str] = field(default_factory=dict)
    folder: str | None = None


def load_runs(names: Sequence[str], uri: str | None = None) -> list[RunData]:
    """Reads the runs in the order named; equal names get a number.

    Raises:
        UsageError: a run is not found, was never resolved, or has no metrics.
    """
    runs: list[RunData] = []
    for name in names:
        run = load_run(name, uri)
        taken = {other.name for other in runs}
        label, number = run.name, 2
        while label in taken:
            label, number = f"{run.name} ({number})", number + 1
        runs.append(replace(run, name=label))
    return runs


def load_run(name: str, uri: str | None = None) -> RunData:
    """One run, by run directory (any fsspec URL), MLflow run id or run name."""
    if storage.exists(storage.join(name, "resolved.json")):
        return _from_directory(name)
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UsageError(
            f"{name} is no run directory (no resolved.json); to look it up in MLflow give --uri, or set MLFLOW_TRACKING_URI"
        )
    from pipeline.tracking.mlflow_store import MlflowStore
    from pipeline.tracking.store import StoreUnavailable

    try:
        found = MlflowStore(uri).find_run(name)
    except StoreUnavailable as error:
        raise UsageError(f"{uri} does not answer ({error}); name the run by its directory") from None
    if found is None:
        raise UsageError(f"{name} is neither a run directory nor a run id or name in {uri}")
    directory = found.tags.get("geoloom.run_dir", "")
    if directory and storage.exists(storage.join(directory, "resolved.json")):
        return _from_directory(directory)
    return _from_store(found)


def _from_directory(url: str) -> RunData:
    rundir = RunDir(url)
    resolved = rundir.read_resolved()
    assert resolved is not None
    lines = rundir.read_metrics()
    if not lines:
        raise UsageError(f"{url} has no metrics yet; let the run log a step first")
    record = read_record(rundir)
    settings = flatten(resolved["config"])
    name = settings.get("run.name") or storage.name(rundir.url)
    facts = RunFacts.from_dict(record["facts"])
    return RunData(str(name), rundir.url, settings, lines, facts, record["tags"], folder=rundir.url)


def _from_store(found: Any) -> RunData:
    """From a `FoundRun` of the store: parameters are text there, JSON where they can be read as such."""
    lines = lines_of_history(found.histories)
    if not lines:
        raise UsageError(f"MLflow run {found.run_id} has no metrics")
    settings = {key: _value(text) for key, text in found.params.items()}
    return RunData(found.name, f"MLflow run {found.run_id}", settings, lines, found.facts, found.tags)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def lines_of_history(histories: Mapping[str, Sequence[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Metric histories by name back to one line per step."""
    lines: dict[int, dict[str, Any]] = {}
    for key, points in histories.items():
        for step, value in points:
            lines.setdefault(step, {"step": step})[key] = int(value) if key == "samples" else value
    return [lines[step] for step in sorted(lines)]
