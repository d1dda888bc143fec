"""`python -m pipeline ablate CONFIG`: a base run and one run per setting, each with N seeds, then one comparison of all.

Settings are grids (KEY=V1,V2: the first value is the base's), lists (--variants claims|terms|FILE, of them --only some), or single
keys (--set); without any of them the paper's five claims. Runs lie under run.dir as SETTING/seed-S, made seed by seed; a finished one
is not made again, an interrupted one continues: the same command, however often it was killed. --budget makes no run that would pass
it. Each difference is told with its interval over seeds and test sites, the noise floor between seeds, and `not decided` where it
is within them. `--array-script` prints a SLURM job array, one run per task; `--compare` compares what is finished at any time.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.ablate import Plan

EXAMPLE = """examples:
  python -m pipeline ablate pipeline/runs/demo.yaml data.url=demo_out/shards run.dir=ablations model.prompts=4,0 optimizer.lr=2e-4,1e-3 --seeds 3
  python -m pipeline ablate pipeline/runs/demo.yaml data.url=demo_out/shards run.dir=terms --variants terms --seeds 3 --budget 12h --processes 2
  python -m pipeline ablate pipeline/runs/tiny.yaml data.url=demo_out/shards run.dir=claims --claims --only prompts qsacl --seeds 3
  python -m pipeline ablate CONFIG run.dir=/fs/ablations --seeds 3 --processes 8 --array-script > ablate.sh
  sbatch --gpus-per-node 8 --time 24:00:00 ablate.sh; then, if wished, python -m pipeline ablate CONFIG run.dir=/fs/ablations --seeds 3 --compare"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the base run")
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
    parser.add_argument("--task", type=int, metavar="I", help="make only runs I, I+N, …; default: SLURM_ARRAY_TASK_ID")
    parser.add_argument("--tasks", type=int, metavar="N", help="default: SLURM_ARRAY_TASK_COUNT")
    parser.add_argument(
        "--array-script", action="store_true", help="print a SLURM array script that makes the runs, and stop"
    )
    parser.add_argument("--list", action="store_true", help="show the runs and stop")
    parser.add_argument("--compare", action="store_true", help="only compare what is finished")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster import storage
    from cluster.errors import UsageError
    from cluster.exit_codes import REQUEUE
    from cluster.ranks import Ranks
    from pipeline.ablate import array_script, is_finished, plan
    from pipeline.parallel.layout import Layout

    if args.claims and args.variants not in (None, "claims"):
        raise UsageError("--claims is --variants claims; give one of the two")
    planned = plan(
        args.config, args.overrides, args.only, args.set, "claims" if args.claims else args.variants, args.seeds
    )
    if not args.array_script:
        for name in planned.left_out:
            print(f"{name} is left out: the base has these settings already")
    if args.list:
        for run in planned.runs:
            print(f"{run.name:28s} {run.config.run.dir}{'  finished' if is_finished(run.config) else ''}")
        return 0
    if not args.compare:  # a run that its layout forbids is told before hours went into the others
        world = args.processes or 1
        for run in planned.runs:
            Layout.of(run.config, Ranks(world=world, local_world=world))
    if args.array_script:
        print(array_script(_again(args), len(planned.runs), storage.name(planned.root)), end="")
        return 0
    code = 0 if args.compare else make_runs(planned, args)
    return code if code == REQUEUE else report(planned, args)


def make_runs(planned: Plan, args: argparse.Namespace) -> int:
    """Makes this task's runs that are not finished, while the budget lasts. Returns REQUEUE after a signal, else 0."""
    import os

    from cluster.errors import RunFailure
    from cluster.exit_codes import REQUEUE
    from pipeline.ablate import Budget, is_finished, train_one, write_configs

    task = args.task if args.task is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    tasks = args.tasks or int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    budget = Budget.parse(args.budget) if args.budget else None
    for number, (run, path) in enumerate(zip(planned.runs, write_configs(planned), strict=True)):
        if number % tasks != task % tasks or is_finished(run.config):
            continue
        if budget and not budget.allows(planned.runs, run):
            print(
                f"budget {args.budget} is used up before run {number + 1}/{len(planned.runs)}, {run.name}", flush=True
            )
            return 0
        print(f"ablation {number + 1}/{len(planned.runs)}: {run.name}", flush=True)
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


def _again(args: argparse.Namespace) -> list[str]:
    """The words after `ablate` that name the same runs."""
    words = [args.config, *args.overrides, *(word for text in args.set for word in ("--set", text))]
    words += ["--only", *args.only] if args.only else []
    words += ["--seeds", str(args.seeds)] if args.seeds != 1 else []
    words += ["--variants", args.variants] if args.variants else []
    words += ["--claims"] if args.claims else []
    words += ["--budget", args.budget] if args.budget else []
    return words + (["--processes", str(args.processes)] if args.processes else [])
