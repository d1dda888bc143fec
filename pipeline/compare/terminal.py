"""The comparison as text: differing settings first, then whether it is fair, then the figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.compare.figures import ROWS, Interval, Summary
from pipeline.compare.load import RunData
from pipeline.compare.paired import Pairs
from pipeline.compare.verdict import Verdict

NAMES = {"untrained": "untrained", "pixels": "pixel statistics"}


def show(
    runs: Sequence[RunData], verdict: Verdict, summaries: Sequence[Summary], pairs: Pairs, width: int | None = None
) -> None:
    """Prints to stdout."""
    console = Console(markup=False, emoji=False, file=sys.stdout, width=width, highlight=False)
    console.print(settings_table(runs, verdict))
    show_fairness(verdict, pairs.notes, width)
    console.print(figures_table(runs, summaries))
    rows = difference_rows(runs, summaries, pairs)
    if rows:
        table = Table(title="Differences of probe scores, paired over test sites, 95 % intervals", title_justify="left")
        table.add_column("probe", overflow="fold")
        for run in runs:
            table.add_column(run.name, justify="right", overflow="fold")
        for label, cells in rows:
            table.add_row(label, *cells)
        console.print(table)


def show_fairness(verdict: Verdict, more: Sequence[str], width: int | None = None) -> None:
    """Prints whether scores may be ranked, why not, and what to keep in mind."""
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    if verdict.comparable:
        console.print("comparable: same data, same statistics, same probe split", style="green")
    else:
        console.print("NOT COMPARABLE:", style="bold red")
        for reason in verdict.reasons:
            console.print(f"  - {reason}", style="red")
    for note in (*verdict.notes, *more):
        console.print(f"note: {note}")


def settings_table(runs: Sequence[RunData], verdict: Verdict) -> Table:
    table = Table(title="Settings that differ", title_justify="left")
    table.add_column("key", overflow="fold")
    for run in runs:
        table.add_column(run.name, overflow="fold")
    for key, values in verdict.differs.items():
        table.add_row(key, *(shown(value) for value in values))
    if not verdict.differs:
        table.add_row("none: the runs have the same settings", *("" for _ in runs))
    return table


def figures_table(runs: Sequence[RunData], summaries: Sequence[Summary]) -> Table:
    table = Table(title=f"Figures at {summaries[0].samples:,} samples seen", title_justify="left")
    table.add_column("figure", overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for label, cells in figure_rows(summaries):
        table.add_row(label, *cells)
    return table


def figure_rows(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """Rows of the figures table: probes with intervals, each with what the same sites give untrained and from pixel statistics; losses,
    speed, cost."""
    rows = []
    for group, form in (("probes", interval), ("losses", number), ("speed", number)):
        keys = sorted({key for summary in summaries for key in getattr(summary, group)})
        for key in keys:
            cells = [getattr(summary, group).get(key) for summary in summaries]
            rows.append((key, ["-" if cell is None else form(cell) for cell in cells]))
            for row in ROWS if group == "probes" else ():
                values = [summary.rows[row].get(key) for summary in summaries]
                if any(value is not None for value in values):
                    rows.append((f"    {NAMES[row]}", ["-" if v is None else f"{v:.3f}" for v in values]))
    rows.append(("gpu_hours", [number(summary.gpu_hours) for summary in summaries]))
    return rows


def difference_rows(runs: Sequence[RunData], summaries: Sequence[Summary], pairs: Pairs) -> list[tuple[str, list[str]]]:
    """Rows of the differences table: every probe against the first run, then against what the run's own sites give for nothing."""
    rows = []
    own = [(f"over {NAMES[row]}", [summary.over[row] for summary in summaries]) for row in ROWS]
    for label, found in ((f"to {runs[0].name}", pairs.differences), *own):
        for key in sorted({key for one in found for key in one}):
            rows.append(
                (f"{key.removeprefix('probe/')} {label}", [str(one[key]) if key in one else "-" for one in found])
            )
    return rows


def interval(score: Interval) -> str:
    """`0.712 [0.65, 0.77]`."""
    if score.low is None or score.high is None:
        return number(score.value)
    return f"{score.value:.3f} [{score.low:.2f}, {score.high:.2f}]"


def number(value: float) -> str:
    return f"{value:.4g}"


def shown(value: Any) -> str:
    return "-" if value is None else str(value)
