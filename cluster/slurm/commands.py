"""The one door to SLURM's programs: sbatch, scontrol, squeue, sacct, with their failures as one clear line."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from cluster.errors import RunFailure

TIMEOUT_S = 60.0


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
        raise RunFailure(f"{program}: the SLURM controller gave no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        raise RunFailure(f"{program}: {explain(done.stderr or done.stdout)}")
    return done.stdout


def explain(stderr: str) -> str:
    """SLURM's messages as one line, without the repeated `sbatch: error:`; the controller's absence said plainly."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    text = "; ".join(dict.fromkeys(lines)) or "failed without a message"
    if re.search(
        r"[Uu]nable to contact slurm controller|connect failure|configuration source|Connection refused", text
    ):
        return f"the SLURM controller cannot be reached ({text})"
    return text


def job_fields(job: str) -> dict[str, str]:
    """`scontrol show job` of one job as key → value, `JobState`, `NodeList`, `Restarts`, `Command`, `Reason` and so on.

    Only the last line of a value that holds a line break would be read; ours hold none. Empty if SLURM no longer knows it.
    """
    try:
        text = call(["scontrol", "show", "job", job])
    except RunFailure as failure:
        if "Invalid job id" in str(failure):
            return {}
        raise
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        line = line.strip()
        if re.match(r"(Command|WorkDir|StdErr|StdIn|StdOut|Comment)=", line):  # values that may hold spaces stand alone
            key, _, value = line.partition("=")
            fields[key] = value
        else:
            fields.update(word.partition("=")[::2] for word in line.split(" ") if "=" in word)
    return fields
