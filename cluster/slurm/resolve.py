"""Asks the box that owns a config what it resolves to. `cluster` imports nothing of ours, so it asks as a user would:
`python -m pipeline train CONFIG --dry-run --json`, whose last line holds the resolved tree and the model's figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from cluster.errors import RunFailure, UsageError
from cluster.slurm.freeze import CODE

COMMANDS = {"train": ("pipeline", "train", "--dry-run"), "build": ("data_prep", "build", "--resolve")}


def resolve(kind: str, config: str, overrides: Sequence[str], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Last JSON line of the dry run of `kind`; holds at least "resolved" and "fingerprint".

    Raises:
        UsageError: the config is refused, with the owner's own message. RunFailure: the dry run itself broke.
    """
    box, command, option = COMMANDS[kind]
    arguments = ["-m", box, command, config, *overrides, *extra, option, "--json"]
    done = _ask(arguments, 300)
    if done.returncode:
        _refuse(done, f"python -m {box} {command}")
    return _last_json(done, arguments)


def run_layout(config: str, overrides: Sequence[str], extra: Sequence[str]) -> tuple[int, list[str]]:
    """Exit code (1: built and planned differ) and lines of `python -m pipeline layout … --json`, the last one JSON.

    Raises UsageError, RunFailure as `resolve` does.
    """
    arguments = ["-m", "pipeline", "layout", config, *overrides, *extra, "--json"]
    done = _ask(arguments, 3600)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        _refuse(done, "python -m pipeline layout")
    _last_json(done, arguments)
    return done.returncode, done.stdout.strip().splitlines()


def _ask(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = ("RANK", "WORLD_SIZE", "SLURM_PROCID")  # asked from inside a job, it is still one process
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)


def _refuse(done: subprocess.CompletedProcess[str], command: str) -> NoReturn:
    lines = done.stderr.strip().splitlines() or ["no message"]
    message = lines[-1].removeprefix(f"{command}: ").removeprefix("error: ")
    raise (UsageError if done.returncode == 2 else RunFailure)(message)


def _last_json(done: subprocess.CompletedProcess[str], arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        raise RunFailure(f"`{' '.join(arguments)}` printed no JSON line") from None
