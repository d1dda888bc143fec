"""Schedules: pure functions of the number of samples seen, so that batch size and world size may change in mid-run. No torch."""

from __future__ import annotations

import math


def cosine(start: float, end: float, done: float) -> float:
    """Half a cosine from `start` (done = 0) to `end` (done >= 1): end + (start - end)(1 + cos πd)/2."""
    done = min(max(done, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def learning_rate(samples: int, total: int, warmup: int, peak: float, end: float) -> float:
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
