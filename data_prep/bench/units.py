"""What an executor costs per unit of work: empty units through the executor that a build uses, and the memory of who hands them out."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from data_prep.executors import add_arguments as add_executor

    parser.add_argument("--units", type=int, default=10_000, metavar="N", help="empty units (default 10000)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from data_prep.executors import executor_of, run_units

    executor = executor_of(args, args.workers)
    warm = time.perf_counter()
    jobs, names, first = range(args.units), [str(i) for i in range(args.units)], 0.0
    found: list[int] = []
    start, cpu = warm, 0.0
    for answer in run_units(empty, jobs, names, executor, lambda _: None):
        if not found:  # starting workers is not a unit's cost
            first, start, cpu = time.perf_counter() - warm, time.perf_counter(), time.process_time()
        found.append(answer)
    spent = max(len(found) - 1, 1)
    figures = {
        "executor": args.executor, "units": len(found), "once": sorted(found) == list(jobs), "start_s": first,
        "ms_per_unit": (time.perf_counter() - start) / spent * 1e3, "client_cpu_ms_per_unit": (time.process_time() - cpu) / spent * 1e3,
        "client_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
    )
    if args.json:
        print_json(figures)
    return 0


def empty(job: int, report: Callable[[Any], None]) -> int:
    """A unit that does nothing."""
    return job
