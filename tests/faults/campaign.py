"""Runs kinds of faults, each several times with its own random numbers and a time limit, and counts what was lost."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.patience import patience

HANG_S = 60


@dataclass
class Case:
    """One injection: its random numbers, an empty folder, what all injections share (servers, a shard set), and what is done when
    it is over, however (processes it may have left)."""

    rng: random.Random
    folder: Path
    shared: Any
    ends: ExitStack = field(default_factory=ExitStack)


@dataclass
class Result:
    """lost, doubled, wrong: how many steps, samples or values; seen: what the user is told, or that there was nothing to tell."""

    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    seen: str = ""


@dataclass(frozen=True)
class Kind:
    """holds: what must be true afterwards, which `inject` checks; count: injections of a whole campaign; limit_s: a longer one
    counts as a hang (times `patience`)."""

    name: str
    holds: str
    count: int
    inject: Callable[[Case], Result]
    limit_s: int = HANG_S


@dataclass
class Row:
    kind: Kind
    injections: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    hangs: int = 0
    errors: int = 0  # injections that ended in a way nobody expects
    broken: list[str] = field(default_factory=list)  # what happened, of those that are not clean
    seen: str = ""
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.hangs or self.errors)


class NotInjected(Exception):
    """This machine lacks what the fault needs (a right, a program): the injection does not count."""


class Hang(BaseException):
    """Not an Exception: no `except Exception` on the way may take it for an ordinary failure."""


@contextmanager
def time_limit(seconds: int) -> Any:
    def over(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def aloud(text: str) -> None:
    print(text, flush=True)


def run(
    kinds: Iterable[Kind],
    shared: Any,
    seed: int,
    share: float = 1.0,
    say: Callable[[str], None] = aloud,
) -> list[Row]:
    """Every kind `share` times its count (at least once). Injection i of a kind draws from (seed, kind, i)."""
    rows = []
    for kind in kinds:
        row, began = Row(kind), time.monotonic()
        for i in range(max(1, round(share * kind.count))):
            folder = Path(tempfile.mkdtemp(prefix="geoloom-fault-"))
            case = Case(random.Random(f"{seed} {kind.name} {i}"), folder, shared)
            row.injections += 1
            try:
                with time_limit(round(kind.limit_s * patience())):
                    result = kind.inject(case)
                row.lost, row.doubled, row.wrong = (
                    row.lost + result.lost,
                    row.doubled + result.doubled,
                    row.wrong + result.wrong,
                )
                row.seen = result.seen or row.seen
                if result.lost or result.doubled or result.wrong:
                    row.broken.append(f"injection {i}: {result}")
            except NotInjected as why:
                row.injections -= 1
                row.seen = f"(not injected: {why})"
            except Hang:
                row.hangs += 1
                row.broken.append(f"injection {i}: not over after {kind.limit_s} s")
            except Exception:
                row.errors += 1
                row.broken.append(f"injection {i}: {traceback.format_exc()[-1500:]}")
            finally:
                case.ends.close()
                shutil.rmtree(folder, ignore_errors=True)
        row.seconds = time.monotonic() - began
        say(f"{kind.name}: {row.injections} injections, {row.seconds:.0f} s{'' if row.is_clean else '  <-- NOT CLEAN'}")
        for broken in row.broken[:3]:
            say(f"  {broken}")
        rows.append(row)
    return rows


def table(rows: Iterable[Row]) -> str:
    """Markdown: per kind what was injected, what was lost, and what the user sees."""
    lines = [
        "| kind | must hold | injections | lost | doubled | wrong | hangs | what its user sees |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = list(rows)
    for row in rows:
        seen = " ".join(row.seen.split()).replace("|", "\\|")[:160]
        lines.append(
            f"| {row.kind.name} | {row.kind.holds} | {row.injections} | {row.lost} | {row.doubled} | {row.wrong + row.errors} | "
            f"{row.hangs} | {seen} |"
        )
    total = [sum(getattr(row, name) for row in rows) for name in ("injections", "lost", "doubled", "wrong", "hangs")]
    total[3] += sum(row.errors for row in rows)
    lines.append(f"| **{len(rows)} kinds** |  | " + " | ".join(f"**{number}**" for number in total) + " |  |")
    return "\n".join(lines)
