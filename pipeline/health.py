"""Nothing shrugs: non-finite figures and skipped updates stop every rank, a stall names the rank that lags, spikes are told."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from cluster.errors import Fenced, RunFailure
from cluster.logs import record_failure
from cluster.ranks import Ranks
from cluster.rundir import RunDir

PHASES = ("start", "data", "teacher", "student", "update", "log", "probe", "save", "end")
PATIENCE, SLOW_PHASES = 10, ("start", "probe", "save", "end")  # these may take so many times longer than the rest
ALARM, RAISED, ANSWER_S = "stalled", "raised", 10.0
log = logging.getLogger(__name__)


class AgreedFailure(RunFailure):
    """A failure every rank has found at the same place: the first rank tells it, the others stay quiet."""


def check_step(step: int, result: Any, keys: Sequence[str], ranks: Ranks) -> None:
    """Raises AgreedFailure on all ranks if the step's loss or gradient is not finite, or its update was skipped.

    `result` holds figures averaged over ranks, so all ranks see the same; the keys of the step's samples are gathered only then.
    """
    bad = [name for name, value in {"loss": result.loss, **result.metrics}.items() if not math.isfinite(value)]
    if not math.isfinite(result.grad_norm):
        bad.append("grad_norm")
    if not bad and result.applied:
        return
    gathered: list[Any] = [list(keys)]
    if ranks.world > 1:
        gathered = [None] * ranks.world
        dist.all_gather_object(gathered, list(keys))
    samples = ", ".join(f"rank {rank}: {' '.join(k)}" for rank, k in enumerate(gathered))
    loads = {
        name.removeprefix("moe/load/"): round(v, 4)
        for name, v in result.metrics.items()
        if name.startswith("moe/load/")
    }
    what = f"{', '.join(bad)} not finite" if bad else "the update was skipped (gradient overflow)"
    raise AgreedFailure(
        f"step {step}: {what}; samples {samples}; expert loads {json.dumps(loads) if loads else 'none'}"
    )


class FencedTogether(AgreedFailure, Fenced):
    """Another start has taken the run directory over, and every rank of this one knows."""


class SpikeWatch:
    """Tells when the loss leaves what it has lately been: above mean + `sigmas` standard deviations of the last `window` steps."""

    def __init__(self, window: int = 100, sigmas: float = 6.0, least: int = 20) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.sigmas, self.least = sigmas, least

    def spike(self, loss: float) -> float | None:
        """How many deviations above the recent mean `loss` lies, if that is a spike. Spikes do not enter the window twice."""
        size = len(self.recent)
        height = None
        if size >= self.least:
            mean = sum(self.recent) / size
            deviation = math.sqrt(sum((x - mean) ** 2 for x in self.recent) / size) + 1e-3 * abs(mean) + 1e-12
            if loss > mean + self.sigmas * deviation:
                height = (loss - mean) / deviation
        self.recent.append(loss)
        return height


def interval_s(timeout_s: float) -> float:
    """How often a rank tells its place and looks at its clock."""
    return min(5.0, timeout_s / 8)


def collective_timeout_s(timeout_s: float) -> float:
    """Time limit of collectives beside a watch of `timeout_s`: the watch speaks first, in every phase and also where nobody answers
    it. A collective that gave up before would end the rank without naming anybody."""
    return PATIENCE * timeout_s + 5 * interval_s(timeout_s) + 3 * ANSWER_S


class Heartbeat:
    """Where this rank is, published for the others; a thread ends the rank if it stands still, naming who lags.

    A rank that hangs (a stuck read, a stopped process) makes the others wait in a collective for ever; their stack traces
    show only waiting. So each rank tells a store its step and phase; after `timeout_s` without progress every rank that
    waits compares, says who is behind or silent, and ends with code 1, which ends the job. Before that, every rank that can
    writes where its threads stand (`logs/stacks-00003.txt`).

    The store lives in the first rank's process: should that one be stopped, nobody gets an answer. So nothing that asks it runs in
    the thread that watches the clock, and asking has a time limit.
    """

    def __init__(self, ranks: Ranks, timeout_s: float, rundir: RunDir | None) -> None:
        self.ranks, self.timeout_s, self.rundir = ranks, timeout_s, rundir
        self.step, self.phase, self._moved = 0, "start", time.monotonic()
        self._interval = interval_s(timeout_s)
        self._count = 0
        self._over = threading.Event()
        self._store = dist.TCPStore(ranks.address, ranks.port, None, False) if ranks.world > 1 else None
        self._dumped = False
        for target in (self._watch, self._tell):
            threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True).start()

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank now does `phase` (of PHASES) of `step`."""
        self.step, self.phase = self.step if step is None else step, phase
        self._moved = time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            waited = time.monotonic() - self._moved
            if waited > self.timeout_s * (PATIENCE if self.phase in SLOW_PHASES else 1):
                self._end(waited)

    def _tell(self) -> None:
        """Publishes this rank's place, and writes its stacks when another rank has raised the alarm. May hang with the store."""
        while not self._over.wait(self._interval):
            try:
                self._publish()
                if self._store is not None and self._store.check([ALARM]):
                    self._dump_stacks()
            except Exception:  # the store has gone: the watch notices what that means
                return

    def _dump_stacks(self) -> None:
        """Where every thread of this process stands, to stderr and into the run directory; once."""
        if self._dumped:
            return
        self._dumped = True
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = f"rank {self.ranks.rank} in {self.phase} of step {self.step}\n{file.read()}"
        print(text, file=sys.stderr, flush=True)
        if self.rundir is not None:
            with contextlib.suppress(Exception):
                self.rundir.write(f"logs/stacks-{self.ranks.rank:05d}.txt", text.encode())

    def _publish(self) -> None:
        self._count += 1
        if self._store is not None:
            self._store.set(f"beat/{self.ranks.rank}", json.dumps([self.step, PHASES.index(self.phase), self._count]))

    def _end(self, waited: float) -> None:
        # the alarm first: a store that does not take it answers nothing else, and who waits need not wait for more
        answer = within(ANSWER_S, self._raise_alarm)
        if answer == RAISED:
            answer = within(4 * self._interval + ANSWER_S, self._who_lags)
        lag = answer or "rank 0, which keeps everybody's place, does not answer: it is stopped, or its node is gone"
        if self._over.is_set():
            return
        message = f"no progress for {waited:.0f} s in step {self.step} ({self.phase}); {lag}"
        self._dump_stacks()
        print(f"pipeline train: rank {self.ranks.rank}: {message}", file=sys.stderr, flush=True)
        if self.rundir is not None:
            record_failure(self.rundir.logs_url, self.ranks.rank, self.step, RunFailure(message), self.rundir.lease)
        os._exit(1)

    def _raise_alarm(self) -> str:
        if self._store is not None:
            self._store.set(ALARM, "1")
        return RAISED

    def _who_lags(self) -> str:
        before = self._read_all()
        time.sleep(2.5 * self._interval)
        self._publish()
        return describe_lag(before, self._read_all())

    def _read_all(self) -> list[list[int] | None]:
        if self._store is None:
            return [[self.step, PHASES.index(self.phase), self._count]]
        keys = [f"beat/{rank}" for rank in range(self.ranks.world)]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]


