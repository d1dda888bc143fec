"""Faults of the tracking store and of SLURM's controller."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.commands import requeue
from cluster.exit_codes import FENCED, REQUEUE
from cluster.rundir import RunDir
from cluster.slurm import commands
from cluster.slurm.requeue import LOOP, Attempt, decide
from pipeline.tracking import RunFacts
from pipeline.tracking.mirror import Mirror, write_record
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.store import MemoryStore, StoreUnavailable
from pipeline.tracking.tracker import Tracker
from tests.faults.campaign import Case, Kind, Result

SERVER_S = 300  # a restart of the server alone takes half a minute on a busy machine


def line(step: int) -> dict[str, Any]:
    return {"step": step, "samples": step * 8, "time": 1000.0 + step, "loss": 1.0 / step}


def new_run(case: Case, steps: int) -> RunDir:
    run = RunDir(str(case.folder / "run"))
    run.write_resolved({"run": {"dir": run.url}})
    run.start_metrics(0)
    for step in range(1, steps + 1):
        run.append_metrics(line(step))
    write_record(run, "faults", "run", RunFacts())
    return run


class Flaky(MemoryStore):
    """Raises at random, before a call or (after) when it has been done: the caller cannot tell which."""

    def __init__(self, case: Case, after: bool) -> None:
        super().__init__()
        self._case, self._after = case, after

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            fails = self._case.rng.random() < 0.3
            if fails and not self._after:
                raise StoreUnavailable("503")
            answer = value(*arguments)
            if fails:
                raise StoreUnavailable("timed out")
            return answer

        return call


def flaky_store(case: Case, after: bool) -> Result:
    run, store = new_run(case, 60), Flaky(case, after)
    mirror, lines = Mirror(run, store), run.read_metrics()
    for _ in range(500):
        with contextlib.suppress(StoreUnavailable):
            mirror.send(lines)
            mirror.end("FINISHED")
            break
    points = object.__getattribute__(store, "runs")[run.run_id]["points"]
    steps = [point.step for point in points if point.key == "loss"]
    wrong = sum(point.value != 1.0 / point.step for point in points if point.key == "loss")
    return Result(
        len(set(range(1, 61)) - set(steps)),
        len(steps) - len(set(steps)),
        wrong,
        "one line on stderr; metrics.jsonl has all",
    )


def mlflow_disturbed(case: Case, disturb: Callable[[Any], None]) -> Result:
    """A real MLflow server, disturbed while a tracker sends; then `pipeline sync`'s work, and a comparison value by value."""
    run, server = new_run(case, 0), case.shared.mlflow
    tracker = Tracker(run, MlflowStore(server.uri), flush_s=0.05)
    disturbed = threading.Thread(target=lambda: (time.sleep(case.rng.random()), disturb(server)))
    disturbed.start()
    began = time.monotonic()
    for step in range(1, 121):
        tracker.log(step, step * 8, run.append_metrics(line(step)))
        time.sleep(0.01)
    waited = time.monotonic() - began
    disturbed.join()
    tracker.close()
    mirror = Mirror(run, MlflowStore(server.uri))
    mirror.send(run.read_metrics())
    faults = mirror.differences()
    steps = [step for step, _ in mirror.store.history(str(run.run_id), "loss")]
    lost, doubled = len(set(range(1, 121)) - set(steps)), len(steps) - len(set(steps))
    return Result(
        lost, doubled, len(faults) + (waited > 30), "tracking: …; the run goes on, metrics are in …/metrics.jsonl"
    )


def restart(server: Any) -> None:
    server.kill()
    server.start()


def freeze(server: Any) -> None:
    server.signal(signal.SIGSTOP)
    time.sleep(2)
    server.signal(signal.SIGCONT)


def controller_away(case: Case) -> Result:
    """slurmctld gives no answer for some of the calls of a requeue; it must be asked again and the start go back into the queue."""
    run = RunDir(str(case.folder / "run"))
    run.append_metrics({"step": 7})
    job = case.folder / "job"
    job.mkdir()
    (job / "job.json").write_text(json.dumps({"run_dir": run.url, "logs_dir": run.logs_url}))
    away, calls, real, slept = case.rng.randint(1, 12), [], commands.call, time.sleep

    def answer(command: Any, timeout_s: float = 60.0) -> str:
        calls.append(command[1])
        if len(calls) <= away and case.rng.random() < 0.9:
            raise commands.ControllerAway(f"scontrol: {commands.AWAY}")
        return "JobId=5 JobState=RUNNING Reason=None\n"

    commands.call, time.sleep = answer, lambda s: None  # type: ignore[assignment]
    os.environ["SLURM_JOB_ID"] = "5"
    parser, out = argparse.ArgumentParser(), io.StringIO()
    requeue.add_arguments(parser)
    try:
        with contextlib.redirect_stdout(out):
            code = requeue.main(parser.parse_args([str(job), "--code", "137"]))
    finally:
        commands.call, time.sleep = real, slept
        del os.environ["SLURM_JOB_ID"]
    attempts = json.loads((job / "attempts.json").read_text())
    wrong = (code != REQUEUE) + (calls[-1] != "requeue") + (len(attempts) != 1)
    return Result(
        lost=int(calls[-1] != "requeue"), doubled=len(attempts) - 1, wrong=wrong, seen=out.getvalue().splitlines()[0]
    )


def crash_loop(case: Case) -> Result:
    """Starts that keep failing: with progress they go on, without it they end within LOOP, saying why."""
    kind = case.rng.choice(["same", "creeping", "killed", "preempted", "mixed", "fenced", "moving"])
    history: list[Attempt] = []
    for i in range(200):
        step = {"creeping": i, "moving": 400 * i}.get(kind, 40)
        error = (
            "a rank was killed by signal 9"
            if kind in ("killed", "creeping", "moving")
            else case.rng.choice(["a", "b", "c"])
        )
        signalled = kind == "preempted" or (kind == "mixed" and case.rng.random() < 0.5)
        last = Attempt("1", i, 0 if signalled else 137, step, error, signalled, saved=step)
        if kind == "fenced":
            last = replace(last, code=FENCED)
        decision = decide(last, history, total_steps=100_000)
        if decision.action == "stop":
            break
        history.append(last)
    if kind == "moving":
        return Result(lost=int(decision.action == "stop"), seen=decision.why)
    return Result(wrong=int(decision.action != "stop" or len(history) >= LOOP), seen=decision.why)


KINDS = [
    Kind("tracking store fails before a call", "each step once, same values", 20, lambda case: flaky_store(case, False)),
    Kind("tracking store fails after a call was done", "each step once, same values", 20, lambda case: flaky_store(case, True)),
    Kind("MLflow server killed and restarted", "training waits for nothing; each step once", 2, lambda case: mlflow_disturbed(case, restart), SERVER_S, 30),
    Kind("MLflow server stops answering", "training waits for nothing; each step once", 3, lambda case: mlflow_disturbed(case, freeze), SERVER_S, 5),
    Kind("SLURM controller away at a requeue", "asked again; back into the queue, one attempt recorded", 16, controller_away),
    Kind("starts that fail again and again (200)", "without progress ended within 20, with progress never", 24, crash_loop),
]  # fmt: skip
