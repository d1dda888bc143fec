"""An ablation as one table: per run the key it changes, and what that did to every score of the base run.

Whether a difference is clear is told by the paired interval of the difference (`paired.py`), and where a run kept no outcomes of its
test sites by the older, blunter rule: the two runs' own intervals do not touch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipeline.compare.figures import Interval, Summary
from pipeline.compare.load import RunData
from pipeline.compare.paired import Pairs
from pipeline.compare.terminal import shown
from pipeline.compare.verdict import differing
from pipeline.probes.scores import Difference

ONE_SEED = "one seed each: whether another seed would say the same is not decided (--seeds 3)"


@dataclass(frozen=True)
class Change:
    """A score, its difference to the base's, and whether that is clear; paired: by the paired interval, None by the own ones."""

    score: Interval
    difference: float
    clear: bool
    paired: Difference | None

    def __str__(self) -> str:
        """`0.712 +0.143 [+0.05, +0.23] *`, or `0.712 +0.143 †` without a pair."""
        difference = str(self.paired) if self.paired else f"{self.difference:+.3f}{' †' if self.clear else ''}"
        return f"{self.score.value:.3f} {difference}"


@dataclass(frozen=True)
class Effect:
    """What one run changes against the base, and its scores with their differences to the base's.

    Attributes:
        changed: `key: old → new`; more than one means that the run is no clean ablation.
    """

    run: str
    changed: list[str]
    probes: dict[str, Change]
    loss: float | None
    samples_per_s: float | None

    @property
    def is_clean(self) -> bool:
        return len(self.changed) == 1


def effects(runs: Sequence[RunData], summaries: Sequence[Summary], pairs: Pairs) -> list[Effect]:
    """One effect per run, the base first (which changes nothing)."""
    found = []
    for run, summary, paired in zip(runs, summaries, pairs.differences, strict=True):
        changed = [f"{key}: {shown(a)} → {shown(b)}" for key, (a, b) in differing([runs[0], run]).items()]
        probes = {
            key: _change(score, base, paired.get(key))
            for key, score in summary.probes.items() if (base := summaries[0].probes.get(key)) is not None
        }  # fmt: skip
        found.append(Effect(run.name, changed, probes, summary.losses.get("loss"), summary.speed.get("samples_per_s")))
    return found


def show_ablation(runs: Sequence[RunData], summaries: Sequence[Summary], pairs: Pairs) -> None:
    """Prints the table to stdout, and by which rule differences are marked."""
    found = effects(runs, summaries, pairs)
    keys = headline_probes(found)
    table = Table(title=f"Ablation of {runs[0].name}: {legend(found, keys)}", title_justify="left")
    for head in ("run", "changes", *(key.removeprefix("probe/") for key in keys), "loss", "samples/s"):
        table.add_column(head, overflow="fold")
    for effect in found:
        table.add_row(*effect_row(effect, keys))
    Console(markup=False, emoji=False, file=sys.stdout, highlight=False).print(table)


def legend(found: Sequence[Effect], keys: Sequence[str]) -> str:
    """Which rules the marks of these columns stand for."""
    changes = [effect.probes[key] for effect in found if effect.changed for key in keys if key in effect.probes]
    rules = []
    if any(change.paired for change in changes):
        rules.append("* = paired 95 % interval of the difference excludes 0")
    if any(change.paired is None for change in changes):
        rules.append("† = no outcomes to pair, the runs' own intervals do not touch")
    return "; ".join(["score and difference to the first run", *rules, ONE_SEED])


def headline_probes(found: Sequence[Effect]) -> list[str]:
    """Scores worth a column: of the fused features, else all."""
    keys = sorted(
        {key for effect in found for key in effect.probes if "effective_rank" not in key and "/std/" not in key}
    )
    fused = [key for key in keys if key.endswith("/fused")]
    return fused or keys


def effect_row(effect: Effect, keys: Sequence[str]) -> list[str]:
    """Cells: run, what changes, one per probe, loss, speed."""
    changes = "base" if not effect.changed else "; ".join(effect.changed)
    if len(effect.changed) > 1:
        changes = f"NOT ONE KEY: {changes}"
    cells = []
    for key in keys:
        if key not in effect.probes:
            cells.append("-")
            continue
        change = effect.probes[key]
        cells.append(str(change) if effect.changed else f"{change.score.value:.3f}")
    return [effect.run, changes, *cells, _number(effect.loss), _number(effect.samples_per_s)]


def _change(score: Interval, base: Interval, paired: Difference | None) -> Change:
    if paired is not None:
        return Change(score, paired.value, paired.is_clear, paired)
    return Change(score, score.value - base.value, _apart(score, base), None)


def _apart(a: Interval, b: Interval) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
