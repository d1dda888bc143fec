"""`--processes N`: this machine's own launcher. No torch. Ranks die with it, and with each other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from cluster.exit_codes import REQUEUE

# Between one rank's end and the killing of the others: one that was killed leaves them waiting in a collective, one that ended
# by itself has found something that they are about to find and tell, too.
GRACE_KILLED_S, GRACE_ENDED_S = 2.0, 15.0
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `python -m pipeline ARGUMENTS` as N ranks of one job; returns the job's exit code.

    SIGTERM, SIGUSR1 and SIGINT are passed on to every rank. The first rank that ends with a code other than 0 ends the job:
    the others get a few seconds, then SIGKILL.
    """
    port = free_port()
    ranks = [subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], env=rank_environment(rank, processes, port), start_new_session=True,
    ) for rank in range(processes)]  # fmt: skip
    previous = {number: signal.signal(number, lambda n, _: _send(ranks, n)) for number in FORWARDED}
    try:
        return _wait(ranks)
    finally:
        _send(ranks, signal.SIGKILL)
        for rank in ranks:
            rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_launcher() -> None:
    """Called by a rank: the kernel kills it when the launcher dies, even by SIGKILL (Linux; elsewhere nothing happens)."""
    parent = os.environ.get("GEOLOOM_LAUNCHER")
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call
        os._exit(1)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((i for i, code in enumerate(codes) if code), None)
        if failed is not None:
            return _end(ranks, failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen], failed: int) -> int:
    """Waits out the grace time and tells who went first, unless every rank ended alike (then it said so itself)."""
    deadline = time.monotonic() + (GRACE_KILLED_S if ranks[failed].returncode < 0 else GRACE_ENDED_S)
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    code = ranks[failed].returncode
    if code != REQUEUE and any(rank.poll() != code for rank in ranks):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        print(f"pipeline train: rank {failed} of {len(ranks)} {how}; the job stops", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _send(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Variables of one local rank: its place, where the ranks meet, its share of the cores."""
    threads = max((os.cpu_count() or 1) // world, 1)
    return {
        "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **os.environ,
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GEOLOOM_LAUNCHER": str(os.getpid()),
    }  # fmt: skip


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
