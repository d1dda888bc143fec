"""Frozen-feature classifiers without a training loop: weighted k-NN and ridge regression. Deterministic, no torch.

Both see every feature centred and scaled by its mean and standard deviation over the *training* rows: one protocol for features of
any unit (network features, pixel statistics, several of them side by side), and nothing of the test rows in it.
Dimension legend: N train rows · M test rows · S all rows · D features · K classes · R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PENALTIES = tuple(10.0**power for power in range(-4, 7))
TEMPERATURE = 0.07
MIN_STD = 1e-6


@dataclass(frozen=True)
class LinearFit:
    """scores of rows x = ((x − mean) / std) @ weights_DK + offset_K."""

    mean: np.ndarray
    std: np.ndarray
    weights_DK: np.ndarray
    offset_K: np.ndarray

    def predict(self, x_MD: np.ndarray) -> np.ndarray:
        """Class per row."""
        return (((x_MD - self.mean) / self.std) @ self.weights_DK + self.offset_K).argmax(1)


def knn(train_ND: np.ndarray, labels_N: np.ndarray, test_MD: np.ndarray, k: int = 20) -> np.ndarray:
    """Predicted class per test row: votes of the k most similar rows, weighted by exp(cosine / 0.07).

    The protocol of Wu et al. (1805.01978, section 3.4) as DINO runs it; what we change: features are standardised on the training
    rows first (those of an untrained network differ little from their mean, those of pixels have many units), and k is at most
    a quarter of the training rows, so that small sets keep neighbours near.
    """
    k = max(1, min(k, len(train_ND) // 4))
    mean, std = moments(train_ND)
    similarity = _unit((test_MD - mean) / std) @ _unit((train_ND - mean) / std).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / TEMPERATURE)
    votes = np.zeros((len(test_MD), int(labels_N.max()) + 1))
    for column in range(k):
        np.add.at(votes, (np.arange(len(test_MD)), labels_N[nearest[:, column]]), weights[:, column])
    return votes.argmax(1)


def ridge(train_ND: np.ndarray, labels_N: np.ndarray, test_MD: np.ndarray) -> np.ndarray:
    """Predicted class per test row of the linear classifier `fit_ridge`."""
    return fit_ridge(train_ND, labels_N).predict(test_MD)


def fit_ridge(train_ND: np.ndarray, labels_N: np.ndarray) -> LinearFit:
    """Linear classifier: least squares on ±1 class targets of standardised features.

    min ||X W - Y||² + λ ||W||², λ of PENALTIES with the least leave-one-out error over the training rows, which has a closed form
    (residual / (1 - leverage); Allen 1974). Chosen over logistic regression because it has no step size, no seed, no held-out
    part: the same features always give the same score, also with ten labels per class.
    """
    mean, std = moments(train_ND)
    x = ((train_ND - mean) / std).astype(np.float64)
    targets = np.where(labels_N[:, None] == np.arange(int(labels_N.max()) + 1), 1.0, -1.0)
    offset = targets.mean(0)
    u_NR, s, vectors_DR = thin_svd(x)
    projected = u_NR.T @ (targets - offset)
    best = min(PENALTIES, key=lambda penalty: loo_error(u_NR, s, targets - offset, penalty * len(x) / 100))
    shrink = s / (s**2 + best * len(x) / 100)
    return LinearFit(mean, std, vectors_DR @ (shrink[:, None] * projected), offset)


def beside(parts: Sequence[tuple[np.ndarray, np.ndarray]], is_train_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Several feature blocks as one, for sites that may lack some: ([S, ΣD + blocks], bool [S] with any block).

    parts: per block features [S, D] and which sites have it. Each is standardised over the training rows that have it; where it is
    missing it is zero (its mean), and a column of its own says so.
    """
    blocks = []
    for x, present in parts:
        fitted = present & is_train_S
        mean, std = moments(x[fitted]) if fitted.any() else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
        blocks += [np.where(present[:, None], (x - mean) / std, 0.0), present[:, None].astype(float)]
    return np.concatenate(blocks, 1).astype(np.float32), np.any([present for _, present in parts], axis=0)


def moments(train_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per feature; a feature that never changes is left to count for nothing."""
    return train_ND.mean(0), train_ND.std(0) + MIN_STD


def thin_svd(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u [N, R], singular values [R], v [D, R] through the smaller of the two Gram matrices; null directions are left out."""
    is_wide = x_ND.shape[1] > x_ND.shape[0]
    power, vectors = np.linalg.eigh(x_ND @ x_ND.T if is_wide else x_ND.T @ x_ND)
    kept = power > 1e-9 * max(power[-1], 1e-300)
    s, vectors = np.sqrt(power[kept]), vectors[:, kept]
    other = (x_ND.T if is_wide else x_ND) @ (vectors / s)
    return (vectors, s, other) if is_wide else (other, s, vectors)


def loo_error(u_NR: np.ndarray, s: np.ndarray, targets_NK: np.ndarray, penalty: float) -> float:
    """Mean squared error of the rows, each predicted by the ridge regression (with intercept) of all others; targets centred.

    Residual over one minus leverage. Both go to zero together where the features can fit every row (more of them than rows) and
    the penalty is small, so each is summed up from its own small parts, not taken as a difference of large ones.
    """
    left = penalty / (s**2 + penalty)  # what the penalty leaves of each direction: 1 - share
    projected = u_NR.T @ targets_NK
    outside = targets_NK - u_NR @ projected
    power = u_NR**2
    room = 1 - 1 / len(u_NR) - power.sum(1)
    if np.abs(room).max() < 1e-8:  # the features span everything: what is left is rounding
        outside, room = np.zeros_like(outside), np.zeros_like(room)
    residual = u_NR @ (left[:, None] * projected) + outside
    remaining = power @ left + np.maximum(room, 0)
    return float(((residual / np.maximum(remaining, 1e-12)[:, None]) ** 2).mean())


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
