"""Brings a tracking store level with a run directory, each step once, whatever failed before.

Beside what `cluster.rundir` keeps, a tracked run directory holds
`tracked.json` (tags, datasets, experiment, name, status), `tracked.jsonl` (checkpoints) and `artifacts/`.
The rule against doubles: all values of a step go in one all-or-nothing batch that contains `samples`, so a step is either
wholly there or not at all; whenever it is unsure what arrived, the mirror asks which steps the store has.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import storage
from cluster.config import flatten
from cluster.logs import read_failures
from cluster.rundir import RunDir
from cluster.secrets import redact, redacted
from pipeline.tracking.facts import RunFacts, describe, git_diff
from pipeline.tracking.store import Point, Store
from pipeline.tracking.writer import fate, is_our_place, lives

MARKER = "samples"  # every logged line has it
CHUNK_LINES = 64
REDONE = "geoloom.redone_steps"


class Mirror:
    """One run directory and one store. Every method may raise StoreUnavailable; calling it again later is always right."""

    def __init__(self, rundir: RunDir, store: Store) -> None:
        self.rundir, self._store = rundir, store
        self.run_id: str | None = None
        self.newest_step = -1  # of those the store is known to have
        self._present: set[int] | None = None  # steps the store has; None = unsure, ask
        self._sent_tags: dict[str, str] = {}
        self._sent_artifacts: dict[str, str] = {}
        self._sent_checkpoints: set[str] = set()

    @property
    def store(self) -> Store:
        """The store, after a look at the lease: a start that was taken over sends nothing more. Raises Fenced."""
        self.rundir.check_claim()
        return self._store

    def open(self) -> str:
        """Creates or continues the run and brings its settings, tags and datasets up to date. Returns the run id."""
        if self.run_id is not None:
            return self.run_id
        record = read_record(self.rundir)
        run_id = self.store.open_run(self.rundir.run_id, record["experiment"], record["name"], record["tags"])
        if run_id != self.rundir.run_id:  # at once: a run that nobody remembers would be started twice
            self.rundir.run_id = run_id
        resolved = self.rundir.read_resolved()
        params = {key: _text(value) for key, value in flatten((resolved or {}).get("config", {})).items()}
        changed = self.store.log_params(run_id, params)
        if changed:  # a store keeps the first value for ever; the run went on with another one
            self.store.set_tags(
                run_id, {f"geoloom.changed.{key}": f"{old} -> {params[key]}" for key, old in changed.items()}
            )
        self.store.log_datasets(run_id, RunFacts.from_dict(record["facts"]).datasets)
        self.run_id, self._sent_tags = run_id, record["tags"]
        return run_id

    def connect(self) -> str:
        """`open`, and makes sure which steps the store has. Cheap when both are known."""
        run_id = self.open()
        if self._present is None:
            self._present = {step for step, _ in self.store.history(run_id, MARKER)}
            self.newest_step = max(self._present, default=-1)
        return run_id

    def send(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Sends the metrics lines that the store lacks; returns how many it sent."""
        run_id = self.connect()
        assert self._present is not None
        missing = [line for line in lines if line["step"] not in self._present]
        for start in range(0, len(missing), CHUNK_LINES):
            chunk = missing[start : start + CHUNK_LINES]
            present, self._present = self._present, None  # unsure while the call is under way
            self.store.log_points(run_id, [point for line in chunk for point in points_of(line)])
            self._present = present | {line["step"] for line in chunk}
            self.newest_step = max(self.newest_step, *(line["step"] for line in chunk))
        return len(missing)

    def send_files(self) -> None:
        """Uploads new or changed artifacts and tags, and registers checkpoints by reference."""
        run_id = self.open()
        tags = read_record(self.rundir)["tags"]
        if tags != self._sent_tags:
            self.store.set_tags(run_id, tags)
            self._sent_tags = tags
        folder = storage.join(self.rundir.url, "artifacts")
        for name in ["resolved.json", *storage.list_names(folder)]:
            url = storage.join(self.rundir.url if name == "resolved.json" else folder, name)
            if not storage.exists(url):
                continue
            data = storage.read_bytes(url)
            digest = hashlib.sha256(data).hexdigest()
            if self._sent_artifacts.get(name) == digest:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                if name == "resolved.json":
                    data = _text(data.decode()).encode()
                path = os.path.join(scratch, name)
                with open(path, "wb") as stream:
                    stream.write(data)
                self.store.log_artifact(run_id, path)
            self._sent_artifacts[name] = digest
        for event in read_events(self.rundir):
            identity = json.dumps(event, sort_keys=True)  # with its scores: they may come later
            if identity not in self._sent_checkpoints:
                self.store.register_checkpoint(run_id, event["url"], event["step"], event["metrics"])
                self._sent_checkpoints.add(identity)

    def end(self, status: str) -> None:
        self.store.end_run(self.open(), status)

    def close_stale(self) -> list[str]:
        """Ends other runs of this directory that the store shows as RUNNING for ever; returns their ids.

        A directory has one run and one writer. Another run of it was left by a start that died before it could note its
        run's id, or belonged to a directory that stood here before. One whose process still lives on this host is spared.
        """
        own, record = self.open(), read_record(self.rundir)
        url = record["tags"].get("geoloom.run_dir")
        closed = []
        for run_id, tags in self.store.running(record["experiment"], url) if url else ():
            host = tags.get("geoloom.host", "")
            alive = host == socket.gethostname() and lives(tags.get("geoloom.pid"))
            if run_id == own or alive or not is_our_place(url, host):
                continue
            self.store.end_run(run_id, "KILLED")
            closed.append(run_id)
        return closed

    def redone(self) -> list[int]:
        """Steps of which the store holds another loss than the run directory.

        A resume redoes what came after the checkpoint. If the redone steps went another way (other settings, another
        number of ranks), `metrics.jsonl` has the second record; a store can neither replace nor delete its first.
        """
        run_id = self.run_id or self.rundir.run_id
        if run_id is None:
            return []
        truth = {line["step"]: line.get("loss") for line in self.rundir.read_metrics()}
        history = self.store.history(run_id, "loss")
        return sorted({step for step, value in history if truth.get(step) not in (None, value)})

    def note_redone(self) -> None:
        """Names the `redone` steps in a tag of the run."""
        steps = self.redone()
        if steps:
            text = f"{ranges(steps)}: these are the first figures; after a resume metrics.jsonl has the second"
            self.store.set_tags(self.open(), {REDONE: text})

    def differences(self) -> list[str]:
        """Where the store departs from the run directory, one line each: missing, doubled, unknown or unequal values.

        Only reads: status and tags of the run stay as they are.
        """
        run_id, lines = self.run_id or self.rundir.run_id, self.rundir.read_metrics()
        if run_id is None:
            return ["the store has no run of this directory"]
        keys = sorted({key for line in lines for key in line})
        truth: dict[str, dict[int, float]] = {key: {} for key in keys}
        for point in (point for line in lines for point in points_of(line)):
            truth[point.key][point.step] = point.value
        found = []
        for key in keys:
            history = self.store.history(run_id, key)
            there = dict(history)
            if len(there) != len(history):
                found.append(f"{key}: {len(history) - len(there)} steps stand twice")
            for step in sorted(there.keys() | truth[key].keys()):
                if there.get(step) != truth[key].get(step):
                    found.append(f"{key} at step {step}: store {there.get(step)}, run directory {truth[key].get(step)}")
        return found


