"""Asks the box that owns a config what it resolves to. `cluster` imports nothing of ours, so it asks as a user would:
`python -m pipeline train CONFIG --dry-run --json`, whose last line holds the resolved tree and the model's figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cluster.errors import RunFailure, UsageError
from cluster.slurm.freeze import CODE

COMMANDS = {"train": ("pipeline", "train"), "build": ("data_prep", "build")}


def resolve(kind: str, config: str, overrides: Sequence[str], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Last JSON line of the dry run of `kind`; holds at least "resolved" and "fingerprint".

    Raises:
        UsageError: the config is refused, with the owner's own message. RunFailure: the dry run itself broke.
    """
    box, command = COMMANDS[kind]
    arguments = [sys.executable, "-m", box, command, config, *overrides, *extra, "--dry-run", "--json"]
    path = os.pathsep.join([str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = ("RANK", "WORLD_SIZE", "SLURM_PROCID")  # asked from inside a job, it is still one process
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        message = lines[-1].removeprefix(f"python -m {box} {command}: ").removeprefix("error: ")
        raise (UsageError if done.returncode == 2 else RunFailure)(message)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        raise RunFailure(f"`{' '.join(arguments[1:])}` printed no JSON line") from None
