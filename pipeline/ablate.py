"""An ablation: which runs to make of one config, in which order, within which budget, and how to start them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import storage
from cluster.config import fingerprint, from_dict, load, to_dict
from cluster.errors import UsageError
from cluster.rundir import RunDir
from cluster.slurm.arguments import refuse_secrets
from cluster.slurm.array import ArrayTask
from cluster.slurm.submit import absolute_url
from pipeline.config import PretrainConfig
from pipeline.launch import FORWARDED
from pipeline.tracking.facts import RunFacts
from pipeline.tracking.mirror import read_record
from pipeline.variants import BASE, Variant, choose, grid, read_list, single


@dataclass(frozen=True)
class PlannedRun:
    """One setting with one seed."""

    variant: str
    config: PretrainConfig

    @property
    def name(self) -> str:
        return f"{self.variant}/seed-{self.config.train.seed}"


@dataclass(frozen=True)
class Plan:
    """root: folder of all runs; runs: seed by seed, so that what is finished early is a whole round; references: by variant the one it
    is held against; claims: what is asked of a variant; left_out: variants that are what the base is anyway."""

    root: str
    runs: tuple[PlannedRun, ...]
    references: dict[str, str] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def plan(
    config: str,
    overrides: Sequence[str],
    names: Sequence[str] = (),
    extra: Sequence[str] = (),
    variants: str | None = None,
    seeds: int = 1,
) -> Plan:
    """The base and every variant that differs from it, each with `seeds` seeds from the config's own on.

    overrides: of every run; one with several values (`KEY=V1,V2`) spans a grid. names: of the list, see `variants.choose`. extra:
    `key=value` variants of the user's own, one each. variants: a list of named ones; `claims` where nothing else is asked for. Runs
    lie at `run.dir/VARIANT/seed-S`.

    Raises:
        UsageError: an unknown list or name, or a variant the config refuses.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1")
    fixed, wanted = grid(overrides)
    if variants or names or not (extra or wanted):
        listed = read_list(variants or "claims")
        fixed = [*listed.base, *fixed]
        wanted += choose(listed.variants, names)
    wanted += [single(text) for text in extra]
    twice = [variant.name for i, variant in enumerate(wanted) if variant.name in {other.name for other in wanted[:i]}]
    if twice:
        raise UsageError(
            f"two variants are called {twice[0]}; give one of them in a list of your own (--variants FILE)"
        )
    base = load(PretrainConfig, config, fixed)
    settings, left_out = {BASE: base}, []
    for variant in wanted:
        made = load(PretrainConfig, config, [*fixed, *variant.overrides])
        if made.train.seed != base.train.seed:
            raise UsageError(f"{variant.name} changes train.seed: that is what --seeds N does, for every setting alike")
        if _in_effect(made) == _in_effect(base):
            left_out.append(variant.name)
        else:
            settings[variant.name] = made
    if len(settings) == 1 and seeds == 1:
        raise UsageError(
            "no variant differs from the base config; choose others with --variants, --only or --set key=value"
        )
    kept: list[Variant] = [variant for variant in wanted if variant.name in settings]
    return Plan(
        base.run.dir,
        tuple(_placed(name, made, base, seed) for seed in range(seeds) for name, made in settings.items()),
        {variant.name: variant.against if variant.against in settings else BASE for variant in kept},
        {variant.name: variant.claim for variant in kept if variant.claim},
        tuple(left_out),
    )


def _placed(name: str, made: PretrainConfig, base: PretrainConfig, more: int) -> PlannedRun:
    seed = base.train.seed + more
    run = replace(
        made.run,
        dir=storage.join(base.run.dir, name, f"seed-{seed}"),
        name=f"{storage.name(base.run.dir)}-{name}-seed-{seed}",
    )
    return PlannedRun(name, replace(made, run=run, train=replace(made.train, seed=seed)))


def _in_effect(config: PretrainConfig) -> PretrainConfig:
    """Without the embeddings of class names the alignment term is off, whatever its weight."""
    if config.objective.ita_embeddings is not None:
        return config
    return replace(config, objective=replace(config.objective, ita_weight=0.0))


def plan_tree(planned: Plan) -> dict[str, Any]:
    """The plan as plain JSON types, every config whole: what a job reads that compares the runs later."""
    runs = [{"variant": run.variant, "config": to_dict(run.config)} for run in planned.runs]
    rest = {"root": planned.root, "references": planned.references, "claims": planned.claims}
    return {**rest, "left_out": list(planned.left_out), "runs": runs}


