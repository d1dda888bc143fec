"""What tracking costs a training step while the MLflow server is up, killed, hanging or back again, and whether a step is lost.

  python -m pipeline bench tracking                          # three rounds, under three minutes
  python -m pipeline bench tracking --log-every 10 --json    # as often as a run logs by default
  python -m pipeline bench tracking --rounds 1 --seconds 3   # a quick look

One process trains a small model (whole optimizer steps, one torch thread) and logs as a run does: system metrics, metrics.jsonl,
the tracker. A real `mlflow server` on SQLite runs beside it and is killed, started, stopped and continued. Every round goes
through all conditions, and ratios are taken within a round.

Median steps hide what comes every two seconds only, so means stand beside them. On a shared machine both move with its load;
the counts of seconds hardly do: those the training thread spends in logging, and the CPU time of the tracker's thread, which is
about the most that it can take away through the interpreter lock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CONDITIONS = {
    "none": "nothing is logged",
    "files": "metrics.jsonl only (tracking.uri=none)",
    "up": "the server answers",
    "killed": "kill -9: connections are refused",
    "restarted": "started again, until it has caught up",
    "hanging": "SIGSTOP: it accepts and never answers",
    "continued": "SIGCONT, until it has caught up",
}
LIMIT = 0.01  # of a step
WAIT_S = 120.0  # for the server to start, and for the mirror to catch up
OVERRIDES = [
    "run.dir=unused", "tracking.uri=none", "parallel.ep=1", "objective.ita_weight=0", "train.batch=2", "train.steps=1000000",
    "data.views_global.hr_px=64", "data.views_global.series_px=4", "data.views_global.s2_dates=2", "data.views_global.s1_dates=2",
    "data.views_local.hr_px=32", "data.views_local.series_px=4", "data.views_local.s2_dates=2", "data.views_local.s1_dates=2",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of training per condition and round (default 4)")
    parser.add_argument(
        "--log-every", type=int, default=1, metavar="N", help="steps per logged line (default 1; a run's default is 10)"
    )
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
    from cluster.cli import print_json
    from pipeline.parallel.processes import finish

    with tempfile.TemporaryDirectory(prefix="geoloom-bench-") as folder, contextlib.ExitStack() as stack:
        server = Server(Path(folder))
        stack.callback(server.kill)
        server.start()
        trainer = Trainer(folder, args.log_every)
        trainer.spell(None, 1.0)  # first steps are slow
        trainer.open(server.uri)
        trainer.settle(trainer.spell(trainer.tracked, 1.0, lambda: trainer.tracker.run_id is not None))
        first_s = _thread_s()
        rounds = [_round(trainer, server, args.seconds) for _ in range(args.rounds)]
        report: dict[str, Any] = {
            "log_every": args.log_every, "values_per_line": trainer.num_values, "first_contact_cpu_s": first_s,
            "conditions": _figures(rounds), "check": trainer.end(),
        }  # fmt: skip
    _print(report)
    if args.json:
        print_json({"tracking": report})
    finish(0 if report["check"]["differences"] == 0 else 1)


def _round(trainer: Trainer, server: Server, seconds: float) -> dict[str, Spell]:
    """Once through all conditions; each but the ends of the outages starts with a store that is level."""
    spells = {"none": trainer.spell(None, seconds), "files": trainer.spell(trainer.files, seconds)}

    def tracked(condition: str, until: Callable[[], bool] = lambda: True) -> Spell:
        before = server.cpu_s()
        spells[condition] = trainer.spell(trainer.tracked, seconds, until)
        if condition not in ("killed", "hanging"):
            trainer.settle(spells[condition])
            spells[condition].server_s = server.cpu_s() - before
        return spells[condition]

    def caught_up() -> Callable[[], bool]:
        last = trainer.step
        return lambda: trainer.tracker.newest_step >= last - last % trainer.log_every

    tracked("up")
    server.kill()
    tracked("killed")
    server.start()
    tracked("restarted", caught_up())
    server.signal(signal.SIGSTOP)
    tracked("hanging")
    server.signal(signal.SIGCONT)
    tracked("continued", caught_up())
    return spells


@dataclass
class Spell:
    """Training under one condition. steps_s: wall seconds of each step, logging included. Seconds in all:
    log_s the training thread in `StepLog.write`, door_s the part of it in the tracker, thread_s CPU time of the
    tracker's thread until the store was level, server_s CPU time of the server."""

    steps_s: list[float] = field(default_factory=list)
    log_s: float = 0.0
    door_s: float = 0.0
    thread_s: float = 0.0
    server_s: float = 0.0


