"""Which checkpoints stand under a URL, which are whole, and how one is committed, replaced and removed. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.errors import RunFailure, UsageError

FORMAT = 1
MANIFEST, LATEST = "manifest.json", "LATEST"
SEAL = "digest"
"""Key of the manifest's own checksum: tensors have theirs in it, but step, position in the data and layout stand nowhere else."""
STEP = re.compile(r"step-(\d{8,})$")
_RANK = re.compile(r"rank-\d{5,}\.\w+\.safetensors$")

Write = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and manifest. `pieces`: logical name → [[start, size, file], …] by start."""

    url: str
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def samples(self) -> int:
        return int(self.manifest["samples"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}

    @property
    def buffers_file(self) -> str:
        """The file that holds the buffers: the first rank's."""
        return min(self.manifest["files"])

    def spans(self, name: str) -> list[tuple[int, int, str]]:
        """Pieces of one logical parameter: (start, size, file), ascending and gapless."""
        return [(int(a), int(n), str(f)) for a, n, f in self.manifest["parameters"][name]["pieces"]]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def open_checkpoint(url: str) -> Checkpoint:
    """The checkpoint in the folder `url`. Raises RunFailure where it is none or its manifest is not whole."""
    try:
        manifest = json.loads(storage.read_bytes(storage.join(url, MANIFEST)))
        seal = manifest.pop(SEAL, None)  # of a version that wrote none: nothing to compare
        if seal is not None and seal != _digest(manifest):
            raise ValueError("it is not as it was written")
        if manifest["format"] != FORMAT:
            raise RunFailure(f"{url}: checkpoint format {manifest['format']} is not the {FORMAT} this version reads")
        checkpoint = Checkpoint(url, manifest)
        _check_cover(checkpoint)
    except FileNotFoundError:
        raise RunFailure(f"{url}: no {MANIFEST}, so this checkpoint was never committed") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailure(f"{url}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from None
    return checkpoint


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written, with its digest."""
    tree = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader has it: lists, keys that are strings
    return json.dumps({**tree, SEAL: _digest(tree)}).encode()


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def committed(checkpoints_url: str) -> list[str]:
    """URLs of folders that claim to be committed, newest step first."""
    found = []
    for name in storage.list_names(checkpoints_url):
        match = STEP.match(name)
        if match and storage.exists(storage.join(checkpoints_url, name, MANIFEST)):
            found.append((int(match[1]), storage.join(checkpoints_url, name)))
    return [url for _, url in sorted(found, reverse=True)]


def resolve(url: str) -> str:
    """A checkpoint's folder from what a user names: the folder, `checkpoints/`, or a run directory (then the newest)."""
    for candidate in (url, storage.join(url, "checkpoints")):
        if storage.exists(storage.join(candidate, MANIFEST)) and STEP.match(storage.name(candidate)):
            return candidate
        found = committed(candidate)
        if found:
            return found[0]
    raise UsageError(
        f"{url}: no committed checkpoint here; give a run directory or a folder such as …/checkpoints/step-00000100"
    )


def check_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """What lies in the folder, with sizes: one listing. Raises RunFailure if a file of the checkpoint is missing or has another
    size (digests come with reading)."""
    found = storage.list_sizes(checkpoint.url)
    for name, entry in checkpoint.manifest["files"].items():
        if name not in found:
            raise RunFailure(f"{checkpoint.url}: {name} is missing")
        if found[name] != entry["bytes"]:
            raise RunFailure(f"{checkpoint.url}: {name} has {found[name]} bytes instead of {entry['bytes']}")
    return found


def copies_url(copy_to: str, run_url: str) -> str:
    """Where the second copies of a run's checkpoints lie; empty: nowhere. Raises UsageError where that is the run itself."""
    if not copy_to:
        return ""
    url = storage.join(copy_to, storage.name(run_url))
    if url.rstrip("/") == run_url.rstrip("/"):
        raise UsageError(f"checkpoint.copy_to={copy_to} is where run.dir lies: a second copy needs another place")
    return storage.join(url, "checkpoints")


def step_url(checkpoints_url: str, step: int) -> str:
    """The folder of a step: its files are written into it, and its manifest makes a checkpoint of them."""
    return storage.join(checkpoints_url, folder_name(step))


def commit(checkpoints_url: str, step: int, manifest: Mapping[str, Any], write: Write = storage.write_atomic) -> str:
    """Makes the written files a checkpoint: manifest, then LATEST, then what is none of it goes. Returns its URL.

    One object is replaced, and that is the commit: before it, a checkpoint that already stands under this step is whole; after
    it, the new one is. write: how (`Lease.write`: a writer that has been overtaken cannot).

    Raises RunFailure if a file is not there as the manifest says.
    """
    final = step_url(checkpoints_url, step)
    found = check_sizes(Checkpoint(final, manifest))
    write(storage.join(final, MANIFEST), _sealed(manifest))
    if storage.is_local(checkpoints_url):
        storage.fsync_folder(storage.local_path(checkpoints_url))  # the folder's own name
    write(storage.join(checkpoints_url, LATEST), f"{folder_name(step)}\n".encode())
    strays = [name for name in found if name != MANIFEST and name not in manifest["files"]]
    storage.remove_all([storage.join(final, name) for name in strays])
    return final


def remove(url: str) -> None:
    """Removes a checkpoint so that no reader sees a part of it as whole: the manifest first."""
    storage.remove(storage.join(url, MANIFEST))
    if storage.is_local(url):
        shutil.rmtree(storage.local_path(url), ignore_errors=True)
    else:
        storage.remove(url, recursive=True)


def file_name(rank: int, token: str) -> str:
    """A rank's file. It says which start wrote it: the folder may hold another start's checkpoint of the same step."""
    return f"rank-{rank:05d}.{token}.safetensors"


def clear_leftovers(
    checkpoints_url: str,
    before: int | None = None,
    write: Write = storage.write_atomic,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Removes what killed writers left: called by the first rank when a run starts (no rank writes yet), and after each
    commit with `before`, its step: saves of this start come one after another, so a step folder before that one without a
    manifest is no save under way. One listing.

    When a run starts, a predecessor that has been overtaken may still be about to commit. The files that it has written go; a
    manifest of its that lands later then names nothing. Beside a checkpoint of the same step it would replace that one: so this
    is written once more, with another version, and the late write fails (`Lease`).

    check: raises where another start has taken over, asked before anything goes: to an overtaken start what its successor is
    writing looks left over.
    """
    folders: dict[str, list[str]] = {}
    for path in storage.list_tree(checkpoints_url):
        folder, _, name = path.partition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        match, url = STEP.match(folder), storage.join(checkpoints_url, folder)
        if match and MANIFEST not in names and (before is None or int(match[1]) < before):
            check()
            if not storage.exists(storage.join(url, MANIFEST)):  # a listing may lag behind what was committed
                remove(url)
        elif match and before is None and len({name.split(".")[1] for name in names if _RANK.match(name)}) > 1:
            manifest = None
            with contextlib.suppress(RunFailure):  # not whole: told by those who read it
                manifest = dict(open_checkpoint(url).manifest)
            if manifest is not None:
                manifest["renewed"] = manifest.get("renewed", 0) + 1
                write(storage.join(url, MANIFEST), _sealed(manifest))
                strays = [name for name in names if name != MANIFEST and name not in manifest["files"]]
                check()
                storage.remove_all([storage.join(url, name) for name in strays])
        elif folder.startswith(".writing-") and before is None:  # of a version that renamed folders
            remove(url)


def retain(
    checkpoints_url: str, keep_last: int, keep_every: int, check: Callable[[], None] = lambda: None
) -> list[str]:
    """Removes all but the newest `keep_last` and every `keep_every`-th step; returns what it removed. check: as above."""
    removed = []
    for url in committed(checkpoints_url)[max(keep_last, 1) :]:
        step = int(storage.name(url).rpartition("-")[2])
        if not keep_every or step % keep_every:
            check()
            remove(url)
            removed.append(url)
    return removed


def _check_cover(checkpoint: Checkpoint) -> None:
    for name, shape in checkpoint.shapes.items():
        size, expected = 1, 0
        for n in shape:
            size *= n
        for start, count, file in checkpoint.spans(name):
            if start != expected or file not in checkpoint.manifest["files"]:
                raise RunFailure(f"{checkpoint.url}: {name} is not whole in the manifest (element {expected})")
            expected += count
        if expected != size:
            raise RunFailure(f"{checkpoint.url}: {name} holds {expected} of {size} elements")
