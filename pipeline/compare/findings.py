"""What groups of runs (one setting, several seeds) show: means with their spread, and each difference with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import RunFailure, UsageError
from pipeline.compare.figures import ROWS, Summary
from pipeline.compare.groups import Group
from pipeline.compare.load import RunData
from pipeline.compare.paired import in_loop, offline, offline_name
from pipeline.compare.seeds import OPEN, Noise, pool, two_level, verdict
from pipeline.probes.outcomes import UNTRAINED_STEP, Outcomes, is_outside, pixels_url, read_outcomes, url_of
from pipeline.probes.scores import Difference, Outcome


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds of a group; sd between them, None with one."""

    mean: float
    sd: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """`0.712 ± 0.012`."""
        return f"{self.mean:{form}}" + (f" ± {self.sd:{form}}" if self.sd is not None else "")


@dataclass(frozen=True)
class Finding:
    """A difference of means over `seeds` pairs of runs with equal seeds, its 95 % interval over seeds and test sites (None: nothing to
    pair), the noise floor (None: no seeds to tell) and what follows."""

    value: float
    low: float | None
    high: float | None
    floor: float | None
    seeds: int
    verdict: str

    def __str__(self) -> str:
        """`+0.143 [+0.05, +0.23] noise ±0.031: better`."""
        inside = "" if self.low is None or self.high is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.value:+.3f}{inside} noise {'unknown' if self.floor is None else f'±{self.floor:.3f}'}: {self.verdict}"


