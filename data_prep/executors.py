"""Who runs the units of work of a build or a preparation: this machine's processes, or a dask cluster. Same units, same bytes.

A unit is a module-level function and a small job; it commits its own result under its own name and may run twice, anywhere. So an
executor only has to run every unit at least once, and no scheduler of ours is needed: dask balances, repeats what a lost worker had,
and shows it on its dashboard. SLURM job arrays need no executor at all: every array task is a `build --task I --tasks N`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import RunFailure, UsageError

J = TypeVar("J")
R = TypeVar("R")
IN_FLIGHT = 16  # units per dask thread that the scheduler holds at a time: its memory does not grow with their number


@dataclass(frozen=True)
class Executor:
    """kind: local or dask. workers: processes of either (0: one per CPU). scheduler: address of a dask cluster; "": one here."""

    kind: str = "local"
    workers: int = 0
    scheduler: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor", choices=("local", "dask"), default="local", help="processes of this machine (default), or dask"
    )
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="dask: a running cluster, tcp://HOST:PORT (default: one on this machine)",
    )


def executor_of(args: argparse.Namespace, workers: int) -> Executor:
    """The executor that the options name. Raises UsageError for an address without dask."""
    if args.scheduler and args.executor != "dask":
        raise UsageError("--scheduler goes with --executor dask")
    return Executor(args.executor, workers, args.scheduler)


def run_units(
    work: Callable[[J, Callable[[Any], None]], R],
    jobs: Sequence[J],
    names: Sequence[str],
    executor: Executor,
    on_report: Callable[[Any], None],
) -> Iterator[R]:
    """Yields `work(job, report)` of every job as it finishes, in no order. names: of the jobs, for messages.

    Raises RunFailure, UsageError: as raised by `work`; a worker that died (local), workers that keep dying (dask); no such cluster.
    """
    workers = executor.workers or int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    if executor.kind == "local":
        from data_prep.pool import run_jobs

        yield from run_jobs(work, jobs, workers, on_report, names)
        return
    yield from _run_on_dask(work, jobs, names, workers, executor.scheduler)


def _run_on_dask(
    work: Callable[..., R], jobs: Sequence[Any], names: Sequence[str], workers: int, address: str
) -> Iterator[R]:
    try:
        from distributed import Client, LocalCluster, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise UsageError("--executor dask needs dask.distributed: pip install distributed==2026.8.0") from None
    with contextlib.ExitStack() as stack:
        try:
            cluster = address or stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50)
            )
            client = stack.enter_context(Client(cluster, timeout="30s", set_as_default=False))
        except OSError as error:
            raise UsageError(f"--scheduler {address}: {' '.join(str(error).split())}") from None
        room = max(sum(client.nthreads().values()), 1) * IN_FLIGHT
        waiting = iter(zip(jobs, names, strict=True))
        done = as_completed(loop=client.loop)
        running: dict[Any, str] = {}

        def submit(count: int) -> None:
            batch = list(itertools.islice(waiting, count))
            if not batch:
                return
            # impure: a unit's worth is what it leaves in the output, so one that is asked for again must run again
            futures = client.map(_unit, [work] * len(batch), [job for job, _ in batch], pure=False, retries=2)
            running.update(zip(futures, (name for _, name in batch)))
            done.update(futures)

        submit(room)
        for future in done:
            name = running.pop(future)
            try:
                answer = future.result()
            except KilledWorker:
                raise RunFailure(
                    f"{name}: the workers that ran it died, one after another (out of memory?); finished shards are kept"
                ) from None
            except (RunFailure, UsageError):
                raise
            except Exception as error:
                raise RunFailure(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
            finally:
                future.release()
            yield answer
            if len(running) <= room // 2:  # many at once: a message to the scheduler costs as much for one as for fifty
                submit(room - len(running))


def _unit(work: Callable[..., R], job: Any) -> R:
    """One unit on a worker."""
    from data_prep.pool import keep_memory

    keep_memory()
    return work(job, lambda _: None)
