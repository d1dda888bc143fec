"""The door to MLflow (server, SQLite or PostgreSQL store): the only file that imports it.

Retries are short, because the mirror above retries for as long as the run lasts, and because MLflow's defaults block a
call for minutes when its server is away.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import UsageError
from pipeline.tracking.facts import Dataset, RunFacts
from pipeline.tracking.store import Point, StoreUnavailable

for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false", "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "2", "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"
MAX_POINTS, MAX_PARAMS, MAX_VALUE = 1000, 100, 5000  # per log_batch call; characters of one value

F = TypeVar("F", bound=Callable[..., Any])


def check_uri(uri: str) -> str:
    """Returns a tracking URI we can use. Raises UsageError for a plain folder (MLflow closed its file store) or a typo."""
    if uri.startswith(("http://", "https://", "sqlite:///", "postgresql://", "postgresql+psycopg2://")):
        return uri
    hint = f"sqlite:///{uri}/mlflow.db" if "://" not in uri else "http://…, sqlite:///… or postgresql://…"
    raise UsageError(f"tracking.uri={uri!r} is not a tracking store MLflow can open; use {hint}, or none")


def _guarded(method: F) -> F:
    """Whatever goes wrong in MLflow, its HTTP client or its database driver means one thing to us."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (StoreUnavailable, UsageError):
            raise
        except Exception as error:
            raise StoreUnavailable(" ".join(str(error).split())[:300] or type(error).__name__) from error

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class FoundRun:
    """A run as the store has it; histories: (step, value) by metric."""

    run_id: str
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    facts: RunFacts
    histories: dict[str, list[tuple[int, float]]]


