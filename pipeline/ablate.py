"""The paper's ablations as overrides of one config: which runs to make, and how to start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster import storage
from cluster.config import load, to_dict
from cluster.errors import UsageError
from cluster.rundir import RunDir
from cluster.slurm.script import job_name, option, quote
from pipeline.config import PretrainConfig
from pipeline.tracking.mirror import read_record


@dataclass(frozen=True)
class Variant:
    """One run: its name (last part of its run directory) and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """about: what it asks; variants: each changes ONE key of the base run."""

    about: str
    variants: tuple[Variant, ...]


def _one(key: str, **named: object) -> tuple[Variant, ...]:
    return tuple(Variant(name, (f"{key}={json.dumps(value)}",)) for name, value in named.items())


# method.md section 5: what the paper varied (arXiv 2507.13812), and the switches of ours that do it
ABLATIONS: dict[str, Ablation] = {
    "experts": Ablation(
        "number of experts (paper: 4 / 8 / 16)", _one("model.moe.experts", experts_4=4, experts_8=8, experts_16=16)
    ),
    "placement": Ablation("experts in the last blocks or spread out", _one("model.moe.placement", spread="uniform")),
    "prompts": Ablation("modality prompt tokens", _one("model.prompts", no_prompts=0)),
    "attention": Ablation(
        "global attention in stages 3-4, or windows", _one("model.attention", window_attention="window")
    ),
    "qsacl": Ablation("query-based semantic aggregation", _one("objective.qsacl_weight", no_qsacl=0.0)),
    "ita": Ablation("dense image-text alignment", _one("objective.ita_weight", no_ita=0.0)),
    "unified": Ablation("one backbone for all modalities, or one each", _one("model.separate", separate=True)),
}


def plan(
    config: str, overrides: Sequence[str], names: Sequence[str], extra: Sequence[str]
) -> list[tuple[str, PretrainConfig]]:
    """(name, config) of the base run and of every variant that differs from it.

    extra: `key=value` variants of the user's own, one run each. Run directories lie under the config's `run.dir`.

    Raises:
        UsageError: an unknown ablation, or a variant the config refuses.
    """
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: known ones are {', '.join(ABLATIONS)}")
    base = load(PretrainConfig, config, overrides)
    variants = (
        [variant for name in (names or ABLATIONS) for variant in ABLATIONS[name].variants] if names or not extra else []
    )
    variants += [Variant(_folder(text), (text,)) for text in extra]
    runs = [("base", base)]
    for variant in variants:
        made = load(PretrainConfig, config, [*overrides, *variant.overrides])
        if made != base:  # the base has this value already
            runs.append((variant.name, made))
    if len(runs) == 1:
        raise UsageError("no variant differs from the base config; choose others with --only or --set key=value")
    return [
        (
            name,
            replace(
                made,
                run=replace(
                    made.run, dir=storage.join(base.run.dir, name), name=f"{storage.name(base.run.dir)}-{name}"
                ),
            ),
        )
        for name, made in runs
    ]


def write_configs(runs: Sequence[tuple[str, PretrainConfig]], root: str) -> list[str]:
    """Writes each run's full config as JSON (which is YAML) under `root/configs`; returns their URLs in order."""
    urls = []
    for name, config in runs:
        url = storage.join(root, "configs", f"{name}.json")
        storage.write_atomic(url, json.dumps(to_dict(config), indent=1).encode())
        urls.append(url)
    return urls


def is_finished(config: PretrainConfig) -> bool:
    """Whether the run stands complete in its directory, its last checkpoint too: it is not made again."""
    rundir = RunDir(config.run.dir)
    resolved = rundir.read_resolved()
    if resolved is None or resolved["config"] != to_dict(config) or rundir.last_step() != config.train.steps:
        return False
    return read_record(rundir)["status"] == "FINISHED"  # the last line is written before the last checkpoint is


def train_one(config_path: str, processes: int | None) -> int:
    """Runs `pipeline train` on a written config in a process of its own; returns its exit code."""
    command = [sys.executable, "-m", "pipeline", "train", config_path]
    return subprocess.run([*command, "--processes", str(processes)] if processes else command, check=False).returncode


ARRAY_BODY = """
cd -- "$WORK_DIR" || exit 1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
exec "$PYTHON" -m pipeline ablate "${ARGUMENTS[@]}" --task "$SLURM_ARRAY_TASK_ID" --tasks "$TASKS"
"""


def array_script(arguments: Sequence[str], tasks: int, name: str) -> str:
    """A batch script of a job array with one run per task. A requeued task continues its run from its last checkpoint.

    arguments: what follows `pipeline ablate`; resources are left to sbatch's command line.
    """
    settings = {"job-name": job_name(f"geoloom-ablate-{name}"), "array": f"0-{tasks - 1}", "nodes": "1", "ntasks": "1",
                "open-mode": "append", "requeue": None}  # fmt: skip
    head = ["#!/bin/bash", *(option(key, value) for key, value in settings.items()), ""]
    head += [f"WORK_DIR={quote(os.getcwd())}", f"PYTHON={quote(sys.executable)}", f"TASKS={tasks}"]
    return "\n".join([*head, f"ARGUMENTS=({' '.join(quote(word) for word in arguments)})"]) + "\n" + ARRAY_BODY


def _folder(override: str) -> str:
    key, _, value = override.partition("=")
    text = f"{key.rsplit('.', 1)[-1]}_{value}"
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)[:60]
