"""The tracker a training loop holds: logging appends to a list; a thread does the rest, and never gets in the way."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import Fenced
from cluster.rundir import RunDir
from cluster.secrets import redacted
from pipeline.config import PretrainConfig
from pipeline.tracking.facts import RunFacts
from pipeline.tracking.mirror import Mirror, add_event, add_tag, read_events, read_record, set_status, write_record
from pipeline.tracking.store import Store, StoreUnavailable
from pipeline.tracking.uri import tracking_uri

FLUSH_S = 2.0  # how far the store lags behind while all is well
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # between attempts while it is away
CLOSE_S = 20.0  # how long a finished run waits for it
CHECKPOINT_S = 15.0  # how often the run directory is asked for a newly committed checkpoint
PROBE = re.compile(r"probe/(knn|linear|segment)/[^/]+$")
MAX_SHEET_SAMPLES = 100_000  # of larger sets the index alone is gigabytes: `data_prep show` draws their sheet
MAX_PENDING = 4096  # lines kept in memory; past it they are read again from the run directory


def open_tracker(cfg: PretrainConfig, rundir: RunDir, facts: RunFacts = RunFacts()) -> Tracker:  # noqa: B008  (frozen)
    """Starts tracking `rundir`, continuing its MLflow run if it has one. Returns at once, whether the store answers or not.

    Raises:
        UsageError: `tracking.uri` is nothing MLflow can open.
    """
    write_record(rundir, cfg.tracking.experiment, cfg.run.name or storage.name(rundir.url), facts)
    uri = tracking_uri(cfg.tracking.uri)
    if uri == "none":
        return Tracker(rundir, None)
    from pipeline.tracking.mlflow_store import MlflowStore

    return Tracker(rundir, MlflowStore(uri))


class Tracker:
    """Mirrors a run directory into `store` (None: nowhere) from a daemon thread. No method blocks or raises, but `close`
    waits for up to CLOSE_S.

    Attributes:
        failures: calls to the store that failed so far; `blocked_s`: time the thread spent waiting for the store.
    """

    def __init__(self, rundir: RunDir, store: Store | None, flush_s: float = FLUSH_S) -> None:
        self.rundir, self.failures, self.blocked_s = rundir, 0, 0.0
        self._mirror = Mirror(rundir, store) if store is not None else None
        self._flush_s = flush_s
        self._wake = threading.Condition()
        self._pending: list[Mapping[str, Any]] = []
        self._from_directory = self._mirror is not None  # the store may lack what was logged before a restart
        self._new_files = True
        self._probes: dict[int, dict[str, float]] = {}  # scores by step
        self._newest_checkpoint, self._looked = "", 0.0
        self._status: str | None = None
        self._level = self._caught_up = self._swept = self._fenced = False
        self._thread: threading.Thread | None = None
        if self._mirror is not None:
            self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow run, None until the store has answered once."""
        return self._mirror.run_id if self._mirror else None

    @property
    def newest_step(self) -> int:
        """Newest logged step that the store is known to have, -1 without one."""
        return self._mirror.newest_step if self._mirror else -1

    @property
    def is_level(self) -> bool:
        """Whether the store had everything when the thread last looked, and nothing came since."""
        with self._wake:
            return self._caught_up and not self._pending and not self._from_directory and not self._new_files

    def log(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Hands over one line, already in `metrics.jsonl`, as it stands there."""
        if self._mirror is None:
            return
        line = {"time": time.time(), **metrics, "step": step, "samples": samples}
        scores = {key: line[key] for key in line if PROBE.match(key)}
        with self._wake:
            if scores:
                self._probes[step] = scores
            if len(self._pending) >= MAX_PENDING:
                self._pending, self._from_directory = [], True
            self._pending.append(line)

    def artifact(self, path: str) -> None:
        """Copies a local file into the run directory's `artifacts/`, from where it goes to the store."""
        self._guard(lambda: self.rundir.write(f"artifacts/{storage.name(path)}", Path(path).read_bytes()))

    def checkpoint(self, url: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Registers a committed checkpoint by reference, with the scores logged at its step (metrics: others). One of the run
        directory that nobody told of, because its start died right then, is found."""
        with self._wake:
            scores = dict(metrics) if metrics is not None else self._probes.get(step, {})
        self._guard(lambda: add_event(self.rundir, url, step, scores))

    def tag(self, key: str, value: str) -> None:
        """Sets a tag of the run, in the run directory and the store."""
        self._guard(lambda: add_tag(self.rundir, key, value))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is left and ends the run as FINISHED, FAILED, KILLED or SCHEDULED (it will be requeued). A start that was
        taken over does neither: the run is the later start's."""
        self._guard(lambda: set_status(self.rundir, status))
        self._guard(lambda: draw(self.rundir))
        if self._thread is None:
            return
        with self._wake:
            self._status = status
            self._wake.notify()
        self._thread.join(CLOSE_S)
        if not self._level and not self._fenced:
            print(
                f"tracking: the store did not answer, it is behind this run; later: python -m pipeline sync {self.rundir.url}",
                file=sys.stderr,
            )

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
            self._new_files = True
        except Fenced:  # said where the run ends
            self._fenced = True
        except Exception as error:  # training goes on without this file
            print(f"tracking: {redacted(' '.join(str(error).split()))}", file=sys.stderr)

    def _run(self) -> None:
        wait_s = self._flush_s
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._status is not None, wait_s)
                closing = self._status
            try:
                start = time.monotonic()
                self._level_once(closing)
                wait_s = self._flush_s
                if closing is not None:
                    self._level = True
                    return
            except Fenced:
                self._fenced = True
                return
            except Exception as error:
                self.failures += 1
                if not isinstance(error, StoreUnavailable) or self.failures == 1:
                    print(
                        f"tracking: {redacted(str(error))}; the run goes on, metrics are in {self.rundir.metrics_url}",
                        file=sys.stderr,
                    )
                wait_s = min(max(FIRST_WAIT_S, wait_s * 2), 2.0 if closing else LONGEST_WAIT_S)
                if closing:
                    time.sleep(wait_s)  # the condition is already true: do not spin
            finally:
                self.blocked_s += time.monotonic() - start

    def _find_checkpoint(self, now: bool) -> None:
        """Notes committed checkpoints of the run directory that are not noted yet, each with the scores logged at its step."""
        if not now and time.monotonic() - self._looked < CHECKPOINT_S:
            return
        self._looked = time.monotonic()
        try:
            name = storage.read_bytes(storage.join(self.rundir.checkpoints_url, "LATEST")).decode().strip()
        except FileNotFoundError:
            return
        if name == self._newest_checkpoint or not name.startswith("step-"):
            return
        noted = {(storage.name(event["url"]), event["step"]) for event in read_events(self.rundir)}
        for folder in sorted({name, *storage.list_names(self.rundir.checkpoints_url)}):
            number = folder.removeprefix("step-")
            if (
                folder > name
                or not folder.startswith("step-")
                or not number.isdigit()
                or (folder, int(number)) in noted
            ):
                continue
            if folder == name or storage.exists(storage.join(self.rundir.checkpoints_url, folder, "manifest.json")):
                scores = self._scores_at(int(number))
                add_event(self.rundir, storage.join(self.rundir.checkpoints_url, folder), int(number), scores)
                self._new_files = True
        self._newest_checkpoint = name

    def _scores_at(self, step: int) -> dict[str, float]:
        with self._wake:
            if step in self._probes:
                return self._probes[step]
        lines = [line for line in self.rundir.read_metrics() if line["step"] == step]
        return {key: value for line in lines for key, value in line.items() if PROBE.match(key) and value is not None}

    def _level_once(self, closing: str | None) -> None:
        assert self._mirror is not None
        with self._wake:
            lines, self._pending = self._pending, []
            self._caught_up = False
            from_directory, self._from_directory = self._from_directory, False
        try:
            self._find_checkpoint(closing is not None)
            self._mirror.connect()  # first, so that an absent store costs one call and no reading
            if from_directory or closing:
                known = {line["step"]: line for line in [*self.rundir.read_metrics(), *lines]}
                lines = [known[step] for step in sorted(known)]
            if not self._swept:
                self._mirror.close_stale()
                self._swept = True
            self._mirror.send(lines)
            if self._new_files or closing:
                self._new_files = False
                self._mirror.send_files()
            if closing:
                self._mirror.note_redone()
                self._mirror.end(closing)
            self._caught_up = True
        except BaseException:
            with self._wake:
                kept = [*lines, *self._pending]
                # only if memory does not hold them: reading a long run's file takes seconds that training feels
                self._from_directory |= from_directory or len(kept) > MAX_PENDING
                self._pending, self._new_files = kept[-MAX_PENDING:], True
            raise


def draw(rundir: RunDir) -> None:
    """Pictures of the run so far under `artifacts/`: loss curves, expert loads, and a contact sheet of the data, once."""
    from pipeline.tracking.plots import expert_plot, loss_plot

    lines = rundir.read_metrics()
    for name, picture in (("loss.png", loss_plot(lines)), ("experts.png", expert_plot(lines))):
        if picture is not None:
            rundir.write(f"artifacts/{name}", picture)
    sets = [
        dataset
        for dataset in read_record(rundir)["facts"].get("datasets", ())
        if 0 < dataset["samples"] <= MAX_SHEET_SAMPLES
    ]
    if sets and lines and not storage.exists(storage.join(rundir.url, "artifacts/data.png")):
        from data_prep.shards import ShardSet
        from data_prep.show import sheet

        shards = ShardSet.open(sets[0]["url"])
        rundir.write("artifacts/data.png", sheet(shards, samples=6))
