"""Failures name step, samples and loads; stalls name the rank."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest

from cluster.ranks import Ranks
from cluster.rundir import RunDir
from pipeline.engine import StepResult
from pipeline.health import (
    PHASES,
    RAISED,
    AgreedFailure,
    Heartbeat,
    SpikeWatch,
    check_step,
    collective_timeout_s,
    describe_lag,
    within,
)
from pipeline.reader.faults import FaultLog


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


@pytest.mark.parametrize("timeout_s", [1.0, 10.0, 40.0, 600.0])
def test_who_waits_is_told_who_lags_before_its_collective_gives_up(
    timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the slowest phase, with a first rank that takes the alarm and then answers nothing: the watch's clock, then its questions."""
    waits: list[float] = []

    def slow(seconds: float, ask: object) -> str | None:
        waits.append(seconds)
        return RAISED if len(waits) == 1 else None

    monkeypatch.setattr("pipeline.health.within", slow)
    monkeypatch.setattr("os._exit", lambda code: None)
    beat = Heartbeat(Ranks(), timeout_s, None)
    beat._end(0.0)
    beat.close()
    assert len(waits) == 2
    assert collective_timeout_s(timeout_s) > 10 * timeout_s + beat._interval + sum(waits)


def test_a_store_that_does_not_take_the_alarm_is_asked_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first rank is frozen: the others need not wait out two questions to know it."""
    waits: list[float] = []
    monkeypatch.setattr("pipeline.health.within", lambda seconds, ask: waits.append(seconds))
    monkeypatch.setattr("os._exit", lambda code: None)
    beat = Heartbeat(Ranks(), 600.0, None)
    beat._end(601.0)
    beat.close()
    assert waits == [10.0]
    assert "rank 0, which keeps everybody's place, does not answer" in capfd.readouterr().err


def test_a_stopped_rank_is_silent() -> None:
    before = [[7, 3, 3], [7, 3, 3]]
    assert describe_lag(before, [[7, 3, 5], [7, 3, 3]]) == "rank 1 is silent, last seen in student of step 7"
    assert describe_lag([[0, 0, 1], None], [[0, 0, 2], None]) == "rank 1 is silent, last seen never"


def test_all_alike() -> None:
    assert describe_lag([[7, 3, 3], [7, 3, 3]], [[7, 3, 5], [7, 3, 4]]) == "all ranks stand in student of step 7"


def test_asking_a_store_that_hangs_or_fails_has_an_end() -> None:
    never = threading.Event()
    assert within(0.05, lambda: str(never.wait())) is None
    never.set()
    assert within(5.0, lambda: "rank 1 lags") == "rank 1 lags"

    def fails() -> str:
        raise OSError("gone")

    assert within(5.0, fails) == "others cannot be asked: gone"


def test_stacks_of_all_threads_are_written_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    beat = Heartbeat(Ranks(), 600.0, RunDir(str(tmp_path)))
    try:
        beat.at("data", 7)
        beat._dump_stacks()
        beat._dump_stacks()
    finally:
        beat.close()
    text = (tmp_path / "logs" / "stacks-00000.txt").read_text()
    assert text.startswith("rank 0 in data of step 7\n")
    assert "test_stacks_of_all_threads_are_written_once" in text
    assert capfd.readouterr().err.count("rank 0 in data of step 7") == 1


def test_a_quarantined_sample_is_named_when_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultLog(2)
    for _ in range(2):
        faults.quarantine("site-1", "wrong checksum")
    assert [record.getMessage() for record in caplog.records] == [
        "sample site-1 cannot be read and takes part as all invalid: wrong checksum"
    ]
