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
    """Raises RunFailure if a file of the checkpoint is missing or has another size (a cheap look; digests come with reading)."""
    for name, entry in checkpoint.manifest["files"].items():
        try:
            size = storage.size(storage.join(checkpoint.url, name))
        except FileNotFoundError:
            raise RunFailure(f"{checkpoint.url}: {name} is missing") from None
        if size != entry["bytes"]:
            raise RunFailure(f"{checkpoint.url}: {name} has {size} bytes instead of {entry['bytes']}")


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
    """Removes what lies in a committed checkpoint's folder and is none of it: notes, files of an older attempt."""
    for name in storage.list_names(url):
        if name != MANIFEST and name not in manifest["files"]:
            storage.remove(storage.join(url, name))


def remove(url: str) -> None:
    """Removes a checkpoint so that no reader sees a part of it as whole: the manifest first."""
    storage.remove(storage.join(url, MANIFEST))
    if storage.is_local(url):
        shutil.rmtree(storage.local_path(url), ignore_errors=True)
    else:
        storage.remove(url, recursive=True)


def clear_leftovers(checkpoints_url: str) -> None:
    """Removes what killed writers left. Called once by the first rank when a run starts."""
    for name in storage.list_names(checkpoints_url):
        if name.startswith(".writing-"):
            with contextlib.suppress(OSError):
                shutil.rmtree(storage.local_path(storage.join(checkpoints_url, name)))


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
