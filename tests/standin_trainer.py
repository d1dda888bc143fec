"""Stands in for `python -m pipeline train` where a test is about SLURM, not about training: counts instead of learning.

It keeps the trainer's conventions: metrics through RunDir, a checkpoint every few steps, SIGUSR1 and SIGTERM mean "stop after
this step with a checkpoint and exit code 85", failures are recorded. config: {"run": {"dir"}, "train": {"steps"}, "test":
{"step_s", "every", "hang_at" (in the first start, deaf to signals), "fail_at" (step) or "fail_after" (steps from where it goes on),
"how": "raise" | "other" (another error in each start) | "kill" (kill -9) | "stop" (as if asked to)}}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from cluster import logs, storage
from cluster.errors import Fenced
from cluster.exit_codes import FENCED, REQUEUE
from cluster.rundir import RunDir


def fail(how: str, stop: list[int]) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        stop.append(signal.SIGUSR1)
    else:
        word = "".join(chr(ord("a") + int(digit)) for digit in os.environ.get("SLURM_RESTART_COUNT", "0"))
        raise ValueError(f"bad sample {word if how == 'other' else ''} seen by process {os.getpid()}")


def main(config_path: str) -> int:
    config = json.loads(Path(config_path).read_text())
    test = {"step_s": 0.02, "every": 10, "fail_at": None, "how": "raise", **config.get("test", {})}
    stop: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    run, rank = RunDir(config["run"]["dir"]), int(os.environ["SLURM_PROCID"])
    checkpoint = storage.join(run.checkpoints_url, "LATEST")
    step = int(storage.read_bytes(checkpoint)) if storage.exists(checkpoint) else 0
    fail_at = step + test["fail_after"] if "fail_after" in test else test["fail_at"]
    print("meets at", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], "from", step, flush=True)
    if rank == 0:
        run.claim()
        run.start_metrics(step)

    def save() -> None:
        if rank == 0:
            run.check_claim()
            run.sync()
            storage.write_atomic(checkpoint, str(step).encode())

    try:
        while step < config["train"]["steps"]:
            step += 1
            time.sleep(test["step_s"])
            if step == test.get("hang_at") and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
                time.sleep(3600)
            if step == fail_at:
                fail(test["how"], stop)
                if test["how"] == "stop":  # before this step is done: it comes no further
                    return REQUEUE
            if rank == 0:
                run.append_metrics({"step": step, "loss": 1 / step, "samples_per_s": 3.5})
            if stop or step % test["every"] == 0:
                save()
            if stop:
                return REQUEUE
    except Fenced:
        return FENCED
    except Exception as error:
        logs.record_failure(run.logs_url, rank, step, error)
        raise
    run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