def read_plan(url: str) -> Plan:
    """What `plan_tree` has kept as a file. Raises UsageError for one that is none."""
    try:
        tree = json.loads(storage.read_bytes(url))
        runs = tuple(PlannedRun(run["variant"], from_dict(PretrainConfig, run["config"], url)) for run in tree["runs"])
        return Plan(tree["root"], runs, tree["references"], tree["claims"], tuple(tree["left_out"]))
    except FileNotFoundError:
        raise UsageError(f"{url}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{url} is no plan of an ablation: {error!r}") from None


def array_tasks(planned: Plan) -> list[ArrayTask]:
    """One task of a job array per run. Raises UsageError for a run directory that no other process can see, or a secret."""
    tasks = []
    for run in planned.runs:
        resolved = to_dict(run.config)
        refuse_secrets(resolved)
        tasks.append(ArrayTask(run.name, absolute_url(run.config.run.dir), resolved, fingerprint(run.config)))
    return tasks


def write_configs(planned: Plan) -> list[str]:
    """Writes each run's full config as JSON (which is YAML) under `root/configs`; returns their URLs in order."""
    urls = []
    for run in planned.runs:
        url = storage.join(planned.root, "configs", f"{run.name.replace('/', '-')}.json")
        storage.write_atomic(url, json.dumps(to_dict(run.config), indent=1).encode())
        urls.append(url)
    return urls


def is_finished(config: PretrainConfig) -> bool:
    """Whether the run stands complete in its directory, its last checkpoint too: it is not made again."""
    rundir = RunDir(config.run.dir)
    resolved = rundir.read_resolved()
    if resolved is None or resolved["config"] != to_dict(config) or rundir.last_step() != config.train.steps:
        return False
    return read_record(rundir)["status"] == "FINISHED"  # the last line is written before the last checkpoint is


@dataclass(frozen=True)
class Budget:
    """A limit on all runs together, in samples or in hours of training (of the job, not of each GPU)."""

    limit: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`200000` or `200000samples`, `4h` or `1.5h`."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?) *(h|hours|samples)?", text.strip())
        if not found or float(found[1]) <= 0:
            raise UsageError(f"--budget {text}: samples such as 200000, or hours such as 4h")
        return cls(float(found[1]), "h" if (found[2] or "").startswith("h") else "samples")

    def allows(self, runs: Sequence[PlannedRun], new: PlannedRun) -> bool:
        """Whether `new` can be brought to its end within what the runs have not used yet. Hours are told by what the runs took per
        sample so far; before the first one nothing is known, and it is started."""
        used = {run.name: _used(run.config) for run in runs}
        samples, hours = (sum(values) for values in zip(*used.values()))
        still = new.config.train.steps * new.config.train.batch - used[new.name][0]
        if self.unit == "samples":
            return samples + still <= self.limit
        return hours + (still * hours / samples if samples else 0.0) <= self.limit


def hours_left(runs: Sequence[PlannedRun]) -> float | None:
    """Hours until all of them are trained, at the pace of those that began; None before the first."""
    used = [_used(run.config) for run in runs]
    samples, hours = (sum(values) for values in zip(*used))
    still = sum(run.config.train.steps * run.config.train.batch for run in runs) - samples
    return still * hours / samples if samples and hours else None


def _used(config: PretrainConfig) -> tuple[int, float]:
    """(samples, hours of training) that a run has seen so far."""
    rundir = RunDir(config.run.dir)
    lines = rundir.read_metrics()
    if not lines:
        return 0, 0.0
    world = RunFacts.from_dict(read_record(rundir)["facts"]).world
    return int(lines[-1].get("samples", 0)), float(lines[-1].get("gpu_hours") or 0.0) / max(world, 1)


def train_one(config_path: str, processes: int | None) -> int:
    """Runs `pipeline train` on a written config in a process of its own; returns its exit code. Signals are passed on to it; it dies
    with this process, even by SIGKILL, so that the next start finds nobody in the run directory."""
    command = [sys.executable, "-m", "pipeline", "train", config_path]
    words = [*command, "--processes", str(processes)] if processes else command
    child = subprocess.Popen(words, env={**os.environ, "GEOLOOM_LAUNCHER": str(os.getpid())}, start_new_session=True)
    previous = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in FORWARDED}
    try:
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