@dataclass(frozen=True)
class GroupFigures:
    """One group at the samples that all runs have seen. rows: means of `untrained` and `pixels`; against: differences to the reference
    group, by probe; over: differences to those rows."""

    group: Group
    reference: str | None
    probes: dict[str, Spread]
    losses: dict[str, Spread]
    speed: dict[str, Spread]
    gpu_hours: Spread
    rows: dict[str, dict[str, float]]
    against: dict[str, Finding] = field(default_factory=dict)
    over: dict[str, dict[str, Finding]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kept:
    """Outcomes that one run kept, by probe: its own, and those of `untrained` and `pixels`."""

    own: Mapping[str, tuple[str, tuple[str, ...], Outcome]]
    rows: Mapping[str, Mapping[str, tuple[str, tuple[str, ...], Outcome]]]


def find(
    runs: Sequence[RunData],
    summaries: Sequence[Summary],
    groups: Sequence[Group],
    references: Mapping[str, str] | None = None,
) -> tuple[list[GroupFigures], list[str]]:
    """Figures of every group, and notes for whoever reads them.

    references: by group the one it is held against; the first group where none is named.
    """
    notes: list[str] = []
    kept = [_kept(run, summary.samples, notes) for run, summary in zip(runs, summaries, strict=True)]
    by_name = {group.name: group for group in groups}
    probes = {group.name: _by_seed(group, [summaries[i].probes for i in group.members]) for group in groups}
    noise = {key: pool([found[key] for found in probes.values() if key in found]) for key in _keys(probes)}
    figures = []
    for group in groups:
        reference = by_name.get((references or {}).get(group.name, groups[0].name), groups[0])
        is_base = reference.name == group.name
        against = {} if is_base else _against(group, reference, runs, summaries, kept, noise, notes)
        figures.append(GroupFigures(
            group, None if is_base else reference.name,
            {key: Spread.of(values) for key, values in probes[group.name].items()},
            _spreads([summaries[i].losses for i in group.members]), _spreads([summaries[i].speed for i in group.members]),
            Spread.of([summaries[i].gpu_hours for i in group.members]),
            {row: {key: s.mean for key, s in _spreads([summaries[i].rows[row] for i in group.members]).items()} for row in ROWS},
            against, {row: _over(group, row, kept, noise) for row in ROWS},
        ))  # fmt: skip
    return figures, [*dict.fromkeys(notes), *_how_to_read(figures)]


def _against(
    group: Group, base: Group, runs: Sequence[RunData], summaries: Sequence[Summary], kept: Sequence[_Kept],
    noise: Mapping[str, Noise], notes: list[str],
) -> dict[str, Finding]:  # fmt: skip
    """Differences of runs with equal seeds."""
    both = [
        (i, base.members[base.seeds.index(seed)]) for i, seed in zip(group.members, group.seeds) if seed in base.seeds
    ]
    if len(both) < max(len(group.members), len(base.members)):
        notes.append(
            f"{group.name} has seeds {_list(group.seeds)}, {base.name} {_list(base.seeds)}: their difference is that of the "
            f"{len(both)} in common"
        )
    found = {}
    keys = {
        key for i, j in both for key in (kept[i].own.keys() & kept[j].own.keys()) | _scored(summaries[i], summaries[j])
    }
    for key in sorted(keys):
        pairs = [(kept[i].own[key], kept[j].own[key]) for i, j in both if key in kept[i].own and key in kept[j].own]
        floor = noise.get(key, Noise(None, 0)).floor(len(both), len(both))
        difference = _paired(pairs) if len(pairs) == len(both) else None
        if difference is not None:
            found[key] = Finding(
                difference.value, difference.low, difference.high, floor, len(both), verdict(difference, floor)
            )
        elif not pairs:
            value = float(np.mean([summaries[i].probes[key].value - summaries[j].probes[key].value for i, j in both]))
            found[key] = Finding(value, None, None, floor, len(both), OPEN)
            notes.append(
                f"{group.name} and {base.name}: no test sites to pair under {key.removeprefix('probe/')}, nothing is decided"
            )
    return found


def _over(group: Group, row: str, kept: Sequence[_Kept], noise: Mapping[str, Noise]) -> dict[str, Finding]:
    """Differences of each run to what its own test sites give under `row`."""
    found = {}
    members = [kept[i] for i in group.members]
    for key in sorted(set.intersection(*(set(one.own) & set(one.rows[row]) for one in members))):
        difference = _paired([(one.own[key], one.rows[row][key]) for one in members])
        # an untrained network has its seed too; pixel statistics have none
        floor = noise.get(key, Noise(None, 0)).floor(len(members), len(members) if row == "untrained" else None)
        if difference is not None:
            found[key] = Finding(
                difference.value, difference.low, difference.high, floor, len(members), verdict(difference, floor)
            )
    return found


def _paired(pairs: Sequence[tuple[tuple[str, tuple[str, ...], Outcome], ...]]) -> Difference | None:
    """`two_level` if all outcomes are of one split: same sites, labels and views."""
    if len({side[:2] for pair in pairs for side in pair}) != 1:
        return None
    return two_level([(score[2], base[2]) for score, base in pairs])


def _kept(run: RunData, samples: int, notes: list[str]) -> _Kept:
    own: dict[str, tuple[str, tuple[str, ...], Outcome]] = {}
    rows: dict[str, dict[str, tuple[str, tuple[str, ...], Outcome]]] = {row: {} for row in ROWS}
    last = in_loop(run, samples, notes)
    if last is not None and run.folder is not None:
        own |= _named(last[1])
        urls = {"untrained": url_of(run.folder, UNTRAINED_STEP), "pixels": pixels_url(run.folder, last[1].split)}
        rows = {row: _read_row(url) for row, url in urls.items()}
    for kind, (_, outcomes) in offline(run, samples, notes).items():
        named = _named(outcomes)
        own |= {offline_name(name.removeprefix("probe/"), kind): value for name, value in named.items()}
        if run.folder is not None and is_outside(kind):  # it keeps rows of its own
            rows["untrained"] |= _read_row(url_of(run.folder, UNTRAINED_STEP, kind))
            rows["pixels"] |= _read_row(pixels_url(run.folder, outcomes.split))
    return _Kept(own, rows)


def _read_row(url: str) -> dict[str, tuple[str, tuple[str, ...], Outcome]]:
    try:
        return _named(read_outcomes(url))
    except (OSError, RunFailure, UsageError):  # a run from before rows were kept: its scores stand without them
        return {}


def _named(outcomes: Outcomes) -> dict[str, tuple[str, tuple[str, ...], Outcome]]:
    return {f"probe/{name}": (outcomes.split, outcomes.keys, outcome) for name, outcome in outcomes.by_name.items()}


def _scored(*summaries: Summary) -> set[str]:
    """Probes of which all have a score with an interval; the rest (collapse figures) is nothing to rank by."""
    return set.intersection(*({key for key, score in one.probes.items() if score.low is not None} for one in summaries))


def _by_seed(group: Group, found: Sequence[Mapping[str, object]]) -> dict[str, list[float]]:
    return {key: [one[key].value for one in found] for key in set.intersection(*map(set, found))}  # type: ignore[attr-defined]


def _spreads(found: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {key: Spread.of([one[key] for one in found]) for key in sorted(set.intersection(*map(set, found)))}


def _keys(probes: Mapping[str, Mapping[str, object]]) -> set[str]:
    return {key for found in probes.values() for key in found}


def _how_to_read(figures: Sequence[GroupFigures]) -> list[str]:
    found = [finding for one in figures for finding in one.against.values()]
    if not found:
        return []
    single = [one.group.name for one in figures if len(one.group.members) == 1]
    notes = [
        "a difference is decided where its 95 % interval over seeds and test sites excludes 0 and it lies beyond the noise floor, "
        f"what two means of one setting differ by in 19 of 20 cases; of {len(found)} differences {0.05 * len(found):.1f} may pass by chance"
    ]
    if single:
        notes.append(f"one seed only: {', '.join(single)}; their noise is taken to be that of the others")
    return notes


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
