"""The one door to SLURM's programs: sbatch, scontrol, squeue, sacct, with their failures as one clear line."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from cluster.errors import RunFailure

TIMEOUT_S = 60.0


AWAY = "the SLURM controller cannot be reached"


class ControllerAway(RunFailure):
    """slurmctld gave no answer: nothing is known, and asking later may help."""


def call(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> str:
    """stdout of a SLURM program.

    Raises:
        RunFailure: the program is not on PATH, the controller does not answer, or it refuses (with its own reason).
    """
    program = command[0]
    if shutil.which(program) is None:
        raise RunFailure(f"{program} is not on PATH: this needs a SLURM login node (submit --dry-run works anywhere)")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ControllerAway(f"{program}: the SLURM controller gave no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        text = explain(done.stderr or done.stdout)
        raise (ControllerAway if text.startswith(AWAY) else RunFailure)(f"{program}: {text}")
    return done.stdout


def call_patiently(command: Sequence[str], patience_s: float, say: Callable[[str], None] = print) -> str:
    """`call`, again and again while the controller is away (restarted, failed over, overloaded), for up to `patience_s`.

    Raises:
        RunFailure: still away then, or SLURM answered and refuses.
    """
    until, wait_s = time.monotonic() + patience_s, 1.0
    while True:
        try:
            return call(command)
        except ControllerAway as away:
            if time.monotonic() + wait_s > until:
                raise
            say(f"{away}; asking again in {wait_s:.0f} s")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 30.0)


def explain(stderr: str) -> str:
    """SLURM's messages as one line, without the repeated `sbatch: error:`; the controller's absence said plainly."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    text = "; ".join(dict.fromkeys(lines)) or "failed without a message"
    if re.search(
        r"[Uu]nable to contact slurm controller|connect failure|configuration source|Connection refused|timed out|Zero Bytes",
        text,
    ):
        return f"{AWAY} ({text})"
    return text


def job_fields(job: str, patience_s: float = 0.0) -> dict[str, str]:
    """`scontrol show job` of one job as key → value, `JobState`, `NodeList`, `Restarts`, `Command`, `Reason` and so on.

    Only the last line of a value that holds a line break would be read; ours hold none. Empty if SLURM no longer knows it. Of an
    array the first record; `job_records` has all. patience_s: how long to wait for a controller that is away.
    """
    return next(iter(job_records(job, patience_s)), {})


def job_records(job: str, patience_s: float = 0.0) -> list[dict[str, str]]:
    """`job_fields` of every record that SLURM has of a job: one, or one per array task (or group of waiting tasks)."""
    try:
        text = call_patiently(["scontrol", "show", "job", job], patience_s)
    except RunFailure as failure:
        if "Invalid job id" in str(failure):
            return []
        raise
    return [fields for block in text.split("\n\n") if (fields := _fields(block))]


def _fields(block: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in block.splitlines():
        line = line.strip()
        if re.match(r"(Command|WorkDir|StdErr|StdIn|StdOut|Comment)=", line):  # values that may hold spaces stand alone
            key, _, value = line.partition("=")
            fields[key] = value
        else:
            fields.update(word.partition("=")[::2] for word in line.split(" ") if "=" in word)
    return fields
