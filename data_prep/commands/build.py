"""Catalog to shards: tars + index.parquet + manifest.json, reproducible byte for byte.

Finished shards are kept and skipped: after a crash, a kill or a full disk run the same command again. With --tasks (or as
a SLURM array, whose variables are the default) each task makes every N-th slice of the plan, and whichever finishes last merges.

examples:
  python -m data_prep build data_prep/runs/demo.yaml source.catalog=[scenes/catalog.parquet] output.url=shards
  python -m data_prep build data_prep/runs/s3.yaml output.url=s3://bucket/set --task 3 --tasks 16
  python -m data_prep build data_prep/runs/s3.yaml --executor dask --scheduler tcp://10.0.0.1:8786    # any dask cluster
  python -m data_prep build data_prep/runs/s3.yaml --dry-run --tasks 200 --prices read_gb=0.09,put_1000=0.005,hour=0.4
  python -m data_prep build data_prep/runs/demo.yaml --retry-faults      # after the sources were mended
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.errors import RunFailure, UsageError
from data_prep.executors import add_arguments as add_executor

if TYPE_CHECKING:
    from data_prep.build import Outcome
    from data_prep.config import BuildConfig
    from data_prep.estimate import Prices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. data_prep/runs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    parser.add_argument("--task", type=int, metavar="I", help="make only this share of the shards, counted from 0")
    parser.add_argument("--tasks", type=int, metavar="N", help="number of shares")
    parser.add_argument("--retry-faults", action="store_true", help="make shards with faulty sites again")
    add_executor(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="what it will read, write, take and cost, from sites that are really read",
    )
    parser.add_argument("--sample", type=int, default=32, metavar="N", help="dry run: sites to read (default 32)")
    parser.add_argument(
        "--prices",
        default="",
        metavar="KEY=V,…",
        help="dry run: per GB (read_gb, write_gb), per 1000 requests (get_1000, put_1000), per hour of a task (hour)",
    )
    parser.add_argument("--resolve", action="store_true", help="check and resolve the config; read and write nothing")
    parser.add_argument("--explain", metavar="KEY", help="what a key or section is, and its value here; starts nothing")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import config as settings
    from data_prep.config import BuildConfig

    if args.explain:
        from cluster.schema import explain

        print(explain(BuildConfig, args.config, args.overrides, args.explain))
        return 0
    config = settings.load(BuildConfig, args.config, args.overrides)
    if args.resolve:
        return resolve(config, args.json)
    if args.dry_run:
        return dry_run(config, args)
    task, tasks = array_share(args.task, args.tasks, os.environ)
    from data_prep.build import build, over_budget
    from data_prep.executors import executor_of

    outcome = build(config, task, tasks, args.retry_faults, executor_of(args, config.workers))
    summarise(outcome, config, task, tasks)
    failed = over_budget(outcome, config)
    if args.json:
        print_figures(config.output.url, outcome)
    if failed:
        raise budget_fault(outcome, config)
    return 0


def budget_fault(outcome: Outcome, config: BuildConfig) -> RunFailure:
    return RunFailure(
        f"{len(outcome.faults)} faulty sites of {outcome.plan.num_sites + len(outcome.plan.faults)}, past "
        f"error_budget={config.error_budget}; first: {outcome.faults[0]['site']}: {outcome.faults[0]['why']}; all are in "
        f"{config.output.url.rstrip('/')}/faults.jsonl; mend them and add --retry-faults, or raise error_budget"
    )


def resolve(config: BuildConfig, as_json: bool) -> int:
    """What the config resolves to (`cluster submit build` freezes it)."""
    import json

    from cluster.cli import print_json
    from cluster.config import fingerprint, to_dict

    print(json.dumps(to_dict(config), indent=1))
    if as_json:
        print_json({"fingerprint": fingerprint(config), "resolved": to_dict(config)})
    return 0


def dry_run(config: BuildConfig, args: argparse.Namespace) -> int:
    """What a build will take, said before it starts."""
    from cluster.cli import print_json
    from cluster.progress import clock
    from data_prep.estimate import estimate

    if args.sample < 1 or (args.tasks or 1) < 1:
        raise UsageError("--sample and --tasks must be 1 or more")
    workers = config.workers or int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    found = estimate(config, args.sample, workers, args.tasks or 1, prices_of(args.prices))
    say(
        f"{found['sites']} sites in {found['shards']} shards; {found['sampled_sites']} sites were read to know what follows:"
    )
    say(
        f"  reads   {found['read_bytes'] / 1e9:.4g} GB in {found['read_requests']} requests, over the network; {found['files_opened']} files opened"
    )
    say(
        f"  writes  {found['written_bytes'] / 1e9:.4g} GB, about {found['written_requests']} requests on an object store"
    )
    say(
        f"  takes   {clock(found['hours'] * 3600)} on {found['tasks']} tasks of {found['workers']} processes, at this machine's pace"
        f" ({found['cpu_hours']:.3g} process hours)"
    )
    if found["faulty_share"]:
        say(f"  {found['faulty_share']:.1%} of the sampled sites are faulty")
    if args.prices:
        say(
            f"  costs   {found['cost']['total']:.2f}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in found["cost"].items() if k != "total")
        )
    if args.json:
        print_json(found)
    return 0


def prices_of(text: str) -> Prices:
    """Prices from `read_gb=0.09,hour=0.4`. Raises UsageError."""
    import dataclasses

    from data_prep.estimate import Prices

    known = {field.name for field in dataclasses.fields(Prices)}
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--prices {part}: {value!r} is not a number") from None
        if name not in known:
            raise UsageError(f"--prices {part}: {name} is none of {', '.join(sorted(known))}")
    return Prices(**found)


def array_share(task: int | None, tasks: int | None, env: Mapping[str, str]) -> tuple[int, int]:
    """(task, tasks) from the options, else from a SLURM array's variables, else the whole.

    Raises UsageError for one without the other, or a task outside 0 … tasks-1.
    """
    if task is None and tasks is None and env.get("SLURM_ARRAY_TASK_ID", "").isdigit():
        first = int(env.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = max(int(env.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
        tasks = int(env.get("SLURM_ARRAY_TASK_COUNT", "1"))
        task = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step
    if task is None and tasks is None:
        return 0, 1
    if task is None or tasks is None:
        raise UsageError("--task I and --tasks N go together")
    if not 0 <= task < tasks:
        raise UsageError(f"--task {task} is not one of 0 … {tasks - 1} (--tasks {tasks})")
    return task, tasks


def summarise(outcome: Outcome, config: BuildConfig, task: int, tasks: int) -> None:
    """What was made, what was left out and why."""
    plan, url = outcome.plan, config.output.url
    share = f"task {task} of {tasks}: " if tasks > 1 else ""
    say(f"{share}{len(outcome.parts)} shards ({outcome.built} made now, the rest were finished)")
    sites, splits = plan.report["sites"], plan.report["splits"]
    if sites["duplicates"]:
        say(f"left out {sites['duplicates']} repeats of a footprint with the same dates")
    if any(splits["left_out"].values()):
        say(f"left out {sum(splits['left_out'].values())} sites within {splits['buffer_m']:g} m of an evaluation site")
    lost = (outcome.manifest or {}).get("losses", {})
    if lost.get("dates"):
        say(
            f"{lost['dates']} dates or modalities of {lost['sites']} sites could not be read or were contradicted by their pixels "
            "(quality.on_contradiction); their sites are kept, each loss is named in losses.jsonl"
        )
    for fault in outcome.faults[:10]:
        say(f"fault: {fault['site']}: {fault['asset']}: {fault['why']}")
    if len(outcome.faults) > 10:
        say(f"… and {len(outcome.faults) - 10} more faults")
    if outcome.manifest is None:
        say(
            "other tasks' shards are still missing; the last one to finish merges (or: python -m data_prep merge CONFIG)"
        )
        return
    counts = outcome.manifest["counts"]
    per_split = ", ".join(
        f"{split} {entry['samples']}" for split, entry in counts["splits"].items() if entry["samples"]
    )
    say(
        f"{url}: {counts['samples']} samples in {counts['shards']} shards, {counts['bytes'] / 1e6:.1f} MB ({per_split})"
    )
    missing = [
        split for split, share in config.split.fractions.items() if share and not counts["splits"][split]["samples"]
    ]
    if missing:
        few = "" if outcome.plan.prepared else f"below split.min_cells={config.split.min_cells} cells all is train; "
        say(
            f"note: no ground cell fell into {', '.join(missing)}: {few}more cells, other split.fractions or another split.seed give some"
        )


def print_figures(url: str, outcome: Outcome) -> None:
    from cluster.cli import print_json
    from data_prep.shards import ShardSet

    if outcome.manifest is None:
        figures = {key: sum(part[key] for part in outcome.parts) for key in ("samples", "bytes")}
        made = sum(1 for part in outcome.parts if part["samples"])
        print_json({"shards": made, **figures, "faults": len(outcome.faults), "manifest_sha256": None})
        return
    counts = outcome.manifest["counts"]
    print_json(
        {
            "shards": counts["shards"], "samples": counts["samples"], "bytes": counts["bytes"], "faults": len(outcome.faults),
            "losses": outcome.manifest.get("losses", {}).get("dates", 0),
            "manifest_sha256": ShardSet.open(url).manifest_sha256, "seconds": {k: round(v, 3) for k, v in outcome.seconds.items()},
        }
    )  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)
