"""`python -m pipeline ablate CONFIG`: a base run and one run per setting, each with N seeds, then one comparison of all.

Settings are grids (KEY=V1,V2: the first value is the base's), lists (--variants claims|terms|FILE, of them --only some), or single
keys (--set); without any of them the paper's five claims. Runs lie under run.dir as SETTING/seed-S, made seed by seed; a finished one
is not made again, an interrupted one continues: the same command, however often it was killed. --budget makes no run that would pass
it. Each difference is told with its interval over seeds and test sites, the noise floor between seeds, and `not decided` where it
is within them. `--slurm` sends the runs as one job array, each task as `cluster submit train` would send it (frozen code, signals,
requeueing), and a job after it that compares them; `--compare` compares what is finished at any time.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cluster.slurm.arguments import add_job_arguments

if TYPE_CHECKING:
    from cluster.slurm.script import Job
    from pipeline.ablate import Plan

EXAMPLE = """examples:
  python -m pipeline ablate pipeline/runs/demo.yaml data.url=demo_out/shards run.dir=ablations model.prompts=4,0 optimizer.lr=2e-4,1e-3 --seeds 3
  python -m pipeline ablate pipeline/runs/demo.yaml data.url=demo_out/shards run.dir=terms --variants terms --seeds 3 --budget 12h --processes 2
  python -m pipeline ablate pipeline/runs/tiny.yaml data.url=demo_out/shards run.dir=claims --claims --only prompts qsacl --seeds 3
  python -m pipeline ablate CONFIG run.dir=/fs/ablations --seeds 3 --slurm --gpus-per-node 8 --partition gpu --time 24:00:00
  python -m pipeline ablate CONFIG run.dir=/fs/ablations --seeds 3 --compare      # what is finished, at any time"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file of the base run (or a plan.json that --slurm has left)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="apply to every run; key.path=V1,V2 spans a grid"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs per setting, train.seed counted up")
    parser.add_argument("--variants", metavar="NAME|FILE", help="a list of settings: claims, terms, or a file of yours")
    parser.add_argument("--claims", action="store_true", help="the paper's five claims: --variants claims")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these settings or groups of the list")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of your own; may be repeated"
    )
    parser.add_argument("--budget", metavar="N|Nh", help="samples or hours of training of all runs together")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks per run on this machine")
    parser.add_argument("--task", type=int, metavar="I", default=0, help="make only runs I, I+N, …: one of N callers")
    parser.add_argument("--tasks", type=int, metavar="N", default=1)
    parser.add_argument("--list", action="store_true", help="show the runs and stop")
    parser.add_argument("--compare", action="store_true", help="only compare what is finished")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")
    job = parser.add_argument_group("with --slurm", "options of `python -m cluster submit train`, of each run")
    job.add_argument("--slurm", action="store_true", help="send the runs as a job array, and a job that compares them")
    job.add_argument(
        "--parallel", type=int, metavar="N", help="runs at a time at most (default: as many as there is room)"
    )
    job.add_argument("--dry-run", action="store_true", help="print the scripts, write and send nothing")
    add_job_arguments(job)


def main(args: argparse.Namespace) -> int:
    from cluster.exit_codes import REQUEUE
    from cluster.ranks import Ranks
    from pipeline.ablate import is_finished
    from pipeline.parallel.layout import Layout

    planned = plan_of(args)
    for name in planned.left_out if not args.compare else ():
        print(f"{name} is left out: the base has these settings already")
    if args.list:
        for run in planned.runs:
            print(f"{run.name:28s} {run.config.run.dir}{'  finished' if is_finished(run.config) else ''}")
        return 0
    if args.compare:
        return report(planned, args)
    job = job_for(planned, args) if args.slurm else None
    per_node = job.tasks_per_node if job else args.processes or 1
    world = per_node * (job.nodes if job else 1)
    for run in planned.runs:  # a run that its layout forbids is told before hours went into the others
        Layout.of(run.config, Ranks(world=world, local_world=per_node))
    if job:
        return send(planned, job, args)
    code = make_runs(planned, args)
    return code if code == REQUEUE else report(planned, args)


def plan_of(args: argparse.Namespace) -> Plan:
    """The runs that the words name. Raises UsageError for words that contradict each other."""
    from cluster.errors import UsageError
    from pipeline.ablate import plan, read_plan

    if args.config.endswith("plan.json"):
        if args.overrides or args.set or args.only or args.variants or args.claims or args.seeds != 1:
            raise UsageError(f"{args.config} says what the runs are: no settings, lists or seeds beside it")
        return read_plan(args.config)
    if args.claims and args.variants not in (None, "claims"):
        raise UsageError("--claims is --variants claims; give one of the two")
    if (args.parallel or args.dry_run) and not args.slurm:
        raise UsageError("--parallel and --dry-run belong to --slurm; --list shows the runs")
    variants = "claims" if args.claims else args.variants
    return plan(args.config, args.overrides, args.only, args.set, variants, args.seeds)


