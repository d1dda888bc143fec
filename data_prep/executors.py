"""Who runs the units of work of a build, a preparation, an audit or a verification: this machine's processes, or a dask cluster. Same units, same bytes.

A unit is a module-level function and a small job; it commits its own result under its own name and may run twice, anywhere. So an
executor only has to run every unit at least once, and no scheduler of ours is needed: dask balances, repeats what a lost worker had,
and shows it on its dashboard. SLURM job arrays need no executor at all: every array task is a `build --task I --tasks N`; dask's workers may
be SLURM jobs too (`--executor slurm`), which balances what an array deals out beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import RunFailure, UsageError

J = TypeVar("J")
R = TypeVar("R")
IN_FLIGHT = (
    16  # messages per dask thread that the scheduler holds at a time: its memory does not grow with the number of units
)
TOGETHER_S, MOST_TOGETHER = 0.25, 64  # units that take less travel together
SLURM = "slurm"
JOB = {
    "cores": 1,
    "processes": 1,
    "memory": "8GiB",
}  # of a dask worker in SLURM, where dask's own configuration does not say


@dataclass(frozen=True)
class Executor:
    """kind: local or dask. workers: processes of either (0: one per CPU). scheduler: address of a dask cluster; "": one here;
    slurm: one whose workers are jobs."""

    kind: str = "local"
    workers: int = 0
    scheduler: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor",
        choices=("local", "slurm", "dask"),
        default="local",
        help="this machine (default), dask, or slurm: dask whose workers are SLURM jobs",
    )
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="dask: a running cluster, tcp://HOST:PORT; or slurm (as --executor slurm): workers as jobs, as dask-jobqueue's configuration "
        "says (partition, time, memory: DASK_JOBQUEUE__SLURM__QUEUE, …) (default: a cluster on this machine)",
    )
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="--executor slurm: workers (default: workers)")


def executor_of(args: argparse.Namespace, workers: int) -> Executor:
    """The executor that the options name. Raises UsageError for an address without dask."""
    if args.scheduler and args.executor != "dask":
        raise UsageError("--scheduler goes with --executor dask")
    address = SLURM if args.executor == SLURM else args.scheduler
    if args.jobs < 0 or (args.jobs and address != SLURM):
        raise UsageError("--jobs N goes with --executor slurm")
    return Executor("dask" if address else args.executor, args.jobs or workers, address)


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
        from distributed import Client, as_completed
    except ImportError:
        raise UsageError("--executor dask needs dask.distributed: pip install distributed==2026.8.0") from None
    with contextlib.ExitStack() as stack:
        try:
            cluster = _cluster(stack, workers, address)
            client = stack.enter_context(Client(cluster, timeout="30s", set_as_default=False))
            if address == SLURM:
                client.wait_for_workers(1, timeout=3600)
        except OSError as error:
            raise UsageError(f"--scheduler {address}: {' '.join(str(error).split())}") from None
        threads = max(sum(client.nthreads().values()), workers if address == SLURM else 1)
        waiting, done, pace = iter(zip(jobs, names, strict=True)), as_completed(loop=client.loop), _Pace()
        running: dict[Any, str] = {}

        def submit(count: int) -> None:
            groups = list(itertools.islice(iter(lambda: list(itertools.islice(waiting, pace.together())), []), count))
            if not groups:
                return
            # impure: a unit's worth is what it leaves in the output, so one that is asked for again must run again
            args = [work] * len(groups), [[job for job, _ in group] for group in groups]
            futures = client.map(_units, *args, pure=False, retries=2)
            running.update(zip(futures, (group[0][1] for group in groups)))
            done.update(futures)

        submit(threads * IN_FLIGHT)
        for finished in done.batches():
            for future, (answers, seconds) in zip(finished, _gathered(client, finished, running)):
                running.pop(future)
                future.release()
                pace.add(len(answers), seconds)
                yield from answers
            if len(running) <= threads * IN_FLIGHT // 2:  # many at once: a message costs as much for one as for fifty
                submit(threads * IN_FLIGHT - len(running))


def _cluster(stack: contextlib.ExitStack, workers: int, address: str) -> Any:
    """The address of a cluster, or a cluster that lives as long as the stack. Raises UsageError where SLURM cannot be asked."""
    if address == SLURM:
        try:
            from dask_jobqueue import SLURMCluster
        except ImportError:
            raise UsageError("--scheduler slurm needs dask-jobqueue: pip install dask-jobqueue==0.9.0") from None
        import dask.config

        own: dict[str, Any] = {
            key: value for key, value in JOB.items() if dask.config.get(f"jobqueue.slurm.{key}", None) is None
        }
        # workers run this code, from wherever it was started
        prologue = [*dask.config.get("jobqueue.slurm.job-script-prologue", []), f"export PYTHONPATH={_code_path()}"]
        try:
            return stack.enter_context(SLURMCluster(n_workers=workers, job_script_prologue=prologue, **own))
        except (RuntimeError, FileNotFoundError) as error:
            raise UsageError(f"--scheduler slurm: {' '.join(str(error).split())[:300]}") from None
    if address:
        return address
    from distributed import LocalCluster

    return stack.enter_context(
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50)
    )


def _code_path() -> str:
    """PYTHONPATH of whoever runs this code from where it lies."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return shlex.quote(os.pathsep.join(dict.fromkeys([here, *filter(None, [os.environ.get("PYTHONPATH")])])))


def _gathered(client: Any, futures: Sequence[Any], running: dict[Any, str]) -> list[tuple[list[Any], float]]:
    """The results of finished futures, in one message. Raises RunFailure, UsageError of the first that failed."""
    from distributed.scheduler import KilledWorker

    failed = next((future for future in futures if future.status == "error"), None)
    name = running[failed if failed is not None else futures[0]]
    try:
        return client.gather(list(futures)) if failed is None else failed.result()
    except KilledWorker:
        raise RunFailure(
            f"{name}: the workers that ran it died, one after another (out of memory?); finished shards are kept"
        ) from None
    except (RunFailure, UsageError):
        raise
    except Exception as error:
        raise RunFailure(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}") from None


class _Pace:
    """How many units travel together: one, as long as they take a while; more, where the engine would take longer than they do."""

    def __init__(self) -> None:
        self._mean_s = TOGETHER_S

    def add(self, units: int, seconds: float) -> None:
        self._mean_s += 0.3 * (seconds / units - self._mean_s)

    def together(self) -> int:
        return max(1, min(int(TOGETHER_S / max(self._mean_s, 1e-6)), MOST_TOGETHER))


def _units(work: Callable[..., R], jobs: Sequence[Any]) -> tuple[list[R], float]:
    """Units on a worker, one after the other, and the seconds they took."""
    from data_prep.pool import keep_memory

    keep_memory()
    began = time.perf_counter()
    return [work(job, lambda _: None) for job in jobs], time.perf_counter() - began
