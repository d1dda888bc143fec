"""Saving: copy to host memory, then write beside training; every rank its own file, the first rank commits.

What the ranks tell the first one (name, size and checksums of their file) goes through the job's key-value store, not through
the storage: one message per rank, and one object per rank and save.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster import storage
from cluster.errors import Fenced, RunFailure
from cluster.lease import Lease
from pipeline.checkpoint import store
from pipeline.checkpoint.tensors import write_tensors
from pipeline.config import CheckpointConfig
from pipeline.engine import Engine
from pipeline.parallel.zero import MOMENTS

PEER_TIMEOUT_S = 1800.0
log = logging.getLogger(__name__)


class Notes:
    """One note per rank and save, gathered by the first rank. kv: a store all ranks reach, of this object alone.

    Of two saves the notes have different keys, so a rank that is already writing the next checkpoint disturbs nothing; it cannot
    be two ahead, because the steps between are collective.
    """

    def __init__(self, kv: dist.Store, token: str, world: int) -> None:
        self._kv, self._token, self._world = kv, token, world

    def put(self, rank: int, step: int, turn: int, note: Mapping[str, Any]) -> None:
        """Leaves this rank's note; the last rank to come wakes the first one."""
        self._kv.set(self._key(turn, rank), json.dumps(note))
        if self._kv.add(f"save/{self._token}/{step}/count", 1) == self._world:
            self._kv.set(f"save/{self._token}/{step}/all", "1")

    def gather(self, step: int, turn: int) -> list[dict[str, Any]]:
        """All notes, in order of ranks. Raises RunFailure for ranks that do not come, or that failed."""
        try:
            self._kv.wait([f"save/{self._token}/{step}/all"], datetime.timedelta(seconds=PEER_TIMEOUT_S))
        except (RuntimeError, dist.DistStoreError) as error:
            missing = [rank for rank in range(self._world) if not self._kv.check([self._key(turn, rank)])]
            raise RunFailure(
                f"step {step}: ranks {missing[:8]} of {self._world} did not finish their part in {PEER_TIMEOUT_S:.0f} s: {error}"
            ) from None
        notes = [json.loads(text) for text in self._kv.multi_get([self._key(turn, r) for r in range(self._world)])]
        for what in ("count", "all"):
            self._kv.delete_key(f"save/{self._token}/{step}/{what}")
        failed = [(rank, note["error"]) for rank, note in enumerate(notes) if "error" in note]
        if failed:
            raise RunFailure(f"step {step}: rank {failed[0][0]} could not write its part: {failed[0][1]}")
        return notes

    def _key(self, turn: int, rank: int) -> str:
        return f"save/{self._token}/{turn % 2}/{rank}"