class Trainer:
    """A small model, one batch that is used again and again, and two run directories: one mirrored, one not."""

    files: Any  # StepLogs
    tracked: Any

    def __init__(self, folder: str, log_every: int) -> None:
        import torch

        from cluster.config import load
        from cluster.ranks import Ranks
        from model.losses.reduce import SingleProcess
        from pipeline.bench.loader_data import make_set
        from pipeline.config import PretrainConfig
        from pipeline.launch import free_port
        from pipeline.parallel.layout import Layout
        from pipeline.parallel.processes import start
        from pipeline.reader.reader import Reader

        torch.set_num_threads(1)
        shards = make_set(f"{folder}/shards", 8, "npy", hr_px=160, series_px=16, s2_dates=4, s1_dates=4)
        demo = Path(__file__).parents[1] / "runs" / "demo.yaml"
        self._config = config = load(PretrainConfig, str(demo), [*OVERRIDES, f"data.url={shards}"])
        ranks = Ranks(port=free_port())
        self._layout, self._device = Layout.of(config, ranks), start(ranks, 600.0)
        from pipeline.engine import Engine  # after `start`, which sets what DeepSpeed reads on import
        from pipeline.first_weights import first_networks

        self._reader = Reader(config.data, config.model, seed=0, batch_per_rank=self._layout.batch)
        bands = {name: found.to_dict() for name, found in self._reader.statistics.items()}
        self._parts = [next(iter(self._reader)).to(self._device)]
        student, teacher = first_networks(config, self._layout, bands, self._reader.classes, self._device)
        self._engine = Engine(student, teacher, config, self._layout, self._device, SingleProcess())
        self._folder, self._uri, self.step, self.log_every = folder, "", 0, log_every

    def open(self, uri: str) -> None:
        """Starts both run directories, the second with a tracker on `uri`, as `pipeline.train` does."""
        self._uri = uri
        self.files, self.tracked = self._step_log("files", "none"), self._step_log("tracked", uri)

    @property
    def tracker(self) -> Any:
        return self.tracked.tracker.tracker

    def _step_log(self, name: str, uri: str) -> Any:
        from cluster.rundir import RunDir
        from model.counts import table
        from pipeline.steplog import StepLog
        from pipeline.train import open_run

        config = replace(self._config, run=replace(self._config.run, dir=f"{self._folder}/{name}"))
        config = replace(config, tracking=replace(config.tracking, uri=uri))
        rundir = RunDir(config.run.dir)
        rundir.claim()
        tracker = open_run(config, rundir, self._layout, self._reader, 0)
        flops = float(table(config)["flops_per_sample"]["train"])
        return StepLog(rundir, Door(tracker), self._layout, self._device, flops, 0, config.train.steps, 0.0)

    @property
    def num_values(self) -> int:
        return len(self.tracked.rundir.read_metrics()[-1]) - 2  # without step and time

    def spell(self, log: Any, seconds: float, until: Callable[[], bool] = lambda: True) -> Spell:
        """Trains for `seconds`, and on until `until()`, logging to `log` (None: nowhere).

        Raises:
            RunFailure: `until` did not come true within WAIT_S.
        """
        from cluster.errors import RunFailure

        spell, door = Spell(), log.tracker if log is not None else None
        inside, before_s = door.inside_s if door else 0.0, _thread_s()
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds or not until():
            if passed > WAIT_S:
                raise RunFailure(f"the MLflow server has not caught up within {WAIT_S:.0f} s")
            began = time.perf_counter()
            samples = (self.step + 1) * self._layout.batch
            result = self._engine.step(self._parts, samples - self._layout.batch)
            self.step += 1
            if log is not None and self.step % self.log_every == 0:
                logging = time.perf_counter()
                log.write(self.step, samples, result, self._reader.metrics())
                spell.log_s += time.perf_counter() - logging
            spell.steps_s.append(time.perf_counter() - began)
        spell.thread_s = _thread_s() - before_s
        spell.door_s = door.inside_s - inside if door else 0.0
        return spell

    def settle(self, spell: Spell) -> None:
        """Waits without training until the store has everything; the CPU time of that belongs to `spell`."""
        before_s, deadline = _thread_s(), time.monotonic() + WAIT_S
        while not self.tracker.is_level and time.monotonic() < deadline:
            time.sleep(0.02)
        spell.thread_s += _thread_s() - before_s

    def end(self) -> dict[str, int]:
        """Closes the run; compares MLflow with metrics.jsonl: lines, values, and how many of these differ."""
        from pipeline.tracking.mirror import Mirror, points_of
        from pipeline.tracking.mlflow_store import MlflowStore

        rundir = self.tracked.rundir
        rundir.close()
        self.tracker.close()
        lines = rundir.read_metrics()
        values = sum(len(points_of(line)) for line in lines)
        differences = Mirror(rundir, MlflowStore(self._uri)).differences()
        return {"lines": len(lines), "values": values, "differences": len(differences), "failed": self.tracker.failures}


class Door:
    """A tracker that counts the seconds its caller spends in it."""

    def __init__(self, tracker: Any) -> None:
        self.tracker, self.inside_s = tracker, 0.0

    def log(self, *arguments: Any) -> None:
        began = time.perf_counter()
        self.tracker.log(*arguments)
        self.inside_s += time.perf_counter() - began

    def tag(self, *arguments: Any) -> None:
        began = time.perf_counter()
        self.tracker.tag(*arguments)
        self.inside_s += time.perf_counter() - began


