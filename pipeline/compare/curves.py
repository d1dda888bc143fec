"""Curves of runs as an interactive part of a page: zoom, hover, runs on and off, by samples or hours, smoothing, log axes.

Drawn by uPlot (`vendor/`, MIT licence) and `curves.js`; the data stand in the page. Nothing is cut silently: curves of more points
than a page of reasonable size holds are thinned to their extremes, and the page says so.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.compare.figures import ROWS, curve_names, is_number, level
from pipeline.compare.load import RunData
from pipeline.compare.page import COLOURS, embedded, own_file

POINTS = 250_000  # of a whole page: some megabytes
FEWEST, MOST = 40, 2000  # points of one curve
OPEN = ("loss", "probe")  # parts that are shown at first


def curves_part(runs: Sequence[RunData], colours: Sequence[int] | None = None) -> tuple[list[str], list[str]]:
    """(HTML, scripts) of all curves of the runs. colours: number of each run's colour (default: one each)."""
    data = curve_data(runs, list(colours if colours is not None else range(len(runs))))
    if not data["plots"]:
        return ["<p>No metric was logged more than once.</p>"], []
    parts = sorted({plot["part"] for plot in data["plots"]}, key=lambda name: (name not in OPEN, name))
    toggles = "".join(
        f'<label><input type="checkbox" class="run" value="{i}" checked>'
        f'<span class="key" style="background:{run["colour"]}"></span>{html.escape(run["name"])}</label>'
        for i, run in enumerate(data["runs"])
    )
    thinned = (
        f"<p>Curves of more than {data['points']} points show the extremes of each stretch.</p>"
        if data["thinned"]
        else ""
    )
    markup = [
        f"<style>{own_file('vendor/uPlot.min.css')}</style>",
        f'<div class="controls" id="runs">{toggles}</div>',
        '<div class="controls"><label>by <select id="axis"><option value="x">samples seen</option><option value="h">hours of '
        'training</option></select></label><label>smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0">'
        '</label><label><input id="log" type="checkbox"> log axis</label><button id="reset">whole range</button>'
        "<span>drag over a curve to zoom, double-click for the whole range; dotted: untrained network, dashed: pixel statistics</span></div>",
        thinned,
        *(
            f'<details class="part" data-part="{html.escape(part)}"{" open" if part in OPEN else ""}><summary>{html.escape(part)} '
            f'({sum(plot["part"] == part for plot in data["plots"])})</summary><div class="plots"></div></details>'
            for part in parts
        ),
        "<noscript><p>The curves need JavaScript; everything else on this page does not.</p></noscript>",
        embedded("curves", data),
    ]
    return markup, [own_file("vendor/uPlot.iife.min.js"), own_file("curves.js")]


def curve_data(runs: Sequence[RunData], colours: Sequence[int]) -> dict[str, Any]:
    """What `curves.js` reads: runs with name and colour, and per metric what each run logged of it."""
    names = curve_names(runs)
    points = int(np.clip(POINTS // max(len(names) * len(runs), 1), FEWEST, MOST))
    drawn = [(key, [_curve(run, key, points) for run in runs]) for key in names]
    return {
        "runs": [{"name": run.name, "colour": COLOURS[colours[i] % len(COLOURS)]} for i, run in enumerate(runs)],
        "points": points,
        "thinned": any(curve["thinned"] for _, curves in drawn for curve in curves),
        "plots": [{"key": key, "part": key.split("/")[0] if "/" in key or key == "loss" else "run", "curves": curves} for key, curves in drawn],
    }  # fmt: skip


def _curve(run: RunData, key: str, points: int) -> dict[str, Any]:
    """x: samples seen; h: hours of training; y, and low and high where an interval was logged; levels: horizontal lines."""
    lines = [line for line in run.lines if is_number(line.get(key)) and "samples" in line]
    kept = [lines[i] for i in thin(np.array([line[key] for line in lines], float), points)]
    ends: dict[str, list[Any]] = {end: [line.get(f"{key}/{end}") for line in kept] for end in ("low", "high")}
    has_ends = bool(kept) and all(is_number(value) for values in ends.values() for value in values)
    levels = {row: height for row in ROWS if (height := level(run, key, row)) is not None}
    world = max(run.facts.world, 1)
    return {
        "x": [line["samples"] for line in kept], "y": [_short(line[key]) for line in kept],
        "h": [_short(line["gpu_hours"] / world) if is_number(line.get("gpu_hours")) else None for line in kept],
        "low": [_short(value) for value in ends["low"]] if has_ends else None,
        "high": [_short(value) for value in ends["high"]] if has_ends else None,
        "levels": levels, "thinned": len(kept) < len(lines),
    }  # fmt: skip


def thin(values: np.ndarray, points: int) -> list[int]:
    """Indices of at most `points` values: first, last, and of equal stretches between them the lowest and the highest."""
    if len(values) <= points:
        return list(range(len(values)))
    chosen = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(1, len(values) - 1), max((points - 2) // 2, 1)):
        if len(stretch):
            chosen |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    return sorted(chosen)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
