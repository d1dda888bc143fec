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
import dataclasses
import sys

from cluster.cli import print_json, private_files
from cluster.slurm import submit
from cluster.slurm.arguments import PASS_THROUGH, add_job_arguments, as_typed, at_least_one, job_of, refuse_secrets
from cluster.slurm.resolve import resolve
from cluster.slurm.script import job_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("train", "build"))
    parser.add_argument("config", help="YAML file of the run or build")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    add_job_arguments(parser)
    parser.add_argument("--tasks", type=int, help="build: size of the job array (default: --nodes)")
    parser.add_argument(
        "--chain", type=int, default=1, help="jobs that follow one another, where requeueing is not allowed"
    )
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
    job = job_of(args, "unnamed", as_typed("cluster submit", sys.argv))
    at_least_one("chain", args.chain)
    world = ["--processes", str(job.nodes * job.tasks_per_node)] if args.kind == "train" else []
    answer = resolve(args.kind, args.config, args.overrides, world)
    resolved = answer["resolved"]
    refuse_secrets(resolved)
    target = resolved["run"]["dir"] if args.kind == "train" else resolved["output"]["url"]
    target = submit.absolute_url(target)
    named = (resolved["run"].get("name") if args.kind == "train" else None) or target.rstrip("/").rsplit("/", 1)[-1]
    if not args.job_name:
        job = dataclasses.replace(job, name=job_name(f"geoloom-{args.kind}-{named}"))
    tasks = args.tasks if args.tasks is not None else args.nodes
    at_least_one("tasks", tasks)
    return submit.Submission(
        args.kind, job, target, resolved, answer["fingerprint"], args.chain, tasks, args.max_requeues, args.dependency,
        args.follow,
    )  # fmt: skip
