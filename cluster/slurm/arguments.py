"""What a user says of a job on the command line, shared by every command that sends one: nodes, GPUs, sbatch's own options."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import flatten
from cluster.errors import UsageError
from cluster.secrets import MASK, redact
from cluster.slurm import script

PASS_THROUGH = ("partition", "account", "qos", "constraint", "time", "exclude", "nodelist", "reservation", "mem")


def add_job_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options that `job_of` and its callers read."""
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0, help="also the tasks per node; 0: a run on CPUs")
    parser.add_argument("--tasks-per-node", type=int, help="processes per node without GPUs (default 1)")
    parser.add_argument("--cpus-per-task", type=int)
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


def job_of(args: argparse.Namespace, name: str, command: str) -> script.Job:
    """The job that the options describe; its folders are filled in on submission. name: of the job, unless --job-name is given.

    Raises:
        UsageError: options that contradict each other or that sbatch cannot take.
    """
    options: dict[str, str | None] = {key: getattr(args, key) for key in PASS_THROUGH if getattr(args, key) is not None}
    return script.Job(
        name=script.job_name(args.job_name or name), command=command,
        job_dir="", logs_dir="", work_dir=os.getcwd(), python=args.python,
        rank_python=args.container_python or ("python3" if args.container else None), nodes=args.nodes,
        tasks_per_node=tasks_per_node(args), gpus_per_node=args.gpus_per_node, cpus_per_task=args.cpus_per_task,
        signal_s=args.signal_s, options=options | key_values("--sbatch", args.sbatch),
        srun_options=({"container": args.container} if args.container else {}) | key_values("--srun", args.srun),
    )  # fmt: skip


def tasks_per_node(args: argparse.Namespace) -> int:
    """Processes per node: one per GPU, or as asked for on CPUs. Raises UsageError."""
    for name in ("nodes", "signal_s"):
        at_least_one(name, getattr(args, name))
    if args.gpus_per_node < 0:
        raise UsageError(f"--gpus-per-node {args.gpus_per_node} is negative")
    if args.gpus_per_node and args.tasks_per_node not in (None, args.gpus_per_node):
        raise UsageError(
            f"--tasks-per-node {args.tasks_per_node} differs from --gpus-per-node {args.gpus_per_node}: there is one task per "
            "GPU; give --gpus-per-node only"
        )
    tasks = args.gpus_per_node or (1 if args.tasks_per_node is None else args.tasks_per_node)
    at_least_one("tasks_per_node", tasks)
    return tasks


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


def at_least_one(name: str, value: int) -> None:
    """Raises UsageError for an option below 1."""
    if value < 1:
        raise UsageError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


def as_typed(command: str, argv: Sequence[str]) -> str:
    """The command for the script's first comment line."""
    return f"python -m {command} " + " ".join(shlex.quote(str(redact(word))) for word in argv[2:])
