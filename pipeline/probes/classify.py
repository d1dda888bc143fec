"""Frozen-feature classifiers without a training loop: weighted k-NN and ridge regression. Deterministic, no torch.

Dimension legend: N train rows · M test rows · D features · K classes · L penalties.
"""

from __future__ import annotations

import numpy as np

PENALTIES = tuple(10.0**power for power in range(-4, 5))
TEMPERATURE = 0.07


def knn(train_ND: np.ndarray, labels_N: np.ndarray, test_MD: np.ndarray, k: int = 20) -> np.ndarray:
    """Predicted class per test row: votes of the k most similar rows, weighted by exp(cosine / 0.07).

    The protocol of Wu et al. (1805.01978, section 3.4) as DINO runs it; what we change: features are centred on the training
    mean first (an untrained network's features differ little from their mean), and k is at most the size of the
    smallest quarter of the training rows, so that small sets keep neighbours near.
    """
    k = max(1, min(k, len(train_ND) // 4))
    centre = train_ND.mean(0)
    similarity = _unit(test_MD - centre) @ _unit(train_ND - centre).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / TEMPERATURE)
    votes = np.zeros((len(test_MD), int(labels_N.max()) + 1))
    for column in range(k):
        np.add.at(votes, (np.arange(len(test_MD)), labels_N[nearest[:, column]]), weights[:, column])
    return votes.argmax(1)


def ridge(train_ND: np.ndarray, labels_N: np.ndarray, test_MD: np.ndarray) -> np.ndarray:
    """Predicted class per test row of a linear classifier: least squares on ±1 class targets of standardised features.

    min ||X W - Y||² + λ ||W||², λ of PENALTIES with the least leave-one-out error, which has a closed form
    (residual / (1 - leverage); Allen 1974). No step size, no seed: the same features always give the same score.
    """
    mean, std = train_ND.mean(0), train_ND.std(0) + 1e-6
    x = ((train_ND - mean) / std).astype(np.float64)
    targets = np.where(labels_N[:, None] == np.arange(int(labels_N.max()) + 1), 1.0, -1.0)
    offset = targets.mean(0)
    power, vectors = np.linalg.eigh(x.T @ x)  # D x D: many rows cost little; null directions drop out
    kept = power > 1e-9 * max(power[-1], 1e-300)
    s, vectors = np.sqrt(power[kept]), vectors[:, kept]
    u = x @ (vectors / s)
    projected = u.T @ (targets - offset)
    best = min(PENALTIES, key=lambda penalty: _loo_error(u, s, projected, targets - offset, penalty * len(x) / 100))
    shrink = s / (s**2 + best * len(x) / 100)
    weights = vectors @ (shrink[:, None] * projected)
    return (((test_MD - mean) / std) @ weights + offset).argmax(1)


def _loo_error(u: np.ndarray, s: np.ndarray, projected: np.ndarray, targets: np.ndarray, penalty: float) -> float:
    share = s**2 / (s**2 + penalty)
    fitted = u @ (share[:, None] * projected)
    leverage = (u**2) @ share + 1 / len(u)
    return float((((targets - fitted) / np.clip(1 - leverage, 1e-3, None)[:, None]) ** 2).mean())


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