class Saver:
    """Writes a run's checkpoints. Collective: every rank calls `save`, `wait` at the same steps.

    Args:
        url: the run's `checkpoints/`.
        before_commit: called by the first rank right before a checkpoint becomes visible; raises to prevent it (the metrics of
            this step are not durable).
        after_commit: called by the first rank with the committed checkpoint's URL and step.
        lease: of the run directory (first rank): a start that has been overtaken commits and removes nothing. None: nobody else
            writes here.
        copies: a second place for some of them (`CheckpointConfig.copies`), written by the same threads after the first, every rank
            its own file from memory; empty: none.
    """

    def __init__(
        self, url: str, config: CheckpointConfig, rank: int, world: int, before_commit: Callable[[], None],
        after_commit: Callable[[str, int], None] = lambda url, step: None, lease: Lease | None = None, copies: str = "",
    ) -> None:  # fmt: skip
        self.url, self.config, self.rank, self.world, self.copies = url, config, rank, world, copies
        self.before_commit, self.after_commit = before_commit, after_commit
        self._check = (lambda: None) if lease is None else lease.check
        self._put: store.Write = storage.write_atomic if lease is None else lease.write
        self._memory: dict[str, Tensor] = {}  # of the snapshots, kept from save to save: 16 bytes per element owned
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if rank == 0:
            # before the token goes out: with it the others may start to write
            store.clear_leftovers(url, write=self._put, check=self._check)
            if copies:
                with _only_said("clearing up", copies):
                    store.clear_leftovers(copies, check=self._check)
        self._token = _shared_token(world)
        kv = _own_store(world)
        self._notes, self._turn = Notes(kv, self._token, world), 0
        self._copy_notes = Notes(kv, f"{self._token}-copy", world)

    def save(self, engine: Engine, step: int, samples: int, extra: Mapping[str, Any]) -> None:
        """Starts writing step `step` (synchronously with `asynchronous: false`). Waits for the save before it.

        extra: JSON-able state that is the same on all ranks (reader, run id, statistics, configuration, …).
        """
        self.wait()
        tensors, pieces = snapshot(engine, self.rank, self._memory)
        facts = {
            "format": store.FORMAT, "step": step, "samples": samples, "adam_step": engine.state.adam_step,
            "layout": {"world": self.world, "ep": engine.layout.ep, "zero_stage": engine.layout.zero_stage}, **extra,
        }  # fmt: skip
        self._turn += 1
        job = threading.Thread(
            target=self._write, args=(step, self._turn, tensors, pieces, facts), name=f"save-{step}", daemon=True
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

    def _write(
        self, step: int, turn: int, tensors: dict[str, Tensor], pieces: list[list[Any]], facts: dict[str, Any]
    ) -> None:
        try:
            self._write_part(self.url, self._notes, step, turn, tensors, pieces)
            if self.rank == 0:
                self._withdraw_if_overtaken(step)
                self._commit(step, turn, facts)
        except Exception as error:
            log.warning("checkpoint of step %d: %s", step, error)
            self._error = error
            return
        if self.copies and self.config.copies(step):
            with _only_said(f"the copy of step {step}", self.copies):
                self._write_part(self.copies, self._copy_notes, step, turn, tensors, pieces)
                if self.rank == 0:
                    manifest = {**facts, **_index(self._copy_notes.gather(step, turn))}
                    self._check()
                    store.commit(self.copies, step, manifest)
                    self._clear(self.copies, step)

    def _write_part(
        self, url: str, notes: Notes, step: int, turn: int, tensors: dict[str, Tensor], pieces: list[list[Any]]
    ) -> None:
        """This rank's file, and its note to the first one, also where it fails."""
        folder, file = store.step_url(url, step), store.file_name(self.rank, self._token)
        try:
            storage.make_folder(folder)
            note = {"file": file, **write_tensors(storage.join(folder, file), tensors), "pieces": pieces}
        except Exception as error:
            notes.put(self.rank, step, turn, {"error": f"{type(error).__name__}: {error}"})
            raise
        notes.put(self.rank, step, turn, note)

    def _withdraw_if_overtaken(self, step: int) -> None:
        """A start that was frozen while it wrote its file leaves none in its successor's folder: the name is its own by its token.
        A storage that cannot be asked proves no successor: the file stays, as after any other failed save."""
        try:
            self._check()
        except Fenced:
            storage.remove(storage.join(store.step_url(self.url, step), store.file_name(self.rank, self._token)))
            raise

    def _commit(self, step: int, turn: int, facts: dict[str, Any]) -> None:
        manifest = {**facts, **_index(self._notes.gather(step, turn))}
        self.before_commit()
        final = store.commit(self.url, step, manifest, self._put)
        self.after_commit(final, step)
        self._clear(self.url, step)

    def _clear(self, url: str, step: int) -> None:
        """Removes older checkpoints, and what a start that was cut off has uploaded since."""
        # what an overtaken start takes for old may be what its successor stands on
        store.retain(url, self.config.keep_last, self.config.keep_every, self._check)
        store.clear_leftovers(url, before=step, check=self._check)


@contextlib.contextmanager
def _only_said(what: str, url: str) -> Iterator[None]:
    """The second place may be away, training goes on."""
    try:
        yield
    except Exception as error:
        log.warning("%s at %s failed, the run goes on: %s", what, url, " ".join(str(error).split()))


def snapshot(
    engine: Engine, rank: int, memory: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Host copies of what this rank answers for, and the pieces: [name, shape, start, size].

    memory: where copies of the same names are made, filled by the first call: touching fresh memory costs more than the copy.
    Pinned for a CUDA engine, so that all copies are under way at once.

    Kind by kind, and each in the order of the optimizer's flat memory: a rank of another layout, whose share of that memory is a
    range of it, then needs a range of the file.
    """
    tensors, pieces = {}, []
    sources: dict[str, Callable[[Any], Tensor]] = {
        "student": lambda piece: piece.of(piece.master.tensor.detach()),
        **{key: functools.partial(_moment, engine, key) for key in MOMENTS},
        "teacher": lambda piece: engine.teacher.of(piece),
    }
    owned = [piece for piece in engine.state.pieces if piece.owned[0] < piece.owned[1]]
    for piece in owned:
        a, b = piece.owned
        pieces.append([piece.name, list(piece.shape), piece.start + a, b - a])
    for kind, source in sources.items():
        for piece in owned:
            a, b = piece.owned
            name = f"{kind}/{piece.name}@{piece.start + a}"
            tensors[name] = _copied(source(piece)[a:b].detach(), memory, name)
    if rank == 0:
        for owner, module in (("student", engine.student), ("teacher", engine.teacher.module)):
            for name, buffer in _persistent_buffers(module).items():
                tensors[f"{owner}_buffer/{name}"] = buffer.detach().to("cpu", copy=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tensors, pieces


def _copied(part: Tensor, memory: dict[str, Tensor] | None, name: str) -> Tensor:
    """fp32 on the host; still on its way from a CUDA device into pinned memory."""
    if memory is None:
        return part.to("cpu", torch.float32, copy=True)
    held = memory.get(name)
    if held is None:
        held = memory[name] = torch.empty(part.shape, dtype=torch.float32, pin_memory=part.is_cuda)
    return held.copy_(part, non_blocking=True)


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
    files = {note["file"]: {k: v for k, v in note.items() if k not in ("file", "pieces")} for note in notes}
    return {"parameters": parameters, "files": files}


def _own_store(world: int) -> dist.Store:
    """A connection of its own to the job's key-value store: waiting on a shared one would block its other users."""
    if world == 1:
        return dist.HashStore()
    return dist.distributed_c10d._get_default_store().clone()


def _shared_token(world: int) -> str:
    """A name all ranks of this start share and no other start has."""
    import uuid

    box = [uuid.uuid4().hex[:8]]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _moment(engine: Engine, key: str, piece: Any) -> Tensor:
    return engine.state.moment(piece, key)
