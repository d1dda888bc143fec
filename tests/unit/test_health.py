"""Failures name step, samples and loads; stalls name the rank."""

from __future__ import annotations

import math

import pytest

from cluster.ranks import Ranks
from pipeline.engine import StepResult
from pipeline.health import PHASES, AgreedFailure, SpikeWatch, check_step, describe_lag


def result(loss: float = 1.0, norm: float = 1.0, applied: bool = True) -> StepResult:
    return StepResult(loss, {"loss/x": loss, "moe/load/hr/0": 0.75}, norm, 1e-3, applied)


def test_a_sound_step_passes() -> None:
    check_step(1, result(), ["a"], Ranks())


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (result(math.nan), "loss, loss/x not finite"), (result(norm=math.inf), "grad_norm not finite"),
        (result(applied=False), "the update was skipped"),
    ],
)  # fmt: skip
def test_failures_name_step_samples_and_loads(bad: StepResult, what: str) -> None:
    with pytest.raises(AgreedFailure) as caught:
        check_step(17, bad, ["33TWN_4_2", "33TWN_4_3"], Ranks())
    text = str(caught.value)
    for part in ("step 17", what, "33TWN_4_2 33TWN_4_3", '"hr/0": 0.75'):
        assert part in text


def test_spikes_are_told_once_and_slopes_are_not() -> None:
    watch = SpikeWatch(window=50, least=10)
    assert all(watch.spike(2.0 - 0.01 * i + 0.02 * (i % 3)) is None for i in range(40))
    assert watch.spike(9.0) is not None
    assert watch.spike(1.6) is None


def test_lag_is_the_rank_with_the_least_progress() -> None:
    data, student = PHASES.index("data"), PHASES.index("student")
    before = [[7, student, 3], [7, data, 3], [7, student, 4]]
    after = [[7, student, 5], [7, data, 5], [7, student, 6]]
    assert describe_lag(before, after) == "rank 1 lags, in data of step 7"


def test_a_stopped_rank_is_silent() -> None:
    before = [[7, 3, 3], [7, 3, 3]]
    assert describe_lag(before, [[7, 3, 5], [7, 3, 3]]) == "rank 1 is silent, last seen in student of step 7"
    assert describe_lag([[0, 0, 1], None], [[0, 0, 2], None]) == "rank 1 is silent, last seen never"


def test_all_alike() -> None:
    assert describe_lag([[7, 3, 3], [7, 3, 3]], [[7, 3, 5], [7, 3, 4]]) == "all ranks stand in student of step 7"
