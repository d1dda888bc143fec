"""Is the comparison fair? Which settings differ, most telling first, and what makes two runs incomparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.compare.load import RunData
from pipeline.tracking.experts import TAG as DEAD_EXPERTS

# settings that say where a run is, not what it does
IDENTITY = (
    "run.",
    "tracking.",
    "data.url",
    "data.cache_",
    "data.threads",
    "data.prefetch",
    "data.read_ahead",
    "data.range_mb",
)
ORDER = ("model.", "objective.", "optimizer.", "data.", "train.", "parallel.", "engine.", "probe.", "checkpoint.")


@dataclass(frozen=True)
class Verdict:
    """comparable: scores may be ranked; reasons: why not, one sentence each; notes: what to keep in mind all the same;
    differs: settings with unlike values, one value per run, most telling first (absent: None)."""

    comparable: bool
    reasons: list[str]
    notes: list[str]
    differs: dict[str, list[Any]]


def judge(runs: Sequence[RunData], differs: dict[str, list[Any]] | None = None) -> Verdict:
    """Compares every run with the first one. differs: what counts as differing, if that is not every setting (seeds of one)."""
    differs = differing(runs) if differs is None else differs
    reasons = [*_data_reasons(runs), *_probe_reasons(runs)]
    return Verdict(not reasons, reasons, _notes(runs, differs), differs)


def differing(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Keys whose values are not all equal; places and names of runs left out."""
    keys = {key for run in runs for key in run.settings if not key.startswith(IDENTITY)}
    unlike = {key: [run.settings.get(key) for run in runs] for key in keys}
    unlike = {key: values for key, values in unlike.items() if any(value != values[0] for value in values[1:])}
    return dict(sorted(unlike.items(), key=lambda item: (_rank(item[0]), item[0])))


def _rank(key: str) -> int:
    return next((place for place, prefix in enumerate(ORDER) if key.startswith(prefix)), len(ORDER))


def _data_reasons(runs: Sequence[RunData]) -> list[str]:
    reasons = []
    first = runs[0]
    for run in runs[1:]:
        pair = f"{first.name} and {run.name}"
        for what, field in (("data (manifest", "manifest_sha256"), ("normalisation statistics (", "statistics_sha256")):
            a, b = ([getattr(dataset, field) for dataset in r.facts.datasets] for r in (first, run))
            if a != b and (a or b):
                inside = f"{_short(a)} and {_short(b)})"
                reasons.append(f"{pair} saw different {what.replace('manifest', 'manifest ')}{inside}")
            elif not a and field == "manifest_sha256":
                reasons.append(f"{pair}: no record of the data they saw, so nobody knows whether it was the same")
    return reasons


def _probe_reasons(runs: Sequence[RunData]) -> list[str]:
    """Probe scores of different sites or labels say nothing about each other."""
    keys = {
        key for run in runs for line in run.lines for key in line if key.startswith("probe/") and key.endswith("/split")
    }
    reasons = []
    for key in sorted(keys):  # `probe/split`; `probe/<row>/split` of outside data sets
        splits = [next((line[key] for line in reversed(run.lines) if line.get(key) is not None), None) for run in runs]
        known = [(run.name, split) for run, split in zip(runs, splits, strict=True) if split is not None]
        on = "" if key == "probe/split" else f" of {key.split('/')[1]}"
        reasons += [
            f"{known[0][0]} and {name} were probed on different splits{on} (other sites, labels or views), their scores stand apart"
            for name, split in known[1:] if split != known[0][1]
        ]  # fmt: skip
    return reasons


def _notes(runs: Sequence[RunData], differs: dict[str, list[Any]]) -> list[str]:
    notes = []
    seen = [samples_seen(run) for run in runs]
    if len(set(seen)) > 1:
        notes.append(
            f"runs saw {', '.join(f'{n:,}' for n in seen)} samples: figures are read at {min(seen):,}, what all have seen"
        )
    objective = [key for key in differs if key.startswith("objective.")]
    if objective:
        notes.append(f"losses are not the same quantity ({objective[0]} differs): rank by probes, not by loss")
    for key in ("geoloom.dirty", "mlflow.source.git.commit"):
        values = [run.tags.get(key, "") for run in runs]
        if key == "geoloom.dirty" and "true" in values:
            dirty = [run.name for run, value in zip(runs, values, strict=True) if value == "true"]
            notes.append(f"code had uncommitted changes in {', '.join(dirty)} (artifact dirty.diff)")
        elif key != "geoloom.dirty" and len(set(values)) > 1:
            notes.append(f"code revisions differ: {', '.join(value[:10] or 'unknown' for value in values)}")
    for run in runs:
        alarm = run.tags.get(DEAD_EXPERTS, "none")
        if not alarm.startswith("none"):
            notes.append(f"{run.name} ended with dead experts: {alarm}")
    if not any(key.startswith("probe/") for run in runs for line in run.lines for key in line):
        notes.append("no run has probe scores: set probe.every, or run python -m pipeline probe")
    return notes


def samples_seen(run: RunData) -> int:
    return int(run.lines[-1].get("samples") or 0)


def _short(hashes: Sequence[str]) -> str:
    return "+".join(text[:12] or "none" for text in hashes) or "none"
