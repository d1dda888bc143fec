"""What a mirror needs of a tracking store, and an in-memory one that passes the same contract tests as MLflow's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.tracking.facts import Dataset


class StoreUnavailable(Exception):
    """The store did not take or give something, for whatever reason. What was sent may or may not have arrived."""


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    step: int
    time_ms: int


class Store(Protocol):
    """Every call raises StoreUnavailable when it cannot be sure that the store did it.

    `log_points` is all or nothing for points of one step: a step of which `steps` knows one key is there whole.
    """

    def open_run(self, run_id: str | None, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        """Continues `run_id` (if it exists there) or creates a run; sets its tags and the status RUNNING; returns the id."""

    def log_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        """Adds what is missing; returns stored values of keys that differ (a store never changes a parameter)."""

    def log_points(self, run_id: str, points: Sequence[Point]) -> None: ...

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) in step order."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None: ...

    def log_datasets(self, run_id: str, datasets: Iterable[Dataset]) -> None:
        """Adds datasets as inputs; one that is there already is left alone."""

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None: ...

    def register_checkpoint(self, run_id: str, url: str, step: int, metrics: Mapping[str, float]) -> None:
        """Registers by reference; the same url and step again only adds metrics."""

    def running(self, experiment: str, run_dir: str) -> list[tuple[str, dict[str, str]]]:
        """(run id, tags) of the runs with status RUNNING whose tag `geoloom.run_dir` is `run_dir`."""

    def end_run(self, run_id: str, status: str) -> None:
        """Sets the status; an end time too, unless the run will go on (SCHEDULED) or still does (RUNNING)."""


class MemoryStore:
    """The stand-in: one process, no server. `fail_next` calls raise first, to play an absent server."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.fail_next = 0
        self.calls = 0
        self._numbers = itertools.count(1)

    def _answer(self) -> None:
        self.calls += 1
        if self.fail_next > 0:
            self.fail_next -= 1
            raise StoreUnavailable("the store is away")

    def open_run(self, run_id: str | None, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        self._answer()
        if run_id is None or run_id not in self.runs:
            run_id = f"run{next(self._numbers)}"
            self.runs[run_id] = {"experiment": experiment, "name": name, "tags": {}, "params": {}, "points": [],
                                 "datasets": [], "artifacts": {}, "checkpoints": {}}  # fmt: skip
        self.runs[run_id]["tags"].update(tags)
        self.runs[run_id]["status"] = "RUNNING"
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        self._answer()
        stored = self.runs[run_id]["params"]
        changed = {key: stored[key] for key, value in params.items() if stored.get(key, value) != value}
        stored.update({key: value for key, value in params.items() if key not in stored})
        return changed

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        self._answer()
        self.runs[run_id]["points"].extend(points)

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        self._answer()
        return sorted((point.step, point.value) for point in self.runs[run_id]["points"] if point.key == key)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._answer()
        self.runs[run_id]["tags"].update(tags)

    def log_datasets(self, run_id: str, datasets: Iterable[Dataset]) -> None:
        self._answer()
        known = self.runs[run_id]["datasets"]
        known.extend(dataset for dataset in datasets if dataset not in known)

    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self._answer()
        with open(path, "rb") as stream:
            name = path.rsplit("/", 1)[-1]
            self.runs[run_id]["artifacts"][f"{folder}/{name}" if folder else name] = stream.read()

    def register_checkpoint(self, run_id: str, url: str, step: int, metrics: Mapping[str, float]) -> None:
        self._answer()
        self.runs[run_id]["checkpoints"].setdefault((url, step), {}).update(metrics)

    def running(self, experiment: str, run_dir: str) -> list[tuple[str, dict[str, str]]]:
        self._answer()
        return [
            (run_id, dict(run["tags"])) for run_id, run in self.runs.items()
            if run["status"] == "RUNNING" and run["experiment"] == experiment and run["tags"].get("geoloom.run_dir") == run_dir
        ]  # fmt: skip

    def end_run(self, run_id: str, status: str) -> None:
        self._answer()
        self.runs[run_id]["status"] = status
