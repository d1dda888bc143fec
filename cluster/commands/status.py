"""Shows jobs and their runs: queue state, nodes, last step, samples/s, last checkpoint, MLflow run, the failing rank's log.

examples:
  python -m cluster status                    # all of this user's jobs that `submit` sent
  python -m cluster status 4711
  python -m cluster status /fs/runs/first     # also after SLURM has forgotten the job
"""

from __future__ import annotations

import argparse
from typing import Any

from cluster.cli import print_json
from cluster.slurm.status import find_record, list_jobs, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="job number, or run directory")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    names = [args.job] if args.job else list_jobs()
    folders = dict(find_record(name) for name in names)  # links of one chain share their folder
    reports = [report(folder, record) for folder, record in folders.items()]
    if args.json:
        print_json(reports[0] if args.job else {"jobs": reports})
        return 0
    if not reports:
        print("no jobs of yours in the queue that `cluster submit` sent; give a run directory to look at an older one")
    for one in reports:
        print("\n".join(describe(one)))
    return 0


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    lines = []
    for row in report["jobs"]:
        where = f" on {row['nodes']}" if row["nodes"] else ""
        reason = f" ({row['reason']})" if row["reason"] else ""
        restarts = f", restarted {row['restarts']} times" if row["restarts"] else ""
        lines.append(f"job {row['job']}: {row['state']}{where}{restarts}{reason}")
    lines.append(f"  run         {report['run_dir']}")
    if report["kind"] == "train":
        of = f" of {report['steps']}" if report["steps"] else ""
        rate = f", {report['samples_per_s']:.4g} samples/s" if report["samples_per_s"] is not None else ""
        loss = f", loss {report['loss']:.4g}" if report["loss"] is not None else ""
        lines.append(f"  step        {'none yet' if report['step'] is None else report['step']}{of}{loss}{rate}")
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
