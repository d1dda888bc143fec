"""Loading: any layout reads what any other wrote, element by element, and nothing is touched before everything is verified."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cluster import storage
from cluster.errors import RunFailure, UsageError
from pipeline.checkpoint import store
from pipeline.checkpoint.store import Checkpoint
from pipeline.checkpoint.tensors import TensorFile, file_digest
from pipeline.parallel.zero import MOMENTS

KINDS = ("student", *MOMENTS, "teacher")


class Files:
    """Verified tensor files of a checkpoint on this machine; remote ones are fetched into a temporary folder."""

    def __init__(self, checkpoint: Checkpoint, names: set[str], folder: str) -> None:
        self._checkpoint, self._open = checkpoint, {}
        for name in sorted(names):
            self._open[name] = TensorFile(_verified(checkpoint, name, folder))

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements [start, start + size) of a flattened logical tensor, put together from the pieces that hold them."""
        spans = self._checkpoint.spans(name)
        out = torch.empty(size, dtype=torch.float32)
        index = bisect_right([span[0] for span in spans], start) - 1
        done = 0
        while done < size:
            first, count, file = spans[index]
            a = start + done - first
            b = min(count, a + size - done)
            out[done : done + b - a] = self._open[file].read(f"{kind}/{name}@{first}", a, b)
            done, index = done + b - a, index + 1
        return out

    def buffers(self, owner: str) -> dict[str, Tensor]:
        prefix = f"{owner}_buffer/"
        return {
            name.removeprefix(prefix): file.read(name)
            for file in self._open.values() for name in file.names() if name.startswith(prefix)
        }  # fmt: skip


@contextlib.contextmanager
def open_files(checkpoint: Checkpoint, names: set[str] | None = None) -> Iterator[Files]:
    """Files of a checkpoint (all, or those named), checked against the manifest. Raises RunFailure naming a bad one."""
    folder = tempfile.mkdtemp(prefix="geoloom-checkpoint-")
    try:
        yield Files(checkpoint, set(checkpoint.manifest["files"]) if names is None else names, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def needed_files(checkpoint: Checkpoint, engine: Any) -> set[str]:
    """Files that hold anything this rank loads; the first file too, for the buffers."""
    names = {next(iter(sorted(checkpoint.manifest["files"])))}
    for piece in engine.state.pieces:
        for first, count, file in checkpoint.spans(piece.name):
            if first < piece.start + piece.size and first + count > piece.start:
                names.add(file)
    return names


@torch.no_grad()
def restore(engine: Any, checkpoint: Checkpoint, files: Files) -> None:
    """Puts a checkpoint into an engine of whatever layout: masters, moments, step count, teacher, buffers."""
    for piece in engine.state.pieces:
        targets = {"student": piece.of(piece.master.tensor), "teacher": engine.teacher.of(piece)}
        targets.update({key: engine.state.moment(piece, key) for key in MOMENTS})
        for kind, target in targets.items():
            target.copy_(files.read(kind, piece.name, piece.start, piece.size))
    engine.state.set_adam_step(int(checkpoint.manifest["adam_step"]))
    engine.state.publish()
    engine.teacher.publish()
    for owner, module in (("student", engine.student), ("teacher", engine.teacher.module)):
        buffers = dict(module.named_buffers())
        for name, value in files.buffers(owner).items():
            buffers[name].copy_(value)


def check_fits(checkpoint: Checkpoint, engine: Any) -> None:
    """Raises UsageError if the model has parameters the checkpoint has not, or of another shape, or the other way round."""
    saved = checkpoint.shapes
    ours = dict(engine.logical_shapes)
    for name in sorted(set(saved) ^ set(ours)):
        where = "is in the checkpoint but not in this model" if name in saved else "is not in the checkpoint"
        raise UsageError(f"{checkpoint.url}: {name} {where}; model and objective settings must be those of the run")
    for name, shape in ours.items():
        if saved[name] != shape:
            raise UsageError(
                f"{checkpoint.url}: {name} has shape {list(saved[name])} there and {list(shape)} in this model"
            )


def consolidated(url: str, owner: str = "teacher") -> tuple[dict[str, Tensor], Checkpoint]:
    """All weights of the student or the teacher as whole fp32 tensors under their one-process names, buffers included.

    Needs no process group and no DeepSpeed. url: a checkpoint folder, or a run directory (its newest checkpoint).
    """
    checkpoint = store.open_checkpoint(store.resolve(url))
    with open_files(checkpoint) as files:
        weights = {}
        for name, shape in checkpoint.shapes.items():
            size = torch.Size(shape).numel()
            weights[name] = files.read(owner, name, 0, size).reshape(shape)
        weights.update(files.buffers(owner))
    return weights, checkpoint


def _verified(checkpoint: Checkpoint, name: str, folder: str) -> str:
    url = storage.join(checkpoint.url, name)
    try:
        if storage.is_local(url):
            path = storage.local_path(url)
        else:
            path = os.path.join(folder, name)
            with storage.open_read(url) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 16 << 20)
        digest = file_digest(path)
    except OSError as error:
        raise RunFailure(f"{url} cannot be read: {error}") from None
    if digest != checkpoint.manifest["files"][name]["sha256"]:
        raise RunFailure(f"{url} is damaged: its sha256 is not the manifest's")
    return path
