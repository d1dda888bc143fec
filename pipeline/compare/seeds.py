"""Is a difference more than chance? Two sources of chance are kept apart and both must be passed.

Other test sites and other seeds: the interval of `two_level`, a bootstrap that draws seeds and, the same for all of them, test sites.
Seeds alone: the noise floor (`Noise`), how far apart the means of two groups of the SAME setting lie in 19 of 20 cases, from the
spread between seeds of all groups together. With three seeds a bootstrap over them is too sure of itself (it knows three values, not
their spread); the floor's t quantile is what keeps the whole at its level (`tests/unit/test_seeds.py` counts false alarms).

Shapes: R seeds, S sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.probes.scores import DRAWS, Difference, Outcome, site_draws, total_score

BETTER, WORSE, OPEN = "better", "worse", "not decided"


@dataclass(frozen=True)
class Noise:
    """Spread between seeds, pooled over groups. sd: of a single run (None: no group has two seeds); freedom: its degrees."""

    sd: float | None
    freedom: int

    def floor(self, seeds: int, base_seeds: int | None) -> float | None:
        """Half width of the 95 % interval of the difference of two means over so many seeds, were the settings the same.

        base_seeds: None where the other side has no seed (a fixed figure such as that of pixel statistics).
        """
        if self.sd is None:
            return None
        from scipy.stats import t

        share = 1 / seeds + (1 / base_seeds if base_seeds else 0.0)
        return float(t.ppf(0.975, self.freedom)) * self.sd * share**0.5


def pool(groups: Sequence[Sequence[float]]) -> Noise:
    """Pooled standard deviation between the seeds of each group; groups of one run say nothing."""
    several = [np.asarray(values, float) for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return Noise(None, 0)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return Noise((squares / freedom) ** 0.5, freedom)


def two_level(pairs: Sequence[tuple[Outcome, Outcome]], seed: int = 0) -> Difference | None:
    """Mean over seeds of score − base with a 95 % interval over seeds and sites; pairs: (outcome, base) per seed, all of one split.

    Each draw takes sites (the same for every seed and for both sides, since all were probed on them) and seeds. Deviations between
    seeds are widened by sqrt(R / (R - 1)): drawing R of R values shows (R - 1) / R of their variance (Davison and Hinkley, 1997,
    section 3.8). With one seed only sites are drawn. None where the pairs do not count the same sites or classes.
    """
    if not pairs or len({outcome.counts.shape for pair in pairs for outcome in pair}) > 1:
        return None
    both = np.logical_and.reduce([outcome.tested for pair in pairs for outcome in pair])
    if not both.any():
        return None
    cut = [tuple(Outcome(outcome.tested[both], outcome.counts[both]) for outcome in pair) for pair in pairs]
    value = float(np.mean([total_score(a) - total_score(b) for a, b in cut]))
    by_seed = np.stack([site_draws(a.counts, seed) - site_draws(b.counts, seed) for a, b in cut], axis=1)  # [DRAWS, R]
    low, high = np.quantile(_over_seeds(by_seed, seed), [0.025, 0.975])
    return Difference(value, float(low), float(high))


def verdict(difference: Difference | None, floor: float | None) -> str:
    """`better`, `worse` or `not decided`: decided is what lies beyond the noise floor with an interval that excludes 0."""
    if difference is None or floor is None or not difference.is_clear or abs(difference.value) <= floor:
        return OPEN
    return BETTER if difference.value > 0 else WORSE


def _over_seeds(by_seed: np.ndarray, seed: int) -> np.ndarray:
    """[DRAWS] means over drawn seeds of [DRAWS, R] values."""
    centre, number = by_seed.mean(1), by_seed.shape[1]
    if number == 1:
        return centre
    picks = np.random.default_rng([seed, 1]).integers(0, number, (DRAWS, number))
    drawn = np.take_along_axis(by_seed, picks, axis=1).mean(1)
    return centre + (number / (number - 1)) ** 0.5 * (drawn - centre)