def within(seconds: float, ask: Callable[[], str]) -> str | None:
    """What `ask` answers, or what went wrong with it; None if it takes longer."""
    answers: list[str] = []

    def call() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # the store's host may be what died
            answers.append(f"others cannot be asked: {error}")

    thread = threading.Thread(target=call, name="heartbeat-ask", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def describe_lag(before: Sequence[Sequence[int] | None], after: Sequence[Sequence[int] | None]) -> str:
    """Who holds up the job, from two looks at [step, phase, beats] of every rank (None: never heard of)."""
    silent = [r for r, (a, b) in enumerate(zip(before, after)) if b is None or (a is not None and a[2] == b[2])]
    if silent:
        places = [f"rank {r} is silent, last seen {_place(after[r])}" for r in silent]
        return "; ".join(places)
    known = [(beat[0], beat[1], rank) for rank, beat in enumerate(after) if beat is not None]
    least = min(known)[:2]
    behind = [rank for step, phase, rank in known if (step, phase) == least]
    if len(behind) == len(known):
        return f"all ranks stand {_place(after[0])}"
    return "; ".join(f"rank {r} lags, {_place(after[r])}" for r in behind)


def _place(beat: Sequence[int] | None) -> str:
    return "never" if beat is None else f"in {PHASES[beat[1]]} of step {beat[0]}"