def _thread_s() -> float:
    """CPU seconds of the tracker's thread so far; 0 before it runs. Exact, where /proc counts in hundredths of a second."""
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name == "tracker" and t.ident]
    return sum(time.clock_gettime(clock) for clock in clocks)


class Server:
    """`mlflow server` with its workers as one process group, on a free loopback port that it keeps over restarts."""

    def __init__(self, folder: Path) -> None:
        from pipeline.launch import free_port

        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns when it answers. Raises RunFailure if it ends, or stays silent for WAIT_S."""
        from cluster.errors import RunFailure

        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", f"{self._folder}/artifacts", "--serve-artifacts", "--host", "127.0.0.1",
            "--port", str(self._port), "--workers", "1",
        ]  # fmt: skip
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        settings["MLFLOW_SQLALCHEMYSTORE_POOL_SIZE"] = "20"  # ours for clients is 2
        log = self._folder / "server.log"
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True, cwd=self._folder, env={**os.environ, **settings}
            )  # fmt: skip
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.1)
        raise RunFailure(f"mlflow server did not come up: {log.read_text()[-1000:]}")

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """`kill -9`; the store stays."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def cpu_s(self) -> float:
        """CPU seconds since it started."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def _tree(self) -> Iterator[Any]:
        import psutil

        if self._process is not None and self._process.poll() is None:
            parent = psutil.Process(self._process.pid)
            yield from (parent, *parent.children(recursive=True))


def _figures(rounds: list[dict[str, Spell]]) -> dict[str, dict[str, float]]:
    """Per condition; milliseconds are per step, shares are of the median step without logging."""
    base_ms = 1000 * statistics.median(statistics.median(spells["none"].steps_s) for spells in rounds)
    figures = {}
    for condition in CONDITIONS:
        found = [spells[condition] for spells in rounds]
        steps = sum(len(spell.steps_s) for spell in found)
        row: dict[str, float] = {"steps": steps}
        row["median_ms"] = 1000 * statistics.median(statistics.median(spell.steps_s) for spell in found)
        for name, middle in (("median", statistics.median), ("mean", statistics.fmean)):
            ratios = [middle(spells[condition].steps_s) / middle(spells["none"].steps_s) for spells in rounds]
            low, row[f"{name}_ratio"], high = _quartiles(ratios)
            row |= {f"{name}_ratio_q1": low, f"{name}_ratio_q3": high}
        for name in ("log", "door", "thread", "server"):
            row[f"{name}_ms"] = 1000 * sum(getattr(spell, f"{name}_s") for spell in found) / steps
            row[f"{name}_share"] = row[f"{name}_ms"] / base_ms
        figures[condition] = row
    return figures


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _print(report: dict[str, Any]) -> None:
    print(f"first contact, once per run: {report['first_contact_cpu_s']:.2f} s of CPU time in the tracker's thread")
    print(f"a line of {report['values_per_line']} values every {report['log_every']} step(s); ms and % are per step")
    head = ("condition", "steps", "median ms", "× none [quartiles]", "mean × none [quartiles]", "in logging", "of it in tracker", "tracker thread", "server")  # fmt: skip
    widths = (10, 6, 10, 22, 24, 16, 18, 16, 9)
    print(" ".join(f"{word:>{width}}" for word, width in zip(head, widths)))
    for name, row in report["conditions"].items():
        ratios = [
            f"{row[f'{m}_ratio']:.3f} [{row[f'{m}_ratio_q1']:.3f}, {row[f'{m}_ratio_q3']:.3f}]"
            for m in ("median", "mean")
        ]
        seconds = [f"{row[f'{part}_ms']:.3f} {row[f'{part}_share']:7.3%}" for part in ("log", "door", "thread")]
        cells = (name, f"{row['steps']:.0f}", f"{row['median_ms']:.1f}", *ratios, *seconds, f"{row['server_ms']:.1f}")
        print(" ".join(f"{word:>{width}}" for word, width in zip(cells, widths)))
    print("".join(f"  {name}: {words}\n" for name, words in CONDITIONS.items()), end="")
    rows = report["conditions"]
    worst = max((name for name in rows if name not in ("none", "files")), key=lambda name: _cost(rows, name))
    cost = _cost(rows, worst)
    verdict = "within" if cost < LIMIT else "ABOVE"
    print(f"the mirror costs at most {cost:.2%} of a step ({worst}): {verdict} {LIMIT:.0%}")
    check = report["check"]
    print(f"after {check['failed']} failed attempts: {check['lines']} lines, {check['values']} values, {check['differences']} differ from MLflow")  # fmt: skip


def _cost(rows: dict[str, dict[str, float]], name: str) -> float:
    """Share of a step, from counted seconds: the training thread in the tracker, and the tracker's thread."""
    return rows[name]["door_share"] + rows[name]["thread_share"]
