"""Saving: copy to host memory, then write beside training; every rank its own file, the first rank commits."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster import storage
from cluster.errors import RunFailure
from pipeline.checkpoint import store
from pipeline.checkpoint.tensors import write_tensors
from pipeline.config import CheckpointConfig
from pipeline.engine import Engine
from pipeline.parallel.zero import MOMENTS

PEER_TIMEOUT_S = 1800.0
log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints. Collective: every rank calls `save`, `wait` at the same steps.

    Args:
        url: the run's `checkpoints/`.
        before_commit: called by the first rank right before a checkpoint becomes visible; raises to prevent it (a newer start
            of the run has taken over, or the metrics of this step are not durable).
        after_commit: called by the first rank with the committed checkpoint's URL and step.
    """

    def __init__(
        self, url: str, config: CheckpointConfig, rank: int, world: int, before_commit: Callable[[], None],
        after_commit: Callable[[str, int], None] = lambda url, step: None,
    ) -> None:  # fmt: skip
        self.url, self.config, self.rank, self.world = url, config, rank, world
        self.before_commit, self.after_commit = before_commit, after_commit
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if rank == 0:
            store.clear_leftovers(url)  # before the token goes out: with it the others may start to write
        self._token = _shared_token(world)

    def save(self, engine: Engine, step: int, samples: int, extra: Mapping[str, Any]) -> None:
        """Starts writing step `step` (synchronously with `asynchronous: false`). Waits for the save before it.

        extra: JSON-able state that is the same on all ranks (reader, run id, statistics, configuration, …).
        """
        self.wait()
        tensors, pieces = snapshot(engine, self.rank)
        facts = {
            "format": store.FORMAT, "step": step, "samples": samples, "adam_step": engine.state.adam_step,
            "layout": {"world": self.world, "ep": engine.layout.ep, "zero_stage": engine.layout.zero_stage}, **extra,
        }  # fmt: skip
        job = threading.Thread(
            target=self._write, args=(step, tensors, pieces, facts), name=f"save-{step}", daemon=True
        )
        self._thread = job
        job.start()
        if not self.config.asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises what went wrong in the writing thread, if anything has."""
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, RunFailure):
                raise error
            raise RunFailure(f"writing a checkpoint to {self.url} failed: {type(error).__name__}: {error}") from error

    def wait(self) -> None:
        """Until this rank's part of the save under way is done; for the first rank that means committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, step: int, tensors: dict[str, Tensor], pieces: list[list[Any]], facts: dict[str, Any]) -> None:
        try:
            work = store.work_url(self.url, step, self._token)
            file = f"rank-{self.rank:05d}.safetensors"
            if work.endswith(
                store.folder_name(step)
            ):  # object store: files of an older attempt must not be mistaken for ours
                file = f"rank-{self.rank:05d}.{self._token}.safetensors"
            storage.make_folder(work)
            note = {"file": file, **write_tensors(storage.join(work, file), tensors), "pieces": pieces}
            storage.write_atomic(storage.join(work, self._note_name(self.rank)), json.dumps(note).encode())
            if self.rank == 0:
                self._commit(step, work, facts)
        except Exception as error:
            log.warning("checkpoint of step %d: %s", step, error)
            self._error = error

    def _commit(self, step: int, work: str, facts: dict[str, Any]) -> None:
        started = time.monotonic()
        notes = [self._await_note(work, rank, started) for rank in range(self.world)]
        manifest = {**facts, **_index(notes)}
        self.before_commit()
        final = store.commit(self.url, step, self._token, manifest)
        store.tidy(final, manifest)
        self.after_commit(final, step)
        store.retain(self.url, self.config.keep_last, self.config.keep_every)

    def _await_note(self, work: str, rank: int, started: float) -> dict[str, Any]:
        url = storage.join(work, self._note_name(rank))
        while not storage.exists(url):
            if time.monotonic() - started > PEER_TIMEOUT_S:
                raise RunFailure(f"rank {rank} did not finish its part of {work} in {PEER_TIMEOUT_S:.0f} s")
            time.sleep(0.05 if storage.is_local(url) else 0.5)
        return json.loads(storage.read_bytes(url))

    def _note_name(self, rank: int) -> str:
        return f"rank-{rank:05d}.{self._token}.json"


def snapshot(engine: Engine, rank: int) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Host copies of what this rank answers for, and the pieces: [name, shape, start, size]."""
    tensors, pieces = {}, []
    for piece in sorted(engine.state.pieces, key=lambda p: (p.name, p.start)):
        a, b = piece.owned
        if a == b:
            continue
        start = piece.start + a
        pieces.append([piece.name, list(piece.shape), start, b - a])
        parts = {"student": piece.of(piece.master.tensor.detach()), "teacher": engine.teacher.of(piece)}
        parts.update({key: engine.state.moment(piece, key) for key in MOMENTS})
        for kind, part in parts.items():
            tensors[f"{kind}/{piece.name}@{start}"] = part[a:b].detach().to("cpu", torch.float32, copy=True)
    if rank == 0:
        for owner, module in (("student", engine.student), ("teacher", engine.teacher.module)):
            for name, buffer in _persistent_buffers(module).items():
                tensors[f"{owner}_buffer/{name}"] = buffer.detach().to("cpu", copy=True)
    return tensors, pieces


def _persistent_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    names = {name for name, _ in module.named_buffers()}
    return {name: value for name, value in module.state_dict().items() if name in names}


def _index(notes: list[dict[str, Any]]) -> dict[str, Any]:
    parameters: dict[str, dict[str, Any]] = {}
    for note in notes:
        for name, shape, start, size in note["pieces"]:
            parameters.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([start, size, note["file"]])
    for entry in parameters.values():
        entry["pieces"].sort()
    files = {note["file"]: {"bytes": note["bytes"], "sha256": note["sha256"]} for note in notes}
    return {"parameters": parameters, "files": files}


def _shared_token(world: int) -> str:
    """A name all ranks of this start share and no other start has."""
    import uuid

    box = [uuid.uuid4().hex[:8]]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