def points_of(line: Mapping[str, Any]) -> list[Point]:
    """The finite numbers of one metrics line, `samples` last; `step` and `time` are their coordinates."""
    time_ms = int(float(line.get("time") or 0) * 1000)
    values = {
        key: float(value) for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float) and math.isfinite(value)
    }  # fmt: skip
    values[MARKER] = values.pop(MARKER, 0.0)
    return [Point(key, value, int(line["step"]), time_ms) for key, value in values.items()]


def write_record(rundir: RunDir, experiment: str, name: str, facts: RunFacts) -> None:
    """Puts into the run directory all that a later sync, perhaps on another machine, must know."""
    fingerprint = (rundir.read_resolved() or {}).get("fingerprint", "")
    record = {
        "experiment": experiment, "name": name, "facts": redact(facts.to_dict()),
        "tags": redact(describe(facts, rundir.url, fingerprint)),
        "status": "RUNNING",
    }  # fmt: skip
    _write_json(rundir, "tracked.json", record)
    difference = git_diff()
    if difference:
        rundir.write("artifacts/dirty.diff", redacted(difference).encode())


def set_status(rundir: RunDir, status: str) -> None:
    _write_json(rundir, "tracked.json", read_record(rundir) | {"status": status})


def read_record(rundir: RunDir) -> dict[str, Any]:
    """The record, or a sparse one for a run directory that was never tracked."""
    try:
        return json.loads(storage.read_bytes(storage.join(rundir.url, "tracked.json")))
    except FileNotFoundError:
        config = (rundir.read_resolved() or {}).get("config", {})
        experiment = config.get("tracking", {}).get("experiment", "geoloom")
        return {
            "experiment": experiment,
            "name": storage.name(rundir.url),
            "facts": {},
            "tags": {},
            "status": "FINISHED",
        }


def add_tag(rundir: RunDir, key: str, value: str) -> None:
    record = read_record(rundir)
    _write_json(rundir, "tracked.json", record | {"tags": record["tags"] | {key: value}})


def status_now(rundir: RunDir) -> str:
    """How the run ended, or RUNNING while its writer may still be at work. One that died without a word counts as FAILED
    if it left a failure record, else as KILLED.

    Only a process of this host, or a job of this host's SLURM, is known to be gone.
    """
    status = read_record(rundir)["status"]
    if status != "RUNNING":
        return status
    writer = rundir.read_writer()
    found = fate(writer) if writer else "unknown"
    if found == "gone":
        return "FAILED" if read_failures(rundir.logs_url) else "KILLED"
    return "SCHEDULED" if found == "queued" else status


def ranges(steps: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` → `1-3, 7`."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def add_event(rundir: RunDir, url: str, step: int, metrics: Mapping[str, float]) -> None:
    """Remembers a committed checkpoint; a few per run, so the small file is rewritten whole."""
    events = [event for event in read_events(rundir) if (event["url"], event["step"]) != (url, step)]
    events.append({"url": url, "step": step, "metrics": dict(metrics)})
    text = "".join(json.dumps(event) + "\n" for event in events)
    rundir.write("tracked.jsonl", text.encode())


def read_events(rundir: RunDir) -> list[dict[str, Any]]:
    try:
        data = storage.read_bytes(storage.join(rundir.url, "tracked.jsonl"))
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data.splitlines() if line]


def _write_json(rundir: RunDir, name: str, tree: Mapping[str, Any]) -> None:
    rundir.write(name, json.dumps(tree, indent=2, sort_keys=True).encode())


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return redacted(text)
