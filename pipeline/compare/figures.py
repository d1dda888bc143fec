"""From metrics lines to the figures people compare: all read at the same number of samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.compare.load import RunData
from pipeline.compare.verdict import samples_seen
from pipeline.probes.scores import Difference

CURVES = (
    "loss", "probe/", "lr", "grad_norm", "samples_per_s", "data_wait", "mfu", "moe/", "feature/", "prototypes/", "targets/", "data/",
    "system/",
)  # fmt: skip
ROWS = ("untrained", "pixels")  # as `pipeline.probes.outcomes` names them
ENDS = ("", "/low", "/high")
BASICS = ("samples_per_s", "data_wait", "mfu")


@dataclass(frozen=True)
class Interval:
    """A probe score with its bootstrap interval (None where the run logged none)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """One run at `samples` samples seen.

    Attributes:
        losses: `loss` and its terms, mean of the last tenth of what it logged up to there.
        probes: last score of each probe up to there.
        rows: what the same sites gave under `untrained` and `pixels` (statistics of the same views), by probe; empty where the run
            logged none.
        over: by the same names, of the last probes, the difference to that row, paired over test sites.
        speed: median of samples_per_s, data_wait and mfu, the first tenth left out.
        gpu_hours: ranks times training time up to there.
    """

    samples: int
    losses: dict[str, float]
    probes: dict[str, Interval]
    rows: dict[str, dict[str, float]]
    over: dict[str, dict[str, Difference]]
    speed: dict[str, float]
    gpu_hours: float


def summarise(runs: Sequence[RunData]) -> list[Summary]:
    """One summary per run, all at the samples that the shortest run has seen."""
    common = min(samples_seen(run) for run in runs)
    return [_summary(run, common) for run in runs]


def up_to(run: RunData, samples: int) -> list[dict[str, Any]]:
    """The lines up to `samples` samples seen, at least the first one."""
    return [line for line in run.lines if line.get("samples", 0) <= samples] or run.lines[:1]


def has_intervals(run: RunData, samples: int) -> bool:
    """Whether a probe up to there logged an interval of its own."""
    return any(key.startswith("probe/") and key.endswith("/low") for line in up_to(run, samples) for key in line)


def curve(run: RunData, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(samples seen, value) of one metric, lines without it left out."""
    points = [(line["samples"], line[key]) for line in run.lines if is_number(line.get(key)) and "samples" in line]
    return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)


def level(run: RunData, key: str, row: str) -> float | None:
    """What `untrained` or `pixels` gave where a probe score is drawn: one number of the run, the last it logged."""
    values = [line[f"{key}/{row}"] for line in run.lines if is_number(line.get(f"{key}/{row}"))]
    return float(values[-1]) if values else None


def curve_names(runs: Sequence[RunData]) -> list[str]:
    """Metrics worth a plot: logged at least twice by some run, intervals and bookkeeping left out."""
    counts: dict[str, int] = {}
    for run in runs:
        seen: dict[str, int] = {}
        for line in run.lines:
            for key, value in line.items():
                if is_number(value):
                    seen[key] = seen.get(key, 0) + 1
        counts = {key: max(counts.get(key, 0), n) for key, n in (counts | seen).items()}
    chosen = [key for key, n in counts.items() if n > 1 and _is_curve(key)]
    return sorted(chosen, key=lambda key: (next(i for i, c in enumerate(CURVES) if key.startswith(c)), key))


def _is_curve(key: str) -> bool:
    bookkeeping = ("/low", "/high", "/split", "/sites", "/seconds", *(f"/{row}" for row in ROWS))
    return key.startswith(CURVES) and not key.endswith(bookkeeping) and "/over_" not in key


def _summary(run: RunData, samples: int) -> Summary:
    lines = up_to(run, samples)
    tail, body = lines[-max(1, len(lines) // 10) :], lines[len(lines) // 10 :]
    terms = _columns(tail, lambda key: key.split("/")[0] == "loss")
    losses = {key: float(np.mean(values)) for key, values in terms.items()}
    speed = {key: float(np.median(values)) for key, values in _columns(body, lambda key: key in BASICS).items()}
    probes: dict[str, Interval] = {}
    rows: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    over: dict[str, dict[str, Difference]] = {row: {} for row in ROWS}
    for line in lines:
        for key, value in line.items():
            if key.startswith("probe/") and _is_curve(key) and is_number(value) and key.count("/") == 2:
                probes[key] = Interval(float(value), line.get(f"{key}/low"), line.get(f"{key}/high"))
                for row in ROWS:
                    rows[row].pop(key, None)
                    over[row].pop(key, None)
                    value, ends = line.get(f"{key}/{row}"), [line.get(f"{key}/over_{row}{end}") for end in ENDS]
                    if value is not None and is_number(value):
                        rows[row][key] = float(value)
                    if all(map(is_number, ends)):
                        over[row][key] = Difference(*map(float, ends))  # type: ignore[arg-type]
    return Summary(samples, losses, probes, rows, over, speed, _gpu_hours(run, lines))


def _columns(lines: Sequence[dict[str, Any]], wanted: Any) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if wanted(key) and is_number(value):
                columns.setdefault(key, []).append(float(value))
    return columns


def _gpu_hours(run: RunData, lines: Sequence[dict[str, Any]]) -> float:
    """As the run counted them; else samples over throughput, times ranks. Time between restarts does not count."""
    counted = [line["gpu_hours"] for line in lines if is_number(line.get("gpu_hours"))]
    if counted:
        return float(counted[-1])
    seconds, before = 0.0, 0
    for line in lines:
        rate = line.get("samples_per_s")
        if rate and is_number(rate):
            seconds += (line["samples"] - before) / rate
        before = line.get("samples", before)
    return seconds * run.facts.world / 3600


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