def job_for(planned: Plan, args: argparse.Namespace) -> Job:
    """How each run's job looks. Raises UsageError for options that do not go with an array."""
    import sys

    from cluster import storage
    from cluster.errors import UsageError
    from cluster.slurm.arguments import as_typed, at_least_one, job_of

    if args.budget:
        raise UsageError(
            "--budget counts what runs have used, one after the other; with --slurm choose with --only, --seeds"
        )
    if args.processes or args.tasks != 1:
        raise UsageError(
            "--processes and --tasks are of runs on this machine; with --slurm give --nodes, --gpus-per-node"
        )
    if args.parallel is not None:
        at_least_one("parallel", args.parallel)
    return job_of(args, f"geoloom-ablate-{storage.name(planned.root)}", as_typed("pipeline ablate", sys.argv))


def send(planned: Plan, job: Job, args: argparse.Namespace) -> int:
    """Sends the runs that are not finished, as an array, and the job that compares all."""
    from cluster.cli import print_json, private_files
    from cluster.slurm.array import ArraySubmission, preview, submit_array
    from cluster.slurm.submit import absolute_url
    from pipeline.ablate import array_tasks, is_finished, plan_tree

    open_runs = [run.name for run in planned.runs if not is_finished(run.config)]
    tasks = [task for task in array_tasks(planned) if task.name in open_runs]
    if not tasks:
        print(f"all {len(planned.runs)} runs are finished")
        return report(planned, args)
    submission = ArraySubmission(
        job, absolute_url(planned.root), tasks, plan_tree(planned), args.parallel, args.max_requeues, args.dependency,
        args.follow,
    )  # fmt: skip
    if args.dry_run:
        for name, text in preview(submission).items():
            print(f"# ---- {name}\n{text}", end="")
        return 0
    private_files()
    sent = submit_array(submission)
    if args.json:
        print_json(sent)
    else:
        print(
            f"submitted {len(tasks)} runs as array {sent['jobs'][0]}, report as job {sent['jobs'][1]}; kept in {sent['job_dir']}"
        )
        print(f"look at it with: python -m cluster status {submission.root}")
    return 0


def make_runs(planned: Plan, args: argparse.Namespace) -> int:
    """Makes this task's runs that are not finished, while the budget lasts. Returns REQUEUE after a signal, else 0."""
    from cluster.errors import RunFailure
    from cluster.exit_codes import REQUEUE
    from cluster.progress import clock
    from pipeline.ablate import Budget, hours_left, is_finished, train_one, write_configs

    budget = Budget.parse(args.budget) if args.budget else None
    for number, (run, path) in enumerate(zip(planned.runs, write_configs(planned), strict=True)):
        if number % args.tasks != args.task % args.tasks or is_finished(run.config):
            continue
        if budget and not budget.allows(planned.runs, run):
            print(
                f"budget {args.budget} is used up before run {number + 1}/{len(planned.runs)}, {run.name}", flush=True
            )
            return 0
        left = hours_left(planned.runs)
        eta = f", about {clock(3600 * left)} left for all" if left is not None else ""
        print(f"ablation {number + 1}/{len(planned.runs)}: {run.name}{eta}", flush=True)
        code = train_one(path, args.processes)
        if code == REQUEUE:
            print(f"stopped in {run.name}; the same command continues", flush=True)
            return REQUEUE
        if code:
            where = f"logs in {run.config.run.dir}/logs"
            raise RunFailure(f"run {run.name} ended with code {code}; the same command continues ({where})")
    return 0


def report(planned: Plan, args: argparse.Namespace) -> int:
    """Compares what is finished, if that is all there will be."""
    from cluster import storage
    from cluster.cli import print_json
    from cluster.errors import RunFailure
    from pipeline.ablate import is_finished

    order = {run.variant: place for place, run in reversed(list(enumerate(planned.runs)))}
    finished = [run for run in planned.runs if is_finished(run.config)]
    finished.sort(key=lambda run: order[run.variant])  # setting by setting, the base first
    if len(finished) < len(planned.runs) and not (args.compare or args.budget):
        print(f"{len(finished)} of {len(planned.runs)} runs are finished; the last task compares them")
        return 0
    if len(finished) < 2:
        raise RunFailure(f"{len(finished)} of {len(planned.runs)} runs are finished: nothing to compare yet")
    page = storage.join(planned.root, "ablation.html")
    figures = compare(planned, [run.config.run.dir for run in finished], [run.variant for run in finished], page)
    storage.write_atomic(storage.join(planned.root, "ablation.json"), dump(figures))
    if args.json:
        print_json({"runs": [run.config.run.dir for run in finished], "report": page, **figures})
    return 0


def compare(planned: Plan, runs: list[str], variants: list[str], page: str) -> dict:
    """One comparison, the base's runs first; each setting against its reference."""
    from pipeline.commands.compare import Asked, run

    return run(runs, page, asked=Asked(variants, planned.references, planned.claims))


def dump(figures: dict) -> bytes:
    import json

    return json.dumps(figures, indent=1, default=str).encode()
