"""Sends a training run or a shard build to SLURM: one task per GPU, checkpoints and requeues itself when preempted.

examples:
  python -m cluster submit train pipeline/runs/skysense_v2.yaml run.dir=/fs/runs/a --nodes 16 --gpus-per-node 8 \\
      --partition gpu --time 24:00:00 --account eo --sbatch mail-type=END
  python -m cluster submit train pipeline/runs/tiny.yaml --nodes 2 --tasks-per-node 1 --dry-run
  python -m cluster submit build data_prep/runs/s3.yaml --tasks 64 --partition cpu --time 4:00:00

A submission is kept under RUN/jobs/NNN: the script, the resolved config, a copy of the code, its revision and diff.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli import print_json, private_files
from cluster.config import flatten
from cluster.errors import UsageError
from cluster.secrets import MASK, redact
from cluster.slurm import script, submit
from cluster.slurm.resolve import resolve

PASS_THROUGH = ("partition", "account", "qos", "constraint", "time", "exclude", "nodelist", "reservation", "mem")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("train", "build"))
    parser.add_argument("config", help="YAML file of the run or build")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0, help="also the tasks per node; 0: a run on CPUs")
    parser.add_argument("--tasks-per-node", type=int, help="processes per node without GPUs (default 1)")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--tasks", type=int, help="build: size of the job array (default: --nodes)")
    for name in PASS_THROUGH:
        parser.add_argument(f"--{name}", help="as sbatch takes it" if name == "partition" else argparse.SUPPRESS)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option; repeat"
    )
    parser.add_argument("--container", help="handed to srun, so that only the ranks run inside")
    parser.add_argument(
        "--srun", action="append", default=[], metavar="KEY=VALUE", help="any other srun option; repeat"
    )
    parser.add_argument("--job-name")
    parser.add_argument("--dependency", help="as sbatch takes it, such as afterok:123")
    parser.add_argument(
        "--signal-s", type=int, default=120, help="seconds before the end at which a checkpoint is written"
    )
    parser.add_argument(
        "--chain", type=int, default=1, help="jobs that follow one another, where requeueing is not allowed"
    )
    parser.add_argument("--max-requeues", type=int, help="stop after so many (default: as long as there is progress)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="a job works on this run already: start when it has ended (default: refuse)",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter on the nodes (default: this one)")
    parser.add_argument(
        "--container-python", metavar="PYTHON",
        help="interpreter of the ranks inside the container (default with --container: python3)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the script, write and send nothing")
    parser.add_argument("--json", action="store_true")
    parser.epilog = "also taken, as sbatch takes them: " + " ".join(f"--{name}" for name in PASS_THROUGH)


def main(args: argparse.Namespace) -> int:
    submission = plan_submission(args)
    if args.dry_run:
        for name, text in submit.preview(submission).items():
            print(f"# ---- {name}\n{text}", end="")
        return 0
    if args.kind == "train":
        private_files()
    sent = submit.submit(submission)
    if args.json:
        print_json(sent)
    else:
        print(f"submitted {', '.join(sent['jobs'])}; kept in {sent['job_dir']}")
        print(f"look at it with: python -m cluster status {sent['jobs'][0]}")
    return 0


def plan_submission(args: argparse.Namespace) -> submit.Submission:
    """Checks the arguments, resolves the config and puts the job together; writes nothing."""
    tasks_per_node = _tasks_per_node(args)
    for name in ("nodes", "signal_s", "chain"):
        _at_least_one(name, getattr(args, name))
    world = ["--processes", str(args.nodes * tasks_per_node)] if args.kind == "train" else []
    answer = resolve(args.kind, args.config, args.overrides, world)
    resolved = answer["resolved"]
    refuse_secrets(resolved)
    target = resolved["run"]["dir"] if args.kind == "train" else resolved["output"]["url"]
    target = submit.absolute_url(target)
    named = (resolved["run"].get("name") if args.kind == "train" else None) or target.rstrip("/").rsplit("/", 1)[-1]
    options: dict[str, str | None] = {
        name: getattr(args, name) for name in PASS_THROUGH if getattr(args, name) is not None
    }
    job = script.Job(
        name=script.job_name(args.job_name or f"geoloom-{args.kind}-{named}"), command=_as_typed(sys.argv),
        job_dir="", logs_dir="", work_dir=os.getcwd(), python=args.python,
        rank_python=args.container_python or ("python3" if args.container else None), nodes=args.nodes,
        tasks_per_node=tasks_per_node, gpus_per_node=args.gpus_per_node, cpus_per_task=args.cpus_per_task,
        signal_s=args.signal_s, options=options | key_values("--sbatch", args.sbatch),
        srun_options=({"container": args.container} if args.container else {}) | key_values("--srun", args.srun),
    )  # fmt: skip
    tasks = args.tasks if args.tasks is not None else args.nodes
    _at_least_one("tasks", tasks)
    return submit.Submission(
        args.kind, job, target, resolved, answer["fingerprint"], args.chain, tasks, args.max_requeues, args.dependency,
        args.follow,
    )  # fmt: skip


def refuse_secrets(resolved: Mapping[str, Any]) -> None:
    """A job reads its settings from files, which hold no secrets: those reach it by the environment, which sbatch hands on."""
    for key, value in flatten(resolved).items():
        if isinstance(value, str) and MASK in value:
            fix = (
                "export GEOLOOM_TRACKING_URI=… and set tracking.uri=env"
                if key == "tracking.uri"
                else "use the environment"
            )
            raise UsageError(f"{key} holds a password, which would stand in the job's files; {fix}")


def key_values(flag: str, texts: Sequence[str]) -> dict[str, str | None]:
    """`["mail-type=END", "exclusive"]` → `{"mail-type": "END", "exclusive": None}`."""
    options: dict[str, str | None] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        key = key.removeprefix("--")
        script.option(key, value if separator else None)  # refuses what cannot be an option
        if key in options:
            raise UsageError(f"{flag} {key} is given twice")
        options[key] = value if separator else None
    return options


def _tasks_per_node(args: argparse.Namespace) -> int:
    if args.gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node {args.gpus_per_node} is negative")
    if args.gpus_per_node and args.tasks_per_node not in (None, args.gpus_per_node):
        raise UsageError(
            f"--tasks-per-node {args.tasks_per_node} differs from --gpus-per-node {args.gpus_per_node}: there is one task per "
            "GPU; give --gpus-per-node only"
        )
    tasks = args.gpus_per_node or (1 if args.tasks_per_node is None else args.tasks_per_node)
    _at_least_one("tasks_per_node", tasks)
    return tasks


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


def _as_typed(argv: Sequence[str]) -> str:
    """The command for the script's first comment line."""
    return "python -m cluster submit " + " ".join(shlex.quote(str(redact(word))) for word in argv[2:])
