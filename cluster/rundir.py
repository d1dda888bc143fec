"""The run directory: what one training run leaves behind, on any fsspec URL. Rank 0 writes, every tool reads.

```
resolved.json     {"fingerprint", "config"}: the full configuration, written before the first step
metrics.jsonl     one JSON object per logged step, each step exactly once, also over preemptions; on an object store
metrics/          segments of it (cluster.metrics)
checkpoints/      owned by pipeline.checkpoint
probes/           what each test site of a probe got (pipeline.probes.outcomes)
logs/             one log per rank and start, failures as JSON (cluster.logs)
tracking.json     {"run_id"}: the MLflow run that every restart continues
lease/            one record per start: who may write (cluster.lease); every shared write checks it
writer.json       the newest of them, for people and tools
```
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from cluster import metrics, storage
from cluster.config import fingerprint, to_dict
from cluster.errors import UsageError
from cluster.lease import Lease


class RunDir:
    """Paths, metrics and identity of one run. Cheap to construct; creates nothing until something is written."""

    def __init__(self, url: str) -> None:
        if not url:
            raise UsageError("run.dir is empty; give a folder or URL, such as run.dir=runs_out/first")
        self.url = url.rstrip("/") or "/"
        self.checkpoints_url = storage.join(self.url, "checkpoints")
        self.logs_url = storage.join(self.url, "logs")
        self.metrics_url = storage.join(self.url, metrics.FILE)
        self._writer: metrics.Writer | None = None
        self._last_step: int | None = None
        self._abandoned: dict[int, bytes] = {}
        self.lease: Lease | None = None

    # --- configuration

    def write_resolved(self, config: Any) -> str:
        """Writes `resolved.json` from a config tree (dataclass or plain dict) and returns its fingerprint."""
        tree = config if isinstance(config, Mapping) else to_dict(config)
        digest = fingerprint(tree)
        self._write_json("resolved.json", {"fingerprint": digest, "config": tree})
        return digest

    def read_resolved(self) -> dict[str, Any] | None:
        """`{"fingerprint", "config"}` of the run that stands here, or None."""
        return self._read_json("resolved.json")

    # --- metrics (`cluster.metrics` has their form)

    def start_metrics(self, step: int) -> None:
        """Prepares to log what follows `step` (0: a new run): lines of later steps no longer count, nor does a torn one.

        A checkpoint at step 100 with metrics up to step 130 means that 101–130 are about to be logged again; without
        this they would stand twice.
        """
        self.close()
        self.check_claim()
        found = metrics.read_lines(self.url)
        self._abandoned = {number: line for number, line in found if number > step}
        self._last_step = step
        self._writer = metrics.open_writer(
            self.url,
            step,
            self.check_claim,
            functools.partial(self.write, metrics.FILE),
            None if self.lease is None else self.lease.epoch,
        )

    def append_metrics(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Adds one line. `figures["step"]` must be larger than the last one; non-finite figures are written as null.

        Locally the line reaches the file at once; to an object store a thread brings it within a minute. Neither waits for
        a storage that is away. `sync` must be called before a checkpoint of this step is committed.

        Returns the line as it stands in the run directory.
        """
        if self._writer is None:
            self.start_metrics(self.last_step() or 0)
        assert self._writer is not None
        step = figures.get("step")
        if not isinstance(step, int) or (self._last_step is not None and step <= self._last_step):
            raise ValueError(f"metrics of step {step!r} come after step {self._last_step}; each step is logged once")
        line = json.dumps({key: _finite(value) for key, value in figures.items()}, allow_nan=False).encode()
        line = _first_telling(self._abandoned.pop(step, None), line)
        if storage.is_local(self.url):  # on an object store the thread that writes looks
            self.check_claim()
        self._last_step = step
        self._writer.append(line)
        return json.loads(line)

    def sync(self) -> None:
        """Makes every line so far durable. Call it before a checkpoint is committed, and at the end. Raises RunFailure."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Syncs and lets go of the metrics. Logging again is allowed."""
        writer, self._writer, self._last_step = self._writer, None, None
        if writer is not None:
            writer.close()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line, in step order; the later one where a step stands twice. No run here: empty."""
        return [json.loads(line) for _, line in metrics.read_lines(self.url)]

    def last_step(self) -> int | None:
        """Step of the last complete metrics line, None without one."""
        return max((number for number, _ in metrics.read_lines(self.url)), default=None)

    # --- identity

    @property
    def run_id(self) -> str | None:
        """MLflow run that this directory belongs to, None before the tracker has one."""
        return (self._read_json("tracking.json") or {}).get("run_id")

    @run_id.setter
    def run_id(self, value: str) -> None:
        self._write_json("tracking.json", {**(self._read_json("tracking.json") or {}), "run_id": value})

    def claim(self) -> None:
        """Takes the directory for this process: from now on an earlier start of the run can write nothing more."""
        self.lease = Lease.acquire(self.url)
        self._write_json("writer.json", self.lease.record)

    def read_writer(self) -> dict[str, Any] | None:
        """What the last `claim` wrote: {"epoch", "token", "host", "pid", "job", "restart", "time"}; None without one."""
        return self._read_json("writer.json")

    def check_claim(self) -> None:
        """Raises Fenced if another start has claimed the directory since. Call it before anything that others can see."""
        if self.lease is not None:
            self.lease.check()

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file `name` (such as `artifacts/loss.png`) whole. Raises Fenced if a later start has claimed the directory."""
        url = storage.join(self.url, name)
        if self.lease is not None:
            self.lease.write(url, data)
        else:  # a tool beside the run, or before its first start
            storage.write_atomic(url, data)

    # --- small files

    def _write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        text = json.dumps(tree, indent=2, sort_keys=True, allow_nan=False)
        self.write(name, f"{text}\n".encode())

    def _read_json(self, name: str) -> dict[str, Any] | None:
        url = storage.join(self.url, name)
        try:
            return json.loads(storage.read_bytes(url))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UsageError(f"{url} is not valid JSON ({error}); move it away or choose another run.dir") from None


def _first_telling(abandoned: bytes | None, line: bytes) -> bytes:
    """Of a step that ran twice (a resume redoes what came after the checkpoint): the first record, if the second one has the
    same losses bit for bit, for then it is the same step, and a tracker has already sent it. Else the second."""
    if abandoned is None:
        return line
    first, second = json.loads(abandoned), json.loads(line)
    losses = {key for key in (*first, *second) if key.split("/")[0] == "loss"}
    return abandoned if losses and all(first.get(key) == second.get(key) for key in losses) else line


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
