"""Runs a function in N gloo processes: `run_ranks("tests.module:function", 4, arguments)`; each returns JSON-able results."""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.data_folder import REPOSITORY


def run_ranks(target: str, processes: int, argument: Any, folder: Path, timeout_s: float = 540) -> list[Any]:
    """What `target(argument)` returned on each rank. A rank that fails fails the test with its output."""
    from pipeline.launch import free_port, rank_environment

    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "argument.json").write_text(json.dumps(argument))
    running = []
    for rank in range(processes):
        env = {**rank_environment(rank, processes, port), "OMP_NUM_THREADS": "1", "GEOLOOM_LAUNCHER": str(os.getpid())}
        with open(folder / f"rank-{rank}.log", "wb") as log:
            command = [sys.executable, "-m", "tests.rank_jobs", target, str(folder)]
            running.append(subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=log, stderr=log))
    try:
        failed = first_failure(running, timeout_s)
    finally:
        for process in running:
            process.kill()
    for rank, code in failed:
        assert code == 0, (
            f"rank {rank} of {processes} ended {code}:\n{(folder / f'rank-{rank}.log').read_text()[-4000:]}"
        )
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]


def first_failure(running: list[subprocess.Popen[bytes]], timeout_s: float) -> list[tuple[int, int | str]]:
    """(rank, exit code) of the first rank that fails, before its peers wait for it; empty if all end well."""
    waiting = {os.pidfd_open(process.pid): rank for rank, process in enumerate(running)}
    until = time.monotonic() + timeout_s
    try:
        while waiting:
            ended, _, _ = select.select(list(waiting), [], [], max(until - time.monotonic(), 0))
            if not ended:
                return [(min(waiting.values()), f"not in {timeout_s:.0f} s")]
            for descriptor in ended:
                rank = waiting.pop(descriptor)
                os.close(descriptor)
                if code := running[rank].wait():
                    return [(rank, code)]
    finally:
        for descriptor in waiting:
            os.close(descriptor)
    return []


def main() -> None:
    from cluster.ranks import Ranks
    from pipeline.launch import die_with_launcher
    from pipeline.parallel.processes import choose_accelerator, finish, start

    choose_accelerator()

    die_with_launcher()
    module, _, name = sys.argv[1].partition(":")
    folder, ranks = Path(sys.argv[2]), Ranks.from_environment()
    start(ranks, 60.0)
    result = getattr(importlib.import_module(module), name)(json.loads((folder / "argument.json").read_text()))
    (folder / f"result-{ranks.rank}.json").write_text(json.dumps(result))
    finish()


if __name__ == "__main__":
    main()
