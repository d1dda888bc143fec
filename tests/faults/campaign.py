"""Runs kinds of faults, each several times with its own random numbers and a time limit, and counts what was lost.

Every finished injection is one JSON line of a record, so that a campaign that was cut off goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.progress import clock
from tests.data_folder import REPOSITORY
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
    counts as a hang (times `patience`); cost_s: what one takes on two free cores, for the time left."""

    name: str
    holds: str
    count: int
    inject: Callable[[Case], Result]
    limit_s: int = HANG_S
    cost_s: float = 1.0


@dataclass
class Outcome:
    """What became of injection `number` of a kind. error: it ended in a way nobody expects; skipped: it could not be injected."""

    kind: str
    number: int
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    hang: bool = False
    error: bool = False
    skipped: bool = False
    seen: str = ""
    broken: str = ""
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.hang or self.error)


@dataclass
class Row:
    """All injections of a kind."""

    kind: Kind
    outcomes: list[Outcome] = field(default_factory=list)

    def _sum(self, name: str) -> int:
        return sum(getattr(one, name) for one in self.outcomes)

    @property
    def injections(self) -> int:
        return sum(not one.skipped for one in self.outcomes)

    @property
    def lost(self) -> int:
        return self._sum("lost")

    @property
    def doubled(self) -> int:
        return self._sum("doubled")

    @property
    def wrong(self) -> int:
        return self._sum("wrong")

    @property
    def hangs(self) -> int:
        return self._sum("hang")

    @property
    def errors(self) -> int:
        return self._sum("error")

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.outcomes)

    @property
    def seen(self) -> str:
        return next((one.seen for one in reversed(self.outcomes) if one.seen), "")

    @property
    def broken(self) -> list[str]:
        """What happened, of those that are not clean."""
        return [f"injection {one.number}: {one.broken}" for one in self.outcomes if one.broken]

    @property
    def is_clean(self) -> bool:
        return all(one.is_clean for one in self.outcomes)


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


class Record:
    """Outcomes of a campaign in a file, one JSON line each; several processes may add to it. Lines of another seed or of other code
    do not count."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed, self._code = path, seed, code_digest()
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[tuple[str, int], Outcome]:
        """What is done, by kind and number."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:  # killed while it was written
                continue
            if (entry.pop("seed"), entry.pop("code")) == (self.seed, self._code):
                found[entry["kind"], entry["number"]] = Outcome(**entry)
        return found

    def add(self, outcome: Outcome) -> None:
        line = json.dumps({"seed": self.seed, "code": self._code, **asdict(outcome)})
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            torn = file.tell() and self.path.read_bytes()[-1:] != b"\n"
            file.write(("\n" if torn else "") + line + "\n")


def code_digest() -> str:
    """Of all our Python: what an outcome says, it says of this code."""
    digest = hashlib.sha256()
    for box in ("cluster", "data_prep", "model", "pipeline", "tests"):
        for path in sorted((REPOSITORY / box).rglob("*.py")):
            digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def aloud(text: str) -> None:
    print(text, flush=True)


def numbers(kind: Kind, share: float) -> range:
    """The injections of a kind: `share` times its count, at least one."""
    return range(max(1, round(share * kind.count)))


def inject(kind: Kind, number: int, shared: Any, seed: int) -> Outcome:
    """One injection, which draws from (seed, kind, number)."""
    outcome, began = Outcome(kind.name, number), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="geoloom-fault-"))
    case = Case(random.Random(f"{seed} {kind.name} {number}"), folder, shared)
    try:
        with time_limit(round(kind.limit_s * patience())):
            result = kind.inject(case)
        outcome.lost, outcome.doubled, outcome.wrong = result.lost, result.doubled, result.wrong
        outcome.seen = result.seen
        if not outcome.is_clean:
            outcome.broken = str(result)
    except NotInjected as why:
        outcome.skipped, outcome.seen = True, f"(not injected: {why})"
    except Hang:
        outcome.hang, outcome.broken = True, f"not over after {kind.limit_s} s\n{traceback.format_exc()[-1500:]}"
    except Exception:
        outcome.error, outcome.broken = True, traceback.format_exc()[-1500:]
    finally:
        case.ends.close()
        shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = round(time.monotonic() - began, 2)
    return outcome


def run(
    kinds: Sequence[Kind],
    shared: Any,
    seed: int,
    share: float = 1.0,
    say: Callable[[str], None] = aloud,
    record: Record | None = None,
) -> list[Row]:
    """Every kind `share` times its count (at least once), without those that the record holds already."""
    done = record.read() if record is not None else {}
    rows = collect(kinds, share, done)
    total = sum(len(numbers(kind, share)) for kind in kinds)
    finished = sum(len(row.outcomes) for row in rows)
    if finished:
        say(f"{finished} of {total} injections stand in {record.path if record else ''} already")
    began, spent = time.monotonic(), 0.0
    left = sum(row.kind.cost_s * (len(numbers(row.kind, share)) - len(row.outcomes)) for row in rows)
    for row in rows:
        kind, there = row.kind, {one.number for one in row.outcomes}
        for number in numbers(kind, share):
            if number in there:
                continue
            outcome = inject(kind, number, shared, seed)
            row.outcomes.append(outcome)
            if record is not None:
                record.add(outcome)
            finished, spent, left = finished + 1, spent + kind.cost_s, left - kind.cost_s
            elapsed = time.monotonic() - began
            say(
                f"faults {finished}/{total}  {clock(elapsed)} elapsed, {clock(elapsed / spent * left)} left  {kind.name}: "
                f"{outcome.seconds:.0f} s{'' if outcome.is_clean else f'  <-- NOT CLEAN: {outcome.broken}'}"
            )
    return rows


def collect(kinds: Iterable[Kind], share: float, done: dict[tuple[str, int], Outcome]) -> list[Row]:
    """What is done of a campaign, by kind."""
    return [
        Row(kind, [done[kind.name, number] for number in numbers(kind, share) if (kind.name, number) in done])
        for kind in kinds
    ]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The campaign as JSON: per kind and in all."""
    names = ("injections", "lost", "doubled", "wrong", "errors", "hangs", "seconds")
    return {
        "kinds": [
            {"kind": row.kind.name, "holds": row.kind.holds, **{name: getattr(row, name) for name in names}, "seen": row.seen,
             "broken": row.broken}
            for row in rows
        ],
        "total": {"kinds": sum(row.injections > 0 for row in rows)}
        | {name: sum(getattr(row, name) for row in rows) for name in names},
    }  # fmt: skip


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
