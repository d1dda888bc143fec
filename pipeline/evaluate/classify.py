"""Global heads on frozen features: weighted k-NN and logistic regression, for one label or several. No torch, no seed.

Dimension legend: N train rows · M test rows · D features · K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from pipeline.probes.classify import TEMPERATURE

STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # C of the logistic head
K = 20


def knn(train_ND: np.ndarray, targets_NK: np.ndarray, test_MD: np.ndarray, k: int = K) -> np.ndarray:
    """Votes [M, K] of the k most similar rows, weighted by exp(cosine / 0.07), for label sets too. Features are standardised by the
    training rows first: those of an untrained network differ little from their mean, those of pixels have many units."""
    k = max(1, min(k, len(train_ND) // 4))
    mean, std = train_ND.mean(0), train_ND.std(0) + 1e-6
    train, test = _unit((train_ND - mean) / std), _unit((test_MD - mean) / std)
    votes = np.empty((len(test_MD), targets_NK.shape[1]))
    for start in range(0, len(test), 1024):  # a block of similarities at a time
        similarity = test[start : start + 1024] @ train.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, 1) / TEMPERATURE)
        votes[start : start + 1024] = np.einsum("mk,mkc->mc", weights, targets_NK[nearest].astype(float))
    return votes


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def logistic(
    train_ND: np.ndarray, targets_NK: np.ndarray, val_ND: np.ndarray, val_NK: np.ndarray, test_MD: np.ndarray,
    quality: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[np.ndarray, float]:  # fmt: skip
    """(scores [M, K], C). C of STRENGTHS with the best `quality(scores, targets)` on validation, then refitted on train and
    validation together. Features are standardised by the training rows. One label: softmax; several: one fit per label.
    """
    mean, std = train_ND.mean(0), train_ND.std(0) + 1e-6
    train, val, test = ((x - mean) / std for x in (train_ND, val_ND, test_MD))
    best, best_quality = STRENGTHS[0], -np.inf
    for strength in STRENGTHS:
        found = quality(_fit(train, targets_NK, val, strength), val_NK)
        if found > best_quality + 1e-9:  # of equal ones the stronger penalty
            best, best_quality = strength, found
    both, targets = np.concatenate([train, val]), np.concatenate([targets_NK, val_NK])
    return _fit(both, targets, test, best), best


def _fit(x: np.ndarray, targets_NK: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    single = bool((targets_NK.sum(1) == 1).all())
    scores = np.full((len(test), targets_NK.shape[1]), -np.inf if single else 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps near the optimum rank as well as 3,000
        if single:
            labels = targets_NK.argmax(1)
            if len(np.unique(labels)) == 1:
                scores[:, labels[0]] = 0.0
                return scores
            model = LogisticRegression(C=strength, max_iter=300).fit(x, labels)
            found = model.decision_function(test)
            found = np.stack([-found, found], 1) / 2 if found.ndim == 1 else found
            scores[:, model.classes_] = found
            return scores
        for k in range(targets_NK.shape[1]):
            wanted = targets_NK[:, k]
            if wanted.all() or not wanted.any():
                scores[:, k] = float(wanted.mean())
                continue
            scores[:, k] = LogisticRegression(C=strength, max_iter=300).fit(x, wanted).decision_function(test)
    return scores
