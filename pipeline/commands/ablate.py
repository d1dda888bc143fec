"""`python -m pipeline ablate CONFIG`: a base run and one run per changed key, then one comparison of all.

Without --only and --set all of the paper's ablations are made; --set key=value makes a run of your own, beside those of --only.
Runs lie under run.dir; a finished one is not made again, an interrupted one continues. `--array-script` prints a SLURM job array, one run per task; the task that
ends last compares, and `--compare` does so again at any time. Resources (GPUs, time, partition) go on sbatch's command line.
"""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  python -m pipeline ablate pipeline/runs/tiny.yaml data.url=demo_out/shards run.dir=ablations --only experts prompts --processes 2
  python -m pipeline ablate pipeline/runs/demo.yaml run.dir=ablations --set model.moe.top_k=2 --list
  python -m pipeline ablate CONFIG run.dir=/fs/ablations --processes 8 --array-script > ablate.sh
  sbatch --gpus-per-node 8 --time 24:00:00 ablate.sh; then, if wished, python -m pipeline ablate CONFIG run.dir=/fs/ablations --compare"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the base run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="apply to every run")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="experts placement prompts attention qsacl ita unified"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a run of your own; may be repeated"
    )
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
    import os

    from cluster import storage
    from cluster.cli import print_json
    from cluster.errors import RunFailure
    from cluster.ranks import Ranks
    from pipeline.ablate import array_script, is_finished, plan, train_one, write_configs
    from pipeline.parallel.layout import Layout

    runs = plan(args.config, args.overrides, args.only, args.set)
    root = runs[0][1].run.dir.rsplit("/", 1)[0]
    if args.list:
        for name, config in runs:
            print(f"{name:20s} {config.run.dir}")
        return 0
    if not args.compare:  # a run that its layout forbids is told before hours went into the others
        world = args.processes or 1
        for _, config in runs:
            Layout.of(config, Ranks(world=world, local_world=world))
    if args.array_script:
        print(array_script(_again(args), len(runs), storage.name(root)), end="")
        return 0
    task = args.task if args.task is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    tasks = args.tasks or int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    if not args.compare:
        configs = write_configs(runs, root)
        for number, ((name, config), path) in enumerate(zip(runs, configs, strict=True)):
            if number % tasks != task % tasks or is_finished(config):
                continue
            print(f"ablation {number + 1}/{len(runs)}: {name}", flush=True)
            code = train_one(path, args.processes)
            if code:
                raise RunFailure(
                    f"run {name} ended with code {code}; the same command continues (logs in {config.run.dir}/logs)"
                )
    finished = [config.run.dir for _, config in runs if is_finished(config)]
    if len(finished) < len(runs) and not args.compare:
        print(f"{len(finished)} of {len(runs)} runs are finished; the last task compares them")
        return 0
    if len(finished) < 2:
        raise RunFailure(f"{len(finished)} of {len(runs)} runs are finished: nothing to compare yet")
    report = storage.join(root, "ablation.html")
    code = compare(finished, report)
    if args.json:
        print_json({"runs": finished, "report": report})
    return code


def _again(args: argparse.Namespace) -> list[str]:
    """The words after `ablate` that name the same runs."""
    words = [args.config, *args.overrides, *(word for text in args.set for word in ("--set", text))]
    words += ["--only", *args.only] if args.only else []
    return words + (["--processes", str(args.processes)] if args.processes else [])


def compare(runs: list[str], report: str) -> int:
    """One comparison, the base run first."""
    from pipeline.commands import compare as command

    return command.main(argparse.Namespace(runs=runs, out=report, ablation=True, uri=None, json=False))
