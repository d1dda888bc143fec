"""Freezes what a job will run: the code as it stands now, its revision and difference, the resolved configuration.

A job may wait for days and be requeued for weeks; without this it would run whatever the checkout holds at that moment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cluster.errors import RunFailure
from cluster.secrets import redacted

CODE = Path(__file__).resolve().parents[2]
"""Root of the code that is running: the folder that holds cluster/, data_prep/, model/, pipeline/."""

REVISION_FILE = "revision.json"
"""In a frozen copy: what `git` would say of it."""

BOXES = ("cluster", "data_prep", "model", "pipeline")


def new_folder(jobs_dir: str) -> Path:
    """Makes and returns the next free `NNN` under `jobs_dir`; two submissions at once get different ones."""
    try:
        os.makedirs(jobs_dir, exist_ok=True)
        for _ in range(1000):
            path = Path(next_folder(jobs_dir))
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise RunFailure(f"{jobs_dir}: {error.strerror or error}") from None
    raise RunFailure(f"{jobs_dir}: no free number for a new submission")


def next_folder(jobs_dir: str) -> str:
    """Path that `new_folder` would make; nothing is written."""
    taken = [int(name) for name in os.listdir(jobs_dir) if name.isdigit()] if os.path.isdir(jobs_dir) else []
    return os.path.join(jobs_dir, f"{max(taken, default=0) + 1:03d}")


def freeze_code(folder: Path) -> dict[str, Any]:
    """Copies the boxes' files into `folder/code`; `folder/code.diff` holds what differs from the revision in the result.

    Files that git ignores stay behind. Returns {"revision", "dirty", "untracked"}, which also stands in `folder/code/REVISION_FILE`
    for the job to tell; revision None without git.
    """
    inside = _git("rev-parse", "--show-prefix")
    is_checkout = inside is not None and inside.strip() == ""
    listed = _git("ls-files", "-coz", "--exclude-standard", "--", *BOXES) if is_checkout else None
    names = [name for name in listed.split("\0") if name] if listed else _walk()
    for name in names:
        source, target = CODE / name, folder / "code" / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    revision = (_git("rev-parse", "HEAD") or "").strip() if is_checkout else ""
    diff = (_git("diff", "--no-color", "HEAD") or "") if revision else ""
    (folder / "code.diff").write_text(redacted(diff))
    untracked = (_git("ls-files", "-oz", "--exclude-standard", "--", *BOXES) or "") if is_checkout else ""
    told = {"revision": revision or None, "dirty": bool(diff), "untracked": [n for n in untracked.split("\0") if n]}
    (folder / "code" / REVISION_FILE).write_text(json.dumps(told, indent=1) + "\n")
    return told


def write_config(folder: Path, resolved: dict[str, Any], digest: str) -> None:
    """`config.json` is what the job reads (JSON is YAML: no override is left to quote), `resolved.json` what people read."""
    (folder / "config.json").write_text(json.dumps(resolved, indent=1) + "\n")
    (folder / "resolved.json").write_text(json.dumps({"fingerprint": digest, "config": resolved}, indent=2) + "\n")


def _walk() -> list[str]:
    """Files of the boxes when there is no git to ask."""
    return [
        str(path.relative_to(CODE)) for box in BOXES for path in (CODE / box).rglob("*")
        if path.suffix in (".py", ".yaml", ".json", ".npz", ".txt", ".js", ".css", ".safetensors") and "__pycache__" not in path.parts
    ]  # fmt: skip


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(CODE), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
