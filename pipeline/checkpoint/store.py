"""Which checkpoints stand under a URL, which are whole, and how one is committed, replaced and removed. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster import storage
from cluster.errors import RunFailure, UsageError

FORMAT = 1
MANIFEST, LATEST = "manifest.json", "LATEST"
STEP = re.compile(r"step-(\d{8,})$")


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
        if manifest["format"] != FORMAT:
            raise RunFailure(f"{url}: checkpoint format {manifest['format']} is not the {FORMAT} this version reads")
        checkpoint = Checkpoint(url, manifest)
        _check_cover(checkpoint)
    except FileNotFoundError:
        raise RunFailure(f"{url}: no {MANIFEST}, so this checkpoint was never committed") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailure(f"{url}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from None
    return checkpoint


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


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raises RunFailure if a file of the checkpoint is missing or has another size: one listing (digests come with reading)."""
    found = storage.list_sizes(checkpoint.url)
    for name, entry in checkpoint.manifest["files"].items():
        if name not in found:
            raise RunFailure(f"{checkpoint.url}: {name} is missing")
        if found[name] != entry["bytes"]:
            raise RunFailure(f"{checkpoint.url}: {name} has {found[name]} bytes instead of {entry['bytes']}")


def work_url(checkpoints_url: str, step: int, token: str) -> str:
    """Where a checkpoint is written before it is one."""
    if storage.is_local(checkpoints_url):
        return storage.join(checkpoints_url, f".writing-{folder_name(step)}-{token}")
    return storage.join(checkpoints_url, folder_name(step))


def commit(checkpoints_url: str, step: int, token: str, manifest: Mapping[str, Any]) -> str:
    """Makes the written files a checkpoint: manifest, final name, then LATEST. Returns its URL."""
    work, final = work_url(checkpoints_url, step, token), storage.join(checkpoints_url, folder_name(step))
    storage.write_atomic(storage.join(work, MANIFEST), json.dumps(manifest, allow_nan=False).encode())
    if work != final:
        remove(final)
        os.rename(storage.local_path(work), storage.local_path(final))
    storage.write_atomic(storage.join(checkpoints_url, LATEST), f"{folder_name(step)}\n".encode())
    return final


def tidy(url: str, manifest: Mapping[str, Any]) -> None:
    """Removes what lies in a committed checkpoint's folder and is none of it: files of an older attempt."""
    strays = [name for name in storage.list_names(url) if name != MANIFEST and name not in manifest["files"]]
    storage.remove_all([storage.join(url, name) for name in strays])


def remove(url: str) -> None:
    """Removes a checkpoint so that no reader sees a part of it as whole: the manifest first."""
    storage.remove(storage.join(url, MANIFEST))
    if storage.is_local(url):
        shutil.rmtree(storage.local_path(url), ignore_errors=True)
    else:
        storage.remove(url, recursive=True)


def file_name(checkpoints_url: str, rank: int, token: str) -> str:
    """A rank's file. On an object store it says which start wrote it: the folder is the final one, and a start that was cut off
    may write there, too."""
    suffix = "" if storage.is_local(checkpoints_url) else f".{token}"
    return f"rank-{rank:05d}{suffix}.safetensors"


def clear_leftovers(checkpoints_url: str, before: int | None = None) -> None:
    """Removes what killed writers left: called by the first rank when a run starts (no rank writes yet), and after each
    commit with `before`, its step: saves of this start come one after another, so a step folder before that one without a
    manifest is no save under way.

    Locally that is what lies under temporary names. On an object store nothing can be renamed, so it is every step folder
    without a manifest, whatever its step: the same rule, and one listing.
    """
    if storage.is_local(checkpoints_url):
        for name in storage.list_names(checkpoints_url) if before is None else ():
            if name.startswith(".writing-"):
                with contextlib.suppress(OSError):
                    shutil.rmtree(storage.local_path(storage.join(checkpoints_url, name)))
        return
    folders: dict[str, list[str]] = {}
    for path in storage.list_tree(checkpoints_url):
        folder, _, name = path.partition("/")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        match = STEP.match(folder)
        if match and MANIFEST not in names and (before is None or int(match[1]) < before):
            storage.remove_all([storage.join(checkpoints_url, folder, name) for name in names])


def retain(checkpoints_url: str, keep_last: int, keep_every: int) -> list[str]:
    """Removes all but the newest `keep_last` and every `keep_every`-th step; returns what it removed."""
    removed = []
    for url in committed(checkpoints_url)[max(keep_last, 1) :]:
        step = int(storage.name(url).rpartition("-")[2])
        if not keep_every or step % keep_every:
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
