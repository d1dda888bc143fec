"""Loading: any layout reads what any other wrote, element by element, and nothing is touched before everything is verified.

A rank reads the parts that hold its own pieces and nothing else (`pipeline.checkpoint.plan`): from object storage by ranges, into
sparse files of a temporary folder. Every block it uses is checked against the checksums in the file's header, and the header
against the manifest; a file that is read whole is checked by its digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from cluster import storage
from cluster.errors import RunFailure, UsageError
from pipeline.checkpoint import plan, store
from pipeline.checkpoint.plan import Part
from pipeline.checkpoint.store import Checkpoint
from pipeline.checkpoint.tensors import Header, TensorFile, file_digest
from pipeline.parallel.zero import MOMENTS

KINDS = ("student", *MOMENTS, "teacher")
READERS = 8  # requests under way at once


class Files:
    """Verified tensor files of a checkpoint on this machine, or the parts of them that were asked for.

    wanted: per file the parts that are needed; None for a file that is needed whole.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Mapping[str, list[Part] | None], folder: str) -> None:
        self._checkpoint = checkpoint
        with ThreadPoolExecutor(min(READERS, max(len(wanted), 1))) as pool:
            opened = pool.map(lambda item: _open(checkpoint, item[0], item[1], folder), sorted(wanted.items()))
            self._open = dict(zip(sorted(wanted), opened))

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements [start, start + size) of a flattened logical tensor, put together from the pieces that hold them."""
        out = torch.empty(size, dtype=torch.float32)
        for first, count, file in plan.overlapping(self._checkpoint.spans(name), start, size):
            a, b = max(start - first, 0), min(start + size - first, count)
            at = first + a - start
            out[at : at + b - a] = self._open[file].read(f"{kind}/{name}@{first}", a, b)
        return out

    def buffers(self, owner: str) -> dict[str, Tensor]:
        """Buffers of the student or the teacher, from the files that are open whole."""
        prefix = f"{owner}_buffer/"
        return {
            name.removeprefix(prefix): file.read(name)
            for file in self._open.values() for name in file.names() if name.startswith(prefix)
        }  # fmt: skip


@contextlib.contextmanager
def open_files(checkpoint: Checkpoint, wanted: Mapping[str, list[Part] | None] | None = None) -> Iterator[Files]:
    """Files of a checkpoint (all, or the parts asked for), checked. Raises RunFailure naming a bad one."""
    folder = tempfile.mkdtemp(prefix="geoloom-checkpoint-")
    try:
        yield Files(checkpoint, dict.fromkeys(checkpoint.manifest["files"]) if wanted is None else wanted, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wanted_parts(checkpoint: Checkpoint, pieces: Sequence[Any], buffers: bool) -> dict[str, list[Part] | None]:
    """What a rank with these pieces reads of each file. buffers: also the file that holds the buffers."""
    spans = {name: checkpoint.spans(name) for name in {piece.name for piece in pieces}}
    needs = [(piece.name, piece.start, piece.size) for piece in pieces]
    found: dict[str, list[Part] | None] = {}
    for file, parts in plan.reads(spans, needs).items():
        wanted_bytes = sum(b - a for _, _, a, b in parts) * 4 * len(KINDS)
        most = wanted_bytes >= plan.WHOLE_SHARE * checkpoint.manifest["files"][file]["bytes"]
        remote = not storage.is_local(checkpoint.url)
        found[file] = None if remote and most else parts
    if buffers:
        found[checkpoint.buffers_file] = None
    return found


@torch.no_grad()
def restore(engine: Any, checkpoint: Checkpoint, files: Files) -> None:
    """Puts a checkpoint into an engine of whatever layout: masters, moments, step count, teacher."""
    for piece in engine.state.pieces:
        targets = {"student": piece.of(piece.master.tensor), "teacher": engine.teacher.of(piece)}
        targets.update({key: engine.state.moment(piece, key) for key in MOMENTS})
        for kind, target in targets.items():
            target.copy_(files.read(kind, piece.name, piece.start, piece.size))
    engine.state.set_adam_step(int(checkpoint.manifest["adam_step"]))
    engine.state.publish()
    engine.teacher.publish()


@torch.no_grad()
def restore_buffers(engine: Any, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """found: per owner (student, teacher) its buffers by name, as `Files.buffers` has them."""
    for owner, module in (("student", engine.student), ("teacher", engine.teacher.module)):
        buffers = dict(module.named_buffers())
        for name, value in found[owner].items():
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


def _open(checkpoint: Checkpoint, name: str, parts: list[Part] | None, folder: str) -> TensorFile:
    """A file, or the parts of it that are needed, verified. Raises RunFailure."""
    url, entry = storage.join(checkpoint.url, name), checkpoint.manifest["files"][name]
    try:
        if parts is not None and "header_bytes" in entry:
            return _open_parts(url, entry, parts, os.path.join(folder, name))
        return TensorFile(_whole(url, entry, os.path.join(folder, name)))
    except OSError as error:
        raise RunFailure(f"{url} cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailure(f"{url} is damaged ({type(error).__name__}: {error})") from None


def _whole(url: str, entry: Mapping[str, Any], target: str) -> str:
    """Path of a whole file on this machine, checked by its digest."""
    if storage.is_local(url):
        target = storage.local_path(url)
    else:
        with storage.open_read(url) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 16 << 20)
    if file_digest(target) != entry["sha256"]:
        raise RunFailure(f"{url} is damaged: its sha256 is not the manifest's")
    return target


def _open_parts(url: str, entry: Mapping[str, Any], parts: list[Part], target: str) -> TensorFile:
    local = storage.is_local(url)
    if local:
        target = storage.local_path(url)
        with open(target, "rb") as file:
            head = file.read(entry["header_bytes"])
    else:
        head = storage.read_bytes(url, 0, entry["header_bytes"])
    if hashlib.sha256(head).hexdigest() != entry["header_sha256"]:
        raise RunFailure(f"{url} is damaged: its header is not the manifest's")
    header = Header.parse(head)
    elements = [(f"{kind}/{name}@{first}", a, b) for name, first, a, b in parts for kind in KINDS]
    spans = [header.span(*part) for part in elements]
    if not local:
        _fetch(url, head, plan.runs(spans, plan.GAP_BYTES), entry["bytes"], target)
    found = TensorFile(target)
    raw = found.data.view()
    raw.flags.writeable = False
    for (name, a, b), (_low, high) in zip(elements, spans):
        if high > len(raw) or not header.proves(raw, name, a, b):
            raise RunFailure(f"{url} is damaged: {name} does not match its checksum")
    return found


def _fetch(url: str, head: bytes, wanted: Sequence[tuple[int, int]], size: int, target: str) -> None:
    """The header and some ranges of an object, in a sparse file of the same size."""
    with open(target, "wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), head, 0)
        for a, b in wanted:
            data = storage.read_bytes(url, a, b)
            if len(data) != b - a:
                raise RunFailure(f"{url} ends before byte {b}")
            os.pwrite(file.fileno(), data, a)