class MlflowStore:
    """`pipeline.tracking.store.Store` on an MLflow tracking URI. Importing and connecting happen at the first call."""

    def __init__(self, uri: str) -> None:
        self.uri = check_uri(uri)
        self._experiments: dict[str, str] = {}

    @functools.cached_property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @_guarded
    def open_run(self, run_id: str | None, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        if run_id is not None and self._has_run(run_id):
            self.set_tags(run_id, tags)
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        run = self.client.create_run(self._experiment_id(experiment), tags=dict(tags), run_name=name)
        return run.info.run_id

    @_guarded
    def log_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        from mlflow.entities import Param

        stored = self.client.get_run(run_id).data.params
        wanted = {key: value[:MAX_VALUE] for key, value in params.items()}
        for part in _parts([Param(key, value) for key, value in wanted.items() if key not in stored], MAX_PARAMS):
            self.client.log_batch(run_id, params=part, synchronous=True)
        return {key: stored[key] for key, value in wanted.items() if stored.get(key, value) != value}

    @_guarded
    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """A batch never ends inside a step, as long as a step has fewer than MAX_POINTS values."""
        batch: list[Point] = []
        for _, step in _by_step(points):
            if batch and len(batch) + len(step) > MAX_POINTS:
                self._log_batch(run_id, batch)
                batch = []
            batch.extend(step)
        for part in _parts(batch, MAX_POINTS):
            self._log_batch(run_id, part)

    def _log_batch(self, run_id: str, points: Sequence[Point]) -> None:
        """At most MAX_POINTS. A server gets plain JSON (REST API, Log Batch): MLflow's client would build every value three
        times over, for five times the CPU time, and all of it holds the interpreter that the training thread needs."""
        if self.uri.startswith("http"):
            from mlflow.utils.credentials import get_default_host_creds
            from mlflow.utils.rest_utils import http_request, verify_rest_response

            metrics = [{"key": p.key, "value": p.value, "timestamp": p.time_ms, "step": p.step} for p in points]
            body = {"run_id": run_id, "metrics": metrics}
            answer = http_request(get_default_host_creds(self.uri), LOG_BATCH, "POST", json=body)
            verify_rest_response(answer, LOG_BATCH)
        else:
            from mlflow.entities import Metric

            entities = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
            self.client.log_batch(run_id, metrics=entities, synchronous=True)

    @_guarded
    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in self.client.get_metric_history(run_id, key))

    @_guarded
    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in _parts([RunTag(key, value[:MAX_VALUE]) for key, value in tags.items()], MAX_PARAMS):
            self.client.log_batch(run_id, tags=part, synchronous=True)

    @_guarded
    def log_datasets(self, run_id: str, datasets: Iterable[Dataset]) -> None:
        """The digest is the head of the manifest's sha256: the same data has the same digest in every run."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        known = {entry.dataset.digest for entry in (self.client.get_run(run_id).inputs.dataset_inputs or [])}
        inputs = [
            DatasetInput(
                Entity(dataset.url.rstrip("/").rsplit("/", 1)[-1] or "shards", dataset.manifest_sha256[:36], "geoloom-shards",
                       dataset.url, profile=f'{{"samples": {dataset.samples}}}'),
                [InputTag("mlflow.data.context", dataset.split), InputTag("manifest_sha256", dataset.manifest_sha256),
                 InputTag("statistics_sha256", dataset.statistics_sha256)],
            )
            for dataset in datasets if dataset.manifest_sha256[:36] not in known
        ]  # fmt: skip
        if inputs:
            self.client.log_inputs(run_id, datasets=inputs)

    @_guarded
    def log_artifact(self, run_id: str, path: str, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, path, folder)

    @_guarded
    def register_checkpoint(self, run_id: str, url: str, step: int, metrics: Mapping[str, float]) -> None:
        """A logged model that holds no files: its tags say where the checkpoint lies."""
        name, experiment = f"step-{step:08d}", self.client.get_run(run_id).info.experiment_id
        found = self.client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run_id}'")
        scores = {f"geoloom.{key}": f"{value:.6g}" for key, value in metrics.items()}
        if found and scores and any((found[0].tags or {}).get(key) != value for key, value in scores.items()):
            self.client.set_logged_model_tags(found[0].model_id, scores)
        if not found:
            tags = {"geoloom.checkpoint_url": url, "geoloom.step": str(step), **scores}
            params = {"step": str(step), "url": url[:MAX_VALUE]}
            found = [self.client.create_logged_model(experiment, name, run_id, tags, params, "geoloom-checkpoint")]
        if found[0].status != "READY":
            self.client.finalize_logged_model(found[0].model_id, "READY")

    @_guarded
    def running(self, experiment: str, run_dir: str) -> list[tuple[str, dict[str, str]]]:
        experiment_id = self._experiment_id(experiment)
        found, token = [], None
        while True:  # asked for by status alone and sifted here: a path may hold what the filter's quoting cannot
            page = self.client.search_runs(
                [experiment_id], "attributes.status = 'RUNNING'", max_results=500, page_token=token
            )
            found += [
                (run.info.run_id, dict(run.data.tags))
                for run in page
                if run.data.tags.get("geoloom.run_dir") == run_dir
            ]
            token = page.token
            if not token:
                return found

    @_guarded
    def end_run(self, run_id: str, status: str) -> None:
        if status in ("SCHEDULED", "RUNNING"):  # it will go on: no end time
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status)

    @_guarded
    def find_run(self, name: str) -> FoundRun | None:
        """A run by id, else the newest one of that name in any experiment; None without one."""
        run = self.client.get_run(name) if self._has_run(name) else None
        if run is None:
            experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
            quoted = name.replace("'", "")
            found = self.client.search_runs(experiments, f"run_name = '{quoted}'", max_results=1)
            run = found[0] if found else None
        if run is None:
            return None
        datasets = tuple(
            Dataset(entry.dataset.source, tags.get("manifest_sha256", entry.dataset.digest), tags.get("statistics_sha256", ""))
            for entry in run.inputs.dataset_inputs for tags in [{tag.key: tag.value for tag in entry.tags}]
        )  # fmt: skip
        tags = dict(run.data.tags)
        histories = {key: self.history(run.info.run_id, key) for key in run.data.metrics}
        facts = RunFacts(int(tags.get("geoloom.world", 1)), tags.get("geoloom.layout", ""), datasets)
        return FoundRun(run.info.run_id, run.info.run_name or name, dict(run.data.params), tags, facts, histories)

    def _has_run(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in (
                "RESOURCE_DOES_NOT_EXIST",
                "INVALID_PARAMETER_VALUE",
            ):  # the latter: no form of an id
                return False
            raise
        return True

    def _experiment_id(self, name: str) -> str:
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            self._experiments[name] = found.experiment_id if found else self._create_experiment(name)
        return self._experiments[name]

    def _create_experiment(self, name: str) -> str:
        """A server decides where artifacts go; beside a SQLite file lies their folder, not in the current directory."""
        place = None
        if self.uri.startswith("sqlite:///"):
            place = Path(self.uri.removeprefix("sqlite:///")).resolve().with_suffix(".artifacts").as_uri()
        return self.client.create_experiment(name, artifact_location=place)


def _parts(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _by_step(points: Sequence[Point]) -> Iterator[tuple[int, list[Point]]]:
    step: list[Point] = []
    for point in points:
        if step and point.step != step[0].step:
            yield step[0].step, step
            step = []
        step.append(point)
    if step:
        yield step[0].step, step
