"""The run directory: what one training run leaves behind, on any fsspec URL. Rank 0 writes, every tool reads.

```
resolved.json     {"fingerprint", "config"}: the full configuration, written before the first step
metrics.jsonl     one JSON object per logged step, each step exactly once, also over preemptions
checkpoints/      owned by pipeline.checkpoint
probes/           what each test site of a probe got (pipeline.probes.outcomes)
logs/             one log per rank and start, failures as JSON (cluster.logs)
tracking.json     {"run_id"}: the MLflow run that every restart continues
lease/            one record per start: who may write (cluster.lease); every shared write checks it
writer.json       the newest of them, for people and tools
```
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import IO, Any

from cluster import storage
from cluster.config import fingerprint, to_dict
from cluster.errors import UsageError
from cluster.lease import Lease

SYNC_EVERY_S = 60.0
"""Object stores cannot append: there the lines are kept in memory and the object is rewritten at most this often."""


class RunDir:
    """Paths, metrics and identity of one run. Cheap to construct; creates nothing until something is written."""

    def __init__(self, url: str) -> None:
        if not url:
            raise UsageError("run.dir is empty; give a folder or URL, such as run.dir=runs_out/first")
        self.url = url.rstrip("/") or "/"
        self.checkpoints_url = storage.join(self.url, "checkpoints")
        self.logs_url = storage.join(self.url, "logs")
        self.metrics_url = storage.join(self.url, "metrics.jsonl")
        self._stream: IO[bytes] | None = None
        self._lines: list[bytes] | None = None
        self._last_step: int | None = None
        self._abandoned: dict[int, bytes] = {}
        self._synced = time.monotonic()
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

    # --- metrics

    def start_metrics(self, step: int) -> None:
        """Prepares to log what follows `step` (0: a new run): drops lines of later steps and a torn last line.

        A checkpoint at step 100 with metrics up to step 130 means that 101–130 are about to be logged again; without
        this they would stand twice.
        """
        self.close()
        found = self._parse()
        self._lines = [line for number, line in found if number <= step]
        self._abandoned = {number: line for number, line in found if number > step}
        self._last_step = step
        self._rewrite()

    def append_metrics(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Adds one line. `metrics["step"]` must be larger than the last one; non-finite figures are written as null.

        Locally the line reaches the file at once. On an object store it does with the next `sync`, which is called here
        every SYNC_EVERY_S, and must be called before a checkpoint of this step is committed.

        Returns the line as it stands in the file.
        """
        if self._lines is None:
            self.start_metrics(self.last_step() or 0)
        assert self._lines is not None
        step = metrics.get("step")
        if not isinstance(step, int) or (self._last_step is not None and step <= self._last_step):
            raise ValueError(f"metrics of step {step!r} come after step {self._last_step}; each step is logged once")
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}, allow_nan=False).encode()
        line = _first_telling(self._abandoned.pop(step, None), line)
        if self._stream is not None:
            self.check_claim()
        self._last_step = step
        if self._stream is not None:
            self._stream.write(line + b"\n")
            self._stream.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self.sync()
        return json.loads(line)

    def sync(self) -> None:
        """Makes every line so far durable. Call it before a checkpoint is committed, and at the end."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        elif self._lines is not None:
            self._rewrite()

    def close(self) -> None:
        """Syncs and lets go of the metrics file. Logging again is allowed."""
        self.sync()
        if self._stream is not None:
            self._stream.close()
        self._stream, self._lines, self._last_step = None, None, None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line, in step order; the later one where a step stands twice. No run here: empty."""
        steps = {number: json.loads(line) for number, line in self._parse()}
        return [steps[number] for number in sorted(steps)]

    def last_step(self) -> int | None:
        """Step of the last complete metrics line, None without one."""
        return max((number for number, _ in self._parse()), default=None)

    def _parse(self) -> list[tuple[int, bytes]]:
        """(step, line) of each complete line; a torn one (killed while writing) is left out."""
        try:
            data = storage.read_bytes(self.metrics_url)
        except FileNotFoundError:
            return []
        lines = []
        for line in data.splitlines():
            try:
                lines.append((int(json.loads(line)["step"]), line))
            except (ValueError, KeyError, TypeError):
                continue
        return lines

    def _rewrite(self) -> None:
        """Writes all lines whole; on a local file system it then stays open for appending and memory lets go of them."""
        assert self._lines is not None
        self.write("metrics.jsonl", b"".join(line + b"\n" for line in self._lines))
        self._synced = time.monotonic()
        if storage.is_local(self.url):
            self._stream = open(storage.local_path(self.metrics_url), "ab")  # noqa: SIM115  (kept open over the run)
            self._lines = []

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
