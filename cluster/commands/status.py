"""Shows jobs and their runs: queue state, nodes, step and time left, GPU-hours, samples/s, last loss, probe and checkpoint, MLflow run,
the failing rank's log. An array of runs is shown task by task; a folder of runs as a table of all below it.

examples:
  python -m cluster status                    # all of this user's jobs that `submit` sent
  python -m cluster status 4711               # 4711_3: one task of an array
  python -m cluster status /fs/runs/first     # also after SLURM has forgotten the job
  python -m cluster status /fs/ablations --watch 30 --price-per-gpu-hour 2.5
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from cluster import storage
from cluster.cli import print_json
from cluster.errors import UsageError
from cluster.progress import clock
from cluster.rundir import RunDir
from cluster.slurm.status import find_record, list_jobs, report, report_array, report_run, runs_below


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="job number, run directory, or a folder of runs")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="S",
        help="again every S seconds (10), until all has ended",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="any currency; adds what a run has cost")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    if args.watch is not None and (args.watch <= 0 or args.json):
        raise UsageError("--watch takes seconds above 0, and goes without --json")
    while True:
        reports = reports_of(args.job)
        if args.watch:
            print("\033[H\033[2J" + time.strftime("%F %T"))
        show(reports, args)
        if not args.watch or not any(goes_on(one) for one in reports):
            return 0
        time.sleep(args.watch)


def reports_of(job: str | None) -> list[dict[str, Any]]:
    """One report per submission; of a folder that none was sent for, one per run below it."""
    if job and not job.split("_")[0].isdigit() and RunDir(job).read_resolved() is None:
        try:
            found = {job: find_record(job)}
        except UsageError:
            runs = runs_below(job) if storage.list_names(job) else []
            if not runs:
                raise
            return [{"kind": "runs", "run_dir": job, "jobs": [], "tasks": [_named(run, job) for run in runs]}]
    else:
        found = {name: find_record(name) for name in ([job] if job else list_jobs())}
    folders = dict(found.values())  # links of one chain share their folder
    return [report_array(*one) if one[1]["kind"] == "array" else report(*one) for one in folders.items()]


def _named(run: str, root: str) -> dict[str, Any]:
    return {"name": run.removeprefix(root).strip("/") or storage.name(run), **report_run(run)}


def show(reports: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the reports, for a person or as JSON."""
    for one in reports if args.price_per_gpu_hour is not None else ():
        for run in one.get("tasks", [one]):
            run["cost"] = None if run.get("gpu_hours") is None else args.price_per_gpu_hour * run["gpu_hours"]
    if args.json:
        print_json(reports[0] if args.job else {"jobs": reports})
    elif not reports:
        print("no jobs of yours in the queue that `cluster submit` sent; give a run directory to look at an older one")
    else:
        for one in reports:
            print("\n".join(describe_many(one) if "tasks" in one else describe(one)), flush=True)


def goes_on(report: dict[str, Any]) -> bool:
    """Whether anything of it waits or runs, as far as SLURM says; without a job, whether a run has steps before it."""
    if report["jobs"]:
        return any(
            word in row["state"] for row in report["jobs"] for word in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING")
        )
    return any(run.get("steps") and (run.get("step") or 0) < run["steps"] for run in report.get("tasks", [report]))


def describe_many(report: dict[str, Any]) -> list[str]:
    """An array of runs, or a folder of them, as lines: one per run."""
    lines = _queue_lines(report)
    width = max(len(task["name"]) for task in report["tasks"])
    for task in report["tasks"]:
        state = f"{task['jobs'][0]['state']:<10} " if task["jobs"] else ""
        lines.append(f"  {task['name']:<{width}}  {state}{_progress(task)}")
        if task["last_decision"] and not task["last_decision"].startswith("done"):
            lines.append(f"  {'':<{width}}  {task['last_decision']}")
        if task["failure"]:
            lines.append(f"  {'':<{width}}  failing rank {task['failure']['rank']}: {task['failure']['error']}")
    done = sum(bool(task["steps"]) and task["step"] == task["steps"] for task in report["tasks"])
    spent = [task["gpu_hours"] for task in report["tasks"] if task["gpu_hours"] is not None]
    costs = [task["cost"] for task in report["tasks"] if task.get("cost") is not None]
    price = f", cost {sum(costs):,.2f}" if costs else ""
    lines.append(f"  {done} of {len(report['tasks'])} runs at their last step, {sum(spent):.4g} GPU-hours{price}")
    return lines


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    lines = _queue_lines(report)
    if report["kind"] == "train":
        lines.append(f"  step        {_progress(report)}")
        lines.append(f"  checkpoint  {report['last_checkpoint'] or 'none yet'}")
        lines.append(f"  MLflow run  {report['mlflow_run'] or 'none yet'}")
    else:
        lines.append(f"  shards      {report['shards']}{', merged' if report['merged'] else ', not merged yet'}")
    if report["last_decision"]:
        lines.append(f"  last start  {report['last_decision']}")
    if report["failure"]:
        lines.append(f"  failing     rank {report['failure']['rank']}: {report['failure']['error']}")
        lines += [f"    | {line}" for line in report["failure"]["tail"]]
    return lines


def _queue_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in report["jobs"]:
        where = f" on {row['nodes']}" if row["nodes"] else ""
        reason = f" ({row['reason']})" if row["reason"] else ""
        restarts = f", restarted {row['restarts']} times" if row["restarts"] else ""
        lines.append(f"job {row['job']}: {row['state']}{where}{restarts}{reason}")
    return [*lines, f"  run         {report['run_dir']}"]


def _progress(run: dict[str, Any]) -> str:
    """`20 of 100, loss 1.5, 4 samples/s, 1:20:00 left, 0.5 GPU-hours, linear/fused 0.612, logged 0:12 ago`."""
    if run["step"] is None:
        return "none yet"
    words = [f"{run['step']}{' of ' + str(run['steps']) if run['steps'] else ''}"]
    words += [f"loss {run['loss']:.4g}"] if run["loss"] is not None else []
    words += [f"{run['samples_per_s']:.4g} samples/s"] if run["samples_per_s"] is not None else []
    unfinished = run["steps"] and run["step"] < run["steps"]
    words += [f"{clock(run['eta_s'])} left"] if unfinished and run["eta_s"] is not None else []
    words += [f"{run['gpu_hours']:.4g} GPU-hours"] if run["gpu_hours"] is not None else []
    words += [f"cost {run['cost']:,.2f}"] if run.get("cost") is not None else []
    words += [f"{key} {score:.3f}" for key, score in run["probes"].items()]
    words += [f"logged {clock(run['logged_s_ago'])} ago"] if unfinished and run["logged_s_ago"] is not None else []
    return ", ".join(words)
