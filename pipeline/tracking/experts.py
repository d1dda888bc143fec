"""Dead experts: which expert of which layer has had next to no tokens for a while. From metrics lines alone.

An expert that one modality never uses may serve another: that is specialisation, not death. Dead is one that no modality
uses; its weights no longer learn, and the model pays their memory for nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOAD = re.compile(r"moe/layer(\d+)/load/([^/]+)/(\d+)$")
WINDOW = 20  # logged steps
FAIR_SHARE = 0.01  # of 1 / experts: below it an expert counts as dead
TAG = "alarm.dead_experts"

Loads = dict[tuple[int, str], list[float]]  # (layer, modality) → share of that modality's tokens per expert


@dataclass(frozen=True, order=True)
class DeadExpert:
    """modalities: those that sent tokens through the layer, none of them to this expert."""

    layer: int
    expert: int
    modalities: tuple[str, ...]

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert} ({', '.join(self.modalities)})"


def loads_of(line: Mapping[str, Any]) -> Loads:
    """The expert shares of one metrics line; modalities without tokens in that step are left out."""
    found: dict[tuple[int, str], dict[int, float]] = {}
    for key, value in line.items():
        match = LOAD.match(key)
        if match and value is not None:
            found.setdefault((int(match[1]), match[2]), {})[int(match[3])] = float(value)
    return {
        place: [shares.get(expert, 0.0) for expert in range(1 + max(shares))]
        for place, shares in found.items() if sum(shares.values()) > 0
    }  # fmt: skip


def dead_experts(window: Sequence[Loads], fair_share: float = FAIR_SHARE) -> list[DeadExpert]:
    """Experts whose mean share over the window lies below `fair_share / experts` for every modality seen, in order."""
    sums: dict[tuple[int, str], list[float]] = {}
    counts: dict[tuple[int, str], int] = {}
    for loads in window:
        for place, shares in loads.items():
            sums[place] = [a + b for a, b in zip(sums.get(place, [0.0] * len(shares)), shares, strict=True)]
            counts[place] = counts.get(place, 0) + 1
    dead = []
    for layer in sorted({layer for layer, _ in sums}):
        at = {modality: place for place in sums for modality in [place[1]] if place[0] == layer}
        experts = len(sums[next(iter(at.values()))])
        for expert in range(experts):
            means = [sums[place][expert] / counts[place] for place in at.values()]
            if max(means) < fair_share / experts:
                dead.append(DeadExpert(layer, expert, tuple(at)))
    return dead


class ExpertWatch:
    """Looks at the last WINDOW logged steps. Knows nothing before the window is full.

    Attributes:
        dead: experts dead as of the last line.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = (), window: int = WINDOW) -> None:
        """lines: what the run logged before, so that a resumed run sees what an uninterrupted one would."""
        self._recent: deque[Loads] = deque(maxlen=window)
        self.dead: list[DeadExpert] = []
        for line in lines:
            self.look(line)

    @property
    def is_sure(self) -> bool:
        """Whether the window is full."""
        return len(self._recent) == self._recent.maxlen

    def look(self, line: Mapping[str, Any]) -> list[DeadExpert]:
        """Takes in one line; returns the experts that have died with it."""
        loads = loads_of(line)
        if not loads:  # a dense model
            return []
        self._recent.append(loads)
        before = {(expert.layer, expert.expert) for expert in self.dead}
        self.dead = dead_experts(self._recent) if self.is_sure else []
        return [expert for expert in self.dead if (expert.layer, expert.expert) not in before]
