"""Runs that differ in `train.seed` only are one setting, tried several times: a group."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.compare.load import RunData
from pipeline.compare.verdict import IDENTITY, differing

SEED = "train.seed"


@dataclass(frozen=True)
class Group:
    """One setting. members: places of its runs in the list of runs, in that order; seeds: their `train.seed`."""

    name: str
    members: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.members[0]


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """Groups in the order of their first runs. Of one group are runs with equal settings (but for the seed, and for where a run is
    and what it is called) that saw the same data; a seed that stands twice stands apart (it is no new try)."""
    found: dict[tuple[str, int], list[int]] = {}
    tries: dict[tuple[str, int], int] = {}
    for i, run in enumerate(runs):
        setting, seed = _setting(run), seed_of(run)
        again = tries[(setting, seed)] = tries.get((setting, seed), -1) + 1
        found.setdefault((setting, again), []).append(i)
    groups: list[Group] = []
    for members in found.values():
        name, number = _name([runs[i].name for i in members]), 2
        label = name
        while label in {group.name for group in groups}:
            label, number = f"{name} ({number})", number + 1
        groups.append(Group(label, tuple(members), tuple(seed_of(runs[i]) for i in members)))
    return groups


def has_seeds(groups: Sequence[Group]) -> bool:
    """Whether any setting was tried more than once, which is what tells an effect from chance."""
    return any(len(group.members) > 1 for group in groups)


def differing_groups(runs: Sequence[RunData], groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Keys whose values are not equal in all groups, one value per group, without the seed."""
    unlike = differing([runs[group.first] for group in groups])
    return {key: values for key, values in unlike.items() if key != SEED}


def seed_of(run: RunData) -> int:
    return int(run.settings.get(SEED) or 0)


def _setting(run: RunData) -> str:
    settings = {key: value for key, value in run.settings.items() if key != SEED and not key.startswith(IDENTITY)}
    data = [(dataset.manifest_sha256, dataset.statistics_sha256) for dataset in run.facts.datasets]
    return json.dumps([settings, data], sort_keys=True, default=str)


def _name(names: Sequence[str]) -> str:
    """What the names have in common, without the seed at the end; the first one where that is nothing."""
    if len(names) == 1:
        return names[0]
    end = next((i for i, letters in enumerate(zip(*names)) if len(set(letters)) > 1), min(map(len, names)))
    common = names[0][:end].rstrip("0123456789")
    return re.sub(r"[-_/ (]*(seed)?[-_/ (=]*$", "", common) or names[0]
