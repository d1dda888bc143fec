"""Scores and their bootstrap intervals. The unit of resampling is the site: pixels of one site are not independent."""

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


def accuracy(predicted: np.ndarray, truth: np.ndarray, trained_on: np.ndarray, seed: int = 0) -> Score:
    """Share of sites named rightly. Chance: guessing with the frequencies of the training labels, expected."""
    frequency = np.bincount(trained_on, minlength=int(truth.max()) + 1) / len(trained_on)
    right = (predicted == truth).astype(np.float64)
    draws = right[_resample(len(right), seed)].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Score(float(right.mean()), float(low), float(high), float(frequency[truth].mean()), len(truth))


def mean_iou(confusions_SKK: np.ndarray, commonest: int, seed: int = 0) -> Score:
    """Mean over the classes that occur of intersection / union, from per-site confusion matrices [S, truth, predicted].

    Chance: always naming the commonest training class.
    """
    whole = confusions_SKK.sum(0)
    picks = _resample(len(confusions_SKK), seed)
    draws = [_miou(confusions_SKK[pick].sum(0)) for pick in picks]
    low, high = np.quantile(draws, [0.025, 0.975])
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


def _resample(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))
