"""An ablation as one table: per run the key it changes, and what that did to every score of the base run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipeline.compare.figures import Interval, Summary
from pipeline.compare.load import RunData
from pipeline.compare.terminal import shown
from pipeline.compare.verdict import differing


@dataclass(frozen=True)
class Effect:
    """What one run changes against the base, and its scores with their differences to the base's.

    Attributes:
        changed: `key: old → new`; more than one means that the run is no clean ablation.
        probes: score, and score − base's, by probe; `clear`: whether the two intervals do not touch.
    """

    run: str
    changed: list[str]
    probes: dict[str, tuple[Interval, float, bool]]
    loss: float | None
    samples_per_s: float | None

    @property
    def is_clean(self) -> bool:
        return len(self.changed) == 1


def effects(runs: Sequence[RunData], summaries: Sequence[Summary]) -> list[Effect]:
    """One effect per run, the base first (which changes nothing)."""
    found = []
    for run, summary in zip(runs, summaries, strict=True):
        changed = [f"{key}: {shown(a)} → {shown(b)}" for key, (a, b) in differing([runs[0], run]).items()]
        probes = {
            key: (score, score.value - base.value, _apart(score, base))
            for key, score in summary.probes.items() if (base := summaries[0].probes.get(key)) is not None
        }  # fmt: skip
        found.append(Effect(run.name, changed, probes, summary.losses.get("loss"), summary.speed.get("samples_per_s")))
    return found


def show_ablation(runs: Sequence[RunData], summaries: Sequence[Summary]) -> None:
    """Prints the table to stdout; a `*` marks a difference whose intervals do not touch."""
    found = effects(runs, summaries)
    keys = headline_probes(found)
    table = Table(title=f"Ablation of {runs[0].name}: differences to it, * = intervals apart", title_justify="left")
    for head in ("run", "changes", *(key.removeprefix("probe/") for key in keys), "loss", "samples/s"):
        table.add_column(head, overflow="fold")
    for effect in found:
        table.add_row(*effect_row(effect, keys))
    Console(file=sys.stdout, highlight=False).print(table)


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
        score, difference, apart = effect.probes[key]
        cells.append(f"{score.value:.3f}" + (f" ({difference:+.3f}{'*' if apart else ''})" if effect.changed else ""))
    return [effect.run, changes, *cells, _number(effect.loss), _number(effect.samples_per_s)]


def _apart(a: Interval, b: Interval) -> bool:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
