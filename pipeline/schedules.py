"""Schedules: pure functions of the number of samples seen, so that batch size and world size may change in mid-run. No torch."""

from __future__ import annotations

import math

from model.config import ObjectiveConfig


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine from `start` (done = 0) to `end` (done >= 1): end + (start - end)(1 + cos πd)/2."""
    done = min(max(done, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def learning_rate(samples: int, total: int, warmup: float, peak: float, end: float) -> float:
    """Linear warm-up from 0 over `warmup` samples, then a cosine from `peak` to `end` at `total` samples.

    Evaluated after the step's own samples, so that the first step of a warm-up already moves.
    """
    if samples < warmup:
        return peak * samples / warmup
    return cosine(peak, end, (samples - warmup) / max(total - warmup, 1))


def weight_decay(samples: int, total: int, start: float, end: float) -> float:
    """Cosine from start to end (DINO's rising weight decay, arXiv 2104.14294)."""
    return cosine(start, end, samples / max(total, 1))


def ema_momentum(samples: int, total: int, start: float, end: float) -> float:
    """Cosine from start to end: the teacher freezes as the student converges (BYOL, arXiv 2006.07733)."""
    return cosine(start, end, samples / max(total, 1))


def growing_momentum(samples: int, batch: int, share: float, limits: tuple[float, float]) -> float:
    """Momentum of one step whose half-life is `share` of the samples seen so far, within `limits` samples.

    The memory grows with the run (power-function EMA, arXiv 2312.02696): a teacher of ten minutes follows as well as one of
    600 k steps, and the batch size does not matter.
    """
    half_life = min(max(share * samples, limits[0]), limits[1])
    return 0.5 ** (batch / half_life)


def teacher_momentum(objective: ObjectiveConfig, samples: int, total: int, batch: int) -> float:
    """The teacher's momentum in the step that ends at `samples`."""
    if objective.ema_half_life:
        return growing_momentum(samples, batch, objective.ema_half_life, objective.ema_samples)
    return ema_momentum(samples, total, *objective.ema_momentum)
