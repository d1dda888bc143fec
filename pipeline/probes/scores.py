"""Scores and their bootstrap intervals. The unit of resampling is the site: pixels of one site are not independent.

Two probes of the same sites are compared in pairs (`difference`): sites that are hard for both cancel out. No torch here:
`compare` draws the same intervals from what runs have kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """value with a 95 % interval [low, high]; chance: what knowing nothing scores, see `accuracy` and `mean_iou`."""

    value: float
    low: float
    high: float
    chance: float
    sites: int


@dataclass(frozen=True)
class Outcome:
    """What every test site got under one probe. S sites in the order of the split, K classes.

    tested: bool [S], false where the site has nothing of the modality; its counts are zero and mean nothing.
    counts: [S], 1 = named rightly, 0 = not (knn, linear); or confusion matrices [S, truth K, predicted K] (segment).
    """

    tested: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Score of one probe minus that of another on the same sites, with the 95 % interval [low, high] of the difference."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`+0.143 [+0.05, +0.23] *`, the star where the interval excludes 0."""
        return f"{self.value:+.3f} [{self.low:+.2f}, {self.high:+.2f}]{' *' if self.is_clear else ''}"

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(score: Outcome, base: Outcome, seed: int = 0) -> Difference | None:
    """Paired bootstrap of score − base: each draw takes the same sites for both (Koehn, EMNLP 2004).

    Of the sites that both tested; None without one, or where the two do not count the same sites or classes.
    """
    if score.counts.shape != base.counts.shape:
        return None
    both = score.tested & base.tested
    if not both.any():
        return None
    a, b = score.counts[both], base.counts[both]
    low, high = np.quantile(site_draws(a, seed) - site_draws(b, seed), [0.025, 0.975])
    return Difference(_score(a.sum(0), len(a)) - _score(b.sum(0), len(b)), float(low), float(high))


def total_score(outcome: Outcome) -> float:
    """Accuracy or mean IoU over the tested sites; 0 without one."""
    counts = outcome.counts[outcome.tested]
    return _score(counts.sum(0), len(counts)) if len(counts) else 0.0


def score_of(outcome: Outcome, chance: float, seed: int = 0) -> Score:
    """Score and interval of what each site got; counts may be means over several rounds, between 0 and 1."""
    counts = outcome.counts[outcome.tested]
    low, high = np.quantile(site_draws(counts, seed), [0.025, 0.975])
    return Score(total_score(outcome), float(low), float(high), chance, len(counts))


def accuracy(predicted: np.ndarray, truth: np.ndarray, trained_on: np.ndarray, seed: int = 0) -> Score:
    """Share of sites named rightly. Chance: guessing with the frequencies of the training labels, expected."""
    frequency = np.bincount(trained_on, minlength=int(truth.max()) + 1) / len(trained_on)
    right = predicted == truth
    low, high = np.quantile(site_draws(right, seed), [0.025, 0.975])
    return Score(float(right.mean()), float(low), float(high), float(frequency[truth].mean()), len(truth))


def mean_iou(confusions_SKK: np.ndarray, commonest: int, seed: int = 0) -> Score:
    """Mean over the classes that occur of intersection / union, from per-site confusion matrices [S, truth, predicted].

    Chance: always naming the commonest training class.
    """
    whole = confusions_SKK.sum(0)
    low, high = np.quantile(site_draws(confusions_SKK, seed), [0.025, 0.975])
    constant = np.zeros_like(whole)
    constant[:, commonest] = whole.sum(1)
    return Score(_miou(whole), float(low), float(high), _miou(constant), len(confusions_SKK))


def confusion(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """[truth, predicted] counts of labelled pixels (truth >= 0)."""
    keep = truth >= 0
    index = truth[keep].astype(np.int64) * num_classes + predicted[keep]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def _miou(confusion_KK: np.ndarray) -> float:
    hit, truth, said = np.diag(confusion_KK), confusion_KK.sum(1), confusion_KK.sum(0)
    occurs = truth > 0
    return float((hit / np.maximum(truth + said - hit, 1))[occurs].mean()) if occurs.any() else 0.0


def _score(total: np.ndarray, sites: int) -> float:
    """Of counts summed over sites: a number of right sites, or one confusion matrix."""
    return _miou(total) if total.ndim == 2 else float(total) / sites


def site_draws(counts: np.ndarray, seed: int) -> np.ndarray:
    """[DRAWS] scores of resampled sites; counts as in `Outcome`. The draws hang on the seed and the number of sites only: equal
    ones draw the same sites for every probe of the same split."""
    sites = len(counts)
    picks = np.random.default_rng(seed).integers(0, sites, (DRAWS, sites))
    per_site = counts.reshape(sites, -1).astype(np.float64)  # whole numbers: sums are exact in any order
    scores = np.empty(DRAWS)
    for i, pick in enumerate(picks):
        total = np.bincount(pick, minlength=sites) @ per_site
        scores[i] = _score(total.reshape(counts.shape[1:]), sites)
    return scores
