"""Groups of runs as tables of text, for the terminal and the report: figures, differences with verdicts, claims."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.compare.figures import ROWS
from pipeline.compare.findings import GroupFigures
from pipeline.compare.seeds import BETTER, OPEN, WORSE
from pipeline.compare.terminal import NAMES, shown

HOLDS = {WORSE: "holds", BETTER: "refuted", OPEN: OPEN}
"""What the verdict on a variant says of the claim that what it takes away helps."""


@dataclass(frozen=True)
class TextTable:
    """title, a head, rows; below: what to know when reading it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    below: str = ""


def tables(
    figures: Sequence[GroupFigures], differs: Mapping[str, Sequence[Any]], claims: Mapping[str, str]
) -> list[TextTable]:
    """Everything there is to say of groups, most telling first. claims: by group, a sentence that holds if the group is worse."""
    names = [one.group.name for one in figures]
    settings = [[key, *map(shown, values)] for key, values in differs.items()] or [["none", *("" for _ in names)]]
    found = [TextTable("Settings that differ", ["key", *names], settings)]
    if any(one.group.name in claims for one in figures):
        found.append(_claims(figures, claims))
    found += [_verdicts(figures), _rows(figures, names)]
    over = [[f"{key.removeprefix('probe/')} over {NAMES[row]}", *(str(one.over[row].get(key, "-")) for one in figures)]
            for row in ROWS for key in sorted({key for one in figures for key in one.over[row]})]  # fmt: skip
    if over:
        below = "the same test sites, the same classifier; noise: what as many other seeds would move the mean by"
        found.append(TextTable("Against what costs nothing", ["probe", *names], over, below))
    return [table for table in found if table.rows]


def show_tables(found: Sequence[TextTable]) -> None:
    """Prints to stdout."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    for one in found:
        table = Table(title=one.title, title_justify="left", caption=one.below or None, caption_justify="left")
        for i, head in enumerate(one.head):
            table.add_column(head, overflow="fold", justify="left" if i == 0 else "right")
        for row in one.rows:
            table.add_row(*row)
        console.print(table)


def headline(figures: Sequence[GroupFigures]) -> list[str]:
    """Probes worth a verdict: of the fused features, else all."""
    keys = sorted({key for one in figures for key in one.against})
    return [key for key in keys if "/fused" in key] or keys


def _verdicts(figures: Sequence[GroupFigures]) -> TextTable:
    keys = headline(figures)
    rows = [
        [one.group.name, str(one.reference), *(str(one.against.get(key, "-")) for key in keys)]
        for one in figures if one.reference is not None
    ]  # fmt: skip
    below = "difference of the means over seeds [95 % over seeds and test sites] noise floor of seeds: verdict"
    head = ["setting", "against", *(key.removeprefix("probe/") for key in keys)]
    return TextTable("Better, worse or not decided", head, rows if keys else [], below)


def _claims(figures: Sequence[GroupFigures], claims: Mapping[str, str]) -> TextTable:
    """One row per claim. Its verdict is that of all headline probes which decide; two that disagree decide nothing."""
    keys = headline(figures)
    rows = []
    for one in figures:
        if one.group.name not in claims:
            continue
        said = {HOLDS[one.against[key].verdict] for key in keys if key in one.against} - {OPEN}
        outcome = said.pop() if len(said) == 1 else OPEN if not said else "probes disagree"
        cells = [
            f"{one.against[key].value:+.3f} {one.against[key].verdict}" if key in one.against else "-" for key in keys
        ]
        rows.append([claims[one.group.name], one.group.name, outcome, *cells])
    head = ["claim", "run without it", "claim", *(key.removeprefix("probe/") for key in keys)]
    return TextTable("Claims", head, rows, "holds where the run without it is decided to be worse; columns: that run")


def _rows(figures: Sequence[GroupFigures], names: Sequence[str]) -> TextTable:
    rows = [["seeds", *(", ".join(map(str, one.group.seeds)) for one in figures)]]
    for kind, form in (("probes", ".3f"), ("losses", ".4g"), ("speed", ".4g")):
        for key in sorted({key for one in figures for key in getattr(one, kind)}):
            rows.append(
                [key, *(spread.text(form) if (spread := getattr(one, kind).get(key)) else "-" for one in figures)]
            )
            for row in ROWS if kind == "probes" else ():
                if any(key in one.rows[row] for one in figures):
                    cells = [f"{one.rows[row][key]:.3f}" if key in one.rows[row] else "-" for one in figures]
                    rows.append([f"    {NAMES[row]}", *cells])
    rows.append(["gpu_hours", *(one.gpu_hours.text(".4g") for one in figures)])
    return TextTable("Means ± standard deviation between seeds", ["figure", *names], rows)
