"""Evaluations on published sets compared: same row, mode and head, side by side, differences paired over the test items.

A run's evaluations lie in its `evaluate/`; a folder that `pipeline evaluate --out` wrote can be compared too. Scores on different
splits (other items or labels) are never ranked: that is a reason, not a footnote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster import storage
from cluster.errors import RunFailure, UsageError
from pipeline.evaluate.metrics import difference_of
from pipeline.evaluate.results import RESULTS, read_items, read_lines
from pipeline.probes.scores import Difference


@dataclass(frozen=True)
class Evaluated:
    """lines: per row name one results line per run (None: not evaluated). differences: of each run from the first one, by row name.
    reasons: what forbids ranking. notes: what could not be paired."""

    names: list[str]
    lines: dict[str, list[dict[str, Any] | None]] = field(default_factory=dict)
    differences: list[dict[str, Difference]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        keys = ("score", "low", "high", "untrained", "pixels", "split")
        return {
            name: {
                run: {
                    **({key: line[key] for key in keys if key in line} if line else {}),
                    **({"difference": asdict(found[name])} if name in found else {}),
                }
                for run, line, found in zip(self.names, lines, self.differences)
            }
            for name, lines in self.lines.items()
        }


def folder_of(url: str) -> str | None:
    """Where the evaluations of a run directory, or of a folder of results, lie."""
    for candidate in (storage.join(url, "evaluate"), url):
        if storage.exists(storage.join(candidate, RESULTS)):
            return candidate
    return None


def compare_evaluations(names: Sequence[str], folders: Sequence[str | None]) -> Evaluated:
    """Every row that some run was evaluated on. folders: None for a run without evaluations."""
    found = Evaluated(list(names), differences=[{} for _ in names])
    latest: list[dict[str, dict[str, Any]]] = [
        {_name(line): line for line in read_lines(folder)} if folder else {} for folder in folders
    ]
    rows = sorted({name for lines in latest for name in lines})
    for row in rows:
        found.lines[row] = lines = [one.get(row) for one in latest]
        first = lines[0]
        if first is None:
            continue
        for i, line in enumerate(lines[1:], 1):
            if line is None:
                continue
            if line["split"] != first["split"]:
                found.reasons.append(
                    f"{names[0]} and {names[i]} were evaluated on different splits of {row} ({first['split'][:8]}, {line['split'][:8]}): "
                    "their scores stand apart"
                )
                continue
            pair = _pair(str(folders[0]), first, str(folders[i]), line, found.notes)
            if pair is not None:
                found.differences[i][row] = pair
    return found


def _pair(base: str, first: dict[str, Any], folder: str, line: dict[str, Any], notes: list[str]) -> Difference | None:
    try:
        base_keys, base_records = read_items(base, first)
        keys, records = read_items(folder, line)
    except FileNotFoundError as error:
        notes.append(f"{_name(line)}: cannot be paired, the items are not kept ({error})")
        return None
    except (OSError, RunFailure, UsageError) as error:
        notes.append(str(error))
        return None
    if keys != base_keys:
        notes.append(f"{_name(line)}: equal splits but other items; evaluate again")
        return None
    return difference_of(records, base_records)


def _name(line: dict[str, Any]) -> str:
    share = f" {line['labels']:.0%} labels" if line.get("labels", 1.0) != 1.0 else ""
    return f"{line['task']} {line['mode']} {line['head']}{share}"


def rows_of(found: Evaluated) -> list[tuple[str, list[str]]]:
    """(row, one cell per run) for tables: score with interval, and the difference from the first run below it."""
    out = []
    for name, lines in found.lines.items():
        cells = []
        for line, differences in zip(lines, found.differences):
            text = f"{line['score']:.3f} [{line['low']:.2f}, {line['high']:.2f}]" if line else "-"
            cells.append(f"{text}\n{differences[name]}" if name in differences else text)
        base = next(line for line in lines if line)
        beside = "".join(f", {key} {base[key]:.3f}" for key in ("untrained", "pixels") if key in base)
        out.append((f"{name} ({base['metric']}{beside})", cells))
    return out


def show_evaluations(found: Evaluated) -> None:
    """Prints the table, and what forbids ranking."""
    import sys

    from rich.console import Console
    from rich.table import Table

    if not found.lines:
        return
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    table = Table(
        title="Evaluations on published sets; differences paired over test items (* = excludes 0)", title_justify="left"
    )
    table.add_column("row", overflow="fold")
    for name in found.names:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in rows_of(found):
        table.add_row(label, *cells)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}")
