"""Probe scores compared in pairs: every run against the first one, on the test sites that both were probed on.

A run's own interval says how its score would move with other test sites. Two runs move together (a hard site is hard for both), so
the interval of the difference, which draws the same sites for both, is the narrower and the right one for "is it better?".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import RunFailure, UsageError
from pipeline.compare.figures import has_intervals, up_to
from pipeline.compare.load import RunData
from pipeline.compare.verdict import judge
from pipeline.probes.outcomes import Outcomes, differences, list_offline, read_outcomes, split_number, url_of
from pipeline.probes.scores import Difference


@dataclass(frozen=True)
class Pairs:
    """Score − the first run's score, per run by probe (`probe/<task>/<modality>`; of offline probes with the split's name behind);
    empty for the first run and where a run cannot be paired: the notes say why."""

    differences: list[dict[str, Difference]]
    notes: list[str]


def pair(runs: Sequence[RunData], samples: int) -> Pairs:
    """Pairs the last probes up to `samples` samples seen. Never raises for a missing or broken file: that becomes a note."""
    found: list[dict[str, Difference]] = [{} for _ in runs]
    notes: list[str] = []
    first = runs[0]
    kept, offline = _in_loop(first, samples, notes), _offline(first, samples, notes)
    for i, run in enumerate(runs[1:], start=1):
        own, own_offline = _in_loop(run, samples, notes), _offline(run, samples, notes)
        if not judge([first, run]).comparable:  # the verdict says so; scores of other data are not ranked
            continue
        if kept and own:
            found[i] = {f"probe/{name}": value for name, value in differences(own[1], kept[1]).items()}
            if own[0] != kept[0]:
                notes.append(
                    f"{first.name} and {run.name} were last probed at {kept[0]:,} and {own[0]:,} samples: their difference "
                    "is partly one of training"
                )
        for kind in sorted(offline.keys() & own_offline.keys()):
            pairs = differences(own_offline[kind], offline[kind])
            found[i] |= {f"probe/{name} ({kind.partition('-')[2][:8]})": value for name, value in pairs.items()}
        if not found[i] and has_intervals(first, samples) and has_intervals(run, samples):
            notes.append(
                f"{first.name} and {run.name} cannot be paired site by site; their intervals are each run's own: intervals apart "
                "mean a clear difference, intervals that touch do not mean that there is none"
            )
    if any(found):
        notes.append(
            "differences are paired over test sites: * = the 95 % interval excludes 0 (so do 1 in 20 by chance). It tells of "
            "other test sites, not of another training seed"
        )
    return Pairs(found, notes)


def _in_loop(run: RunData, samples: int, notes: list[str]) -> tuple[int, Outcomes] | None:
    """(samples seen, outcomes) of the last in-loop probe; None where it kept none, or its file is not of that probe."""
    probed = [line for line in up_to(run, samples) if line.get("probe/split") is not None]
    if not probed or run.folder is None:
        return None
    url = url_of(run.folder, probed[-1]["step"])
    outcomes = _read(url, notes)
    if outcomes is None:
        return None
    if split_number(outcomes.split) != probed[-1]["probe/split"]:
        notes.append(f"{url} is of another probe split than the metrics of its step, left out")
        return None
    return int(probed[-1].get("samples", 0)), outcomes


def _offline(run: RunData, samples: int, notes: list[str]) -> dict[str, Outcomes]:
    """Of the last `pipeline probe` of each task and split, by `<task>-<split>`."""
    if run.folder is None:
        return {}
    last = up_to(run, samples)[-1]["step"]
    latest = {kind: step for step, kind in list_offline(run.folder) if step <= last}
    read = {kind: _read(url_of(run.folder, step, kind), notes) for kind, step in latest.items()}
    return {kind: outcomes for kind, outcomes in read.items() if outcomes is not None}


def _read(url: str, notes: list[str]) -> Outcomes | None:
    try:
        return read_outcomes(url)
    except FileNotFoundError:  # a run from before outcomes were kept, or a probe that could not write them
        return None
    except (OSError, RunFailure, UsageError) as error:
        notes.append(str(error))
        return None
