"""A process pool whose workers report while they work, and whose death is noticed: one pipe per worker, no shared locks.

(A worker killed by `kill -9` or by the out-of-memory killer must not hang the rest, which a shared queue can.)
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from cluster.errors import RunFailure, UsageError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h; 32 MiB is the greatest threshold it takes
J = TypeVar("J")
R = TypeVar("R")
Report = Callable[[Any], None]


def run_jobs(
    work: Callable[[J, Report], R], jobs: Sequence[J], workers: int, on_report: Report, names: Sequence[str]
) -> Iterator[R]:
    """Yields `work(job, report)` of every job as it finishes. One worker means this process, without a pool.

    Args:
        work: a module-level function; its job and result cross process borders.
        on_report: called here with whatever a worker passes to `report`.
        names: of the jobs, for messages.

    Raises:
        RunFailure, UsageError: as raised by `work`, or a worker that died. The other workers are stopped.
    """
    if workers <= 1 or len(jobs) <= 1:
        keep_memory()
        for job in jobs:
            yield work(job, on_report)
        return
    pool = [_Worker(work) for _ in range(min(workers, len(jobs)))]
    try:
        yield from _serve(pool, jobs, on_report, names)
    finally:
        for worker in pool:
            worker.stop()


def _serve(pool: list[_Worker], jobs: Sequence[Any], on_report: Report, names: Sequence[str]) -> Iterator[Any]:
    waiting = list(range(len(jobs)))
    busy: dict[Connection, tuple[_Worker, int]] = {}
    idle = list(pool)
    while waiting or busy:
        while waiting and idle:
            worker, number = idle.pop(), waiting.pop(0)
            worker.pipe.send(jobs[number])
            busy[worker.pipe] = (worker, number)
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            worker, number = busy[pipe]
            try:
                kind, content = pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                code = worker.process.exitcode
                why = "killed (out of memory?)" if code == -9 else f"exit code {code}"
                raise RunFailure(
                    f"a worker died while making {names[number]}: {why}; finished shards are kept, run the command again"
                ) from None
            if kind == "report":
                on_report(content)
                continue
            del busy[pipe]
            idle.append(worker)
            if kind == "failed":
                raise content
            yield content


def keep_memory() -> None:
    """Tells glibc to use freed memory again instead of giving it back.

    A site's arrays are of a few MB, which it would take from the kernel and return every time: zeroing those pages anew was
    a quarter of a build's CPU time. Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 16 << 20)):
            mallopt(option, value)


class _Worker:
    """A spawned process (no locks or library state inherited from ours) and the pipe to it."""

    def __init__(self, work: Callable[[Any, Report], Any]) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_loop, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join(10)


def _loop(work: Callable[[Any, Report], Any], pipe: Connection) -> None:
    """Runs jobs until the pipe closes, which it does too when our parent dies."""
    keep_memory()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: Any = ("done", work(job, lambda content: pipe.send(("report", content))))
        except (RunFailure, UsageError) as error:
            answer = ("failed", error)
        except (BrokenPipeError, KeyboardInterrupt):
            return
        except Exception as error:
            traceback.print_exc()
            answer = ("failed", RunFailure(f"{type(error).__name__}: {error}"))
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
