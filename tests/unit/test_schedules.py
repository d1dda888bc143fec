"""Schedules depend on samples alone."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedules import cosine, ema_momentum, learning_rate, weight_decay


def test_known_points() -> None:
    assert learning_rate(50, 1000, 100, 2.0, 0.1) == 1.0
    assert learning_rate(100, 1000, 100, 2.0, 0.1) == 2.0
    assert math.isclose(learning_rate(550, 1000, 100, 2.0, 0.1), 1.05)
    assert math.isclose(learning_rate(1000, 1000, 100, 2.0, 0.1), 0.1)
    assert learning_rate(5, 10, 0, 2.0, 0.0) == 1.0
    assert math.isclose(weight_decay(0, 10, 0.04, 0.2), 0.04)
    assert ema_momentum(10, 10, 0.994, 1.0) == 1.0


@given(st.integers(0, 10**7), st.integers(1, 10**7), st.integers(0, 10**6))
def test_rate_stays_between_its_ends(samples: int, total: int, warmup: int) -> None:
    assert 0.0 <= learning_rate(samples, total, warmup, 1e-3, 1e-6) <= 1e-3


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1), st.floats(0, 1))
def test_cosine_is_monotone(start: float, end: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    first, second = cosine(start, end, low), cosine(start, end, high)
    assert first >= second - 1e-9 if start >= end else first <= second + 1e-9


def test_a_larger_batch_walks_the_same_curve() -> None:
    one = [learning_rate(8 * k, 800, 80, 1.0, 0.0) for k in range(1, 101)]
    two = [learning_rate(16 * k, 800, 80, 1.0, 0.0) for k in range(1, 51)]
    assert one[1::2] == two
