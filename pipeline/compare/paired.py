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
from pipeline.probes.outcomes import (
    Outcomes,
    differences,
    is_outside,
    list_offline,
    read_outcomes,
    split_number,
    url_of,
)
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
    kept, elsewhere = in_loop(first, samples, notes), offline(first, samples, notes)
    for i, run in enumerate(runs[1:], start=1):
        own, own_elsewhere = in_loop(run, samples, notes), offline(run, samples, notes)
        if not judge([first, run]).comparable:  # the verdict says so; scores of other data are not ranked
            continue
        if kept and own:
            found[i] = {f"probe/{name}": value for name, value in _paired((first, *kept), (run, *own), notes).items()}
        if not found[i] and has_intervals(first, samples) and has_intervals(run, samples):
            bare = [one.name for one, has in ((first, kept), (run, own)) if has is None]
            why = f"{' and '.join(bare)} kept no outcomes of the last probe" if bare else "no task in common"
            notes.append(
                f"{first.name} and {run.name} cannot be paired site by site ({why}); their intervals are each run's own: "
                "intervals apart mean a clear difference, intervals that touch do not mean that there is none"
            )
        for kind in sorted(elsewhere.keys() & own_elsewhere.keys()):
            pairs = _paired((first, *elsewhere[kind]), (run, *own_elsewhere[kind]), notes)
            found[i] |= {offline_name(name, kind): value for name, value in pairs.items()}
    if any(found):
        notes.append(
            "differences are paired over test sites: * = the 95 % interval excludes 0, as 1 in 20 does by chance. It tells of "
            "other test sites, not of another training seed"
        )
    return Pairs(found, notes)


def offline_name(name: str, kind: str) -> str:
    """`probe/<task>/<modality> (<split>)` of an offline probe; `probe/<task>/<row>` of an outside data set, as in the metrics."""
    return f"probe/{name}" if is_outside(kind) else f"probe/{name} ({kind.partition('-')[2][:8]})"


def _paired(
    base: tuple[RunData, int, Outcomes], score: tuple[RunData, int, Outcomes], notes: list[str]
) -> dict[str, Difference]:
    """score − base of (run, samples seen, outcomes), with a note where one had seen more than the other."""
    (first, base_samples, base_outcomes), (run, samples, outcomes) = base, score
    if samples != base_samples:
        notes.append(
            f"{first.name} was last probed at {base_samples:,} samples, {run.name} at {samples:,}: their difference is partly "
            "one of training"
        )
    return differences(outcomes, base_outcomes)


def in_loop(run: RunData, samples: int, notes: list[str]) -> tuple[int, Outcomes] | None:
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


def offline(run: RunData, samples: int, notes: list[str]) -> dict[str, tuple[int, Outcomes]]:
    """(samples seen, outcomes) of the last `pipeline probe` of each task and split, by `<task>-<split>`, and of the last in-loop probe of
    each outside data set, by `<row>-<split>`."""
    if run.folder is None:
        return {}
    lines = up_to(run, samples)
    latest = {kind: step for step, kind in list_offline(run.folder) if step <= lines[-1]["step"]}
    found = {}
    for kind, step in latest.items():
        outcomes = _read(url_of(run.folder, step, kind), notes)
        if outcomes is not None:
            seen = [line.get("samples", 0) for line in lines if line["step"] <= step]
            found[kind] = (int(seen[-1]) if seen else 0, outcomes)
    return found


def _read(url: str, notes: list[str]) -> Outcomes | None:
    try:
        return read_outcomes(url)
    except FileNotFoundError:  # a run from before outcomes were kept, or a probe that could not write them
        return None
    except (OSError, RunFailure, UsageError) as error:
        notes.append(str(error))
        return None
