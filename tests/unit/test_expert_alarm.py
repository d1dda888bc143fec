"""Dead experts: named by layer once no modality uses them for a whole window; specialists and short lulls raise no alarm."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.rundir import RunDir
from pipeline.config import PretrainConfig, RunConfig
from pipeline.engine import StepResult
from pipeline.steplog import StepLog
from pipeline.tracking import RunFacts
from pipeline.tracking.experts import TAG, WINDOW, DeadExpert, ExpertWatch, dead_experts, loads_of
from pipeline.tracking.mirror import write_record
from pipeline.tracking.store import MemoryStore
from pipeline.tracking.tracker import Tracker


def line(hr: list[float], s2: list[float], layer: int = 0) -> dict[str, float]:
    return {f"moe/layer{layer}/load/{m}/{e}": x for m, shares in (("hr", hr), ("s2", s2)) for e, x in enumerate(shares)}


ALIVE = line([0.5, 0.2, 0.3], [0.1, 0.6, 0.3])
DEAD = line([0.6, 0.4, 0.0], [0.3, 0.699, 0.001], layer=0)


def test_an_expert_no_modality_uses_is_dead_and_a_specialist_is_not() -> None:
    assert dead_experts([loads_of(DEAD)]) == [DeadExpert(0, 2, ("hr", "s2"))]
    assert dead_experts([loads_of(line([1.0, 0.0], [0.0, 1.0]))]) == []
    assert str(DeadExpert(3, 2, ("hr", "s2"))) == "layer 3 expert 2 (hr, s2)"


def test_a_modality_without_tokens_says_nothing() -> None:
    assert dead_experts([loads_of(line([0.7, 0.3, 0.0], [0.0, 0.0, 0.0]))]) == [DeadExpert(0, 2, ("hr",))]
    assert dead_experts([loads_of({"loss": 1.0, "moe/layer0/load/hr/0": 0.0})]) == []


def test_layers_are_told_apart() -> None:
    both = loads_of(ALIVE | line([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], layer=4))
    assert [(dead.layer, dead.expert) for dead in dead_experts([both])] == [(4, 2)]


@given(st.integers(2, 16), st.floats(0.0, 0.03), st.floats(0.0, 0.03))
def test_the_threshold_is_a_share_of_the_fair_share(experts: int, first: float, second: float) -> None:
    window = [
        loads_of({f"moe/layer0/load/hr/{e}": share / experts if e == 0 else (1 - share / experts) / (experts - 1)
                  for e in range(experts)})
        for share in (first, second)
    ]  # fmt: skip
    mean = sum(loads[0, "hr"][0] for loads in window) / 2
    assert [dead.expert for dead in dead_experts(window)] == ([0] if mean < 0.01 / experts else [])


def test_the_alarm_comes_once_with_a_full_window_and_again_after_a_recovery() -> None:
    watch = ExpertWatch(window=3)
    assert [len(watch.look(DEAD)) for _ in range(5)] == [0, 0, 1, 0, 0]
    assert watch.look(ALIVE) == []
    assert watch.dead == []
    assert [len(watch.look(DEAD)) for _ in range(4)] == [0, 0, 1, 0]
    assert watch.look({"loss": 1.0}) == []


@given(st.lists(st.sampled_from([ALIVE, DEAD]), min_size=1, max_size=12), st.integers(0, 12))
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(lines: list[dict[str, float]], at: int) -> None:
    whole, resumed = ExpertWatch(lines[:at], 3), ExpertWatch(lines[:at][-3:], 3)
    for each in lines[at:]:
        assert whole.look(each) == resumed.look(each)
        assert (whole.dead, whole.is_sure) == (resumed.dead, resumed.is_sure)


def test_a_run_warns_once_counts_and_tags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rundir, store = RunDir(str(tmp_path)), MemoryStore()
    rundir.write_resolved(PretrainConfig(run=RunConfig(dir=str(tmp_path))))
    rundir.start_metrics(0)
    write_record(rundir, "test", "a run", RunFacts())
    tracker = Tracker(rundir, store, flush_s=0.01)
    layout = SimpleNamespace(rank=0, world=1, batch=8, precision="fp32")
    steps = WINDOW + 2

    def log_steps(first: int, last: int) -> None:
        log = StepLog(rundir, tracker, layout, torch.device("cpu"), 0.0, first - 1, steps, 0.0)  # type: ignore[arg-type]
        for step in range(first, last + 1):
            result = StepResult(loss=1.0, grad_norm=1.0, lr=0.1, applied=True, metrics=DEAD)
            log.write(step, 8 * step, result, {})
        log.close()

    with caplog.at_level(logging.WARNING, "pipeline.steplog"):
        log_steps(1, 5)
        log_steps(6, steps)  # a resume: the window goes on
    tracker.close()
    [warning] = [record.getMessage() for record in caplog.records if "dead experts" in record.getMessage()]
    assert warning.startswith(f"step {WINDOW}: dead experts")
    assert "layer 0 expert 2 (hr, s2)" in warning
    counts = [metrics.get("moe/dead_experts_lasting") for metrics in rundir.read_metrics()]
    assert counts == [None] * (WINDOW - 1) + [1] * 3
    (run,) = store.runs.values()
    assert run["tags"][TAG] == "layer 0 expert 2 (hr, s2)"
