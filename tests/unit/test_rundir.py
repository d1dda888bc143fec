"""Run directory: metrics stand exactly once over restarts, torn lines are dropped, only the newest start may write."""

from __future__ import annotations

import json
import math
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import metrics, storage
from cluster.config import fingerprint
from cluster.errors import RunFailure, UsageError
from cluster.rundir import RunDir


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def steps(run: RunDir) -> list[int]:
    return [line["step"] for line in run.read_metrics()]


def raw_steps(run: RunDir) -> list[int]:
    """Of the one file; on an object store after `sync` has made it."""
    metrics.write_merged(run.url)
    return [json.loads(line)["step"] for line in storage.read_bytes(run.metrics_url).splitlines()]


def test_nothing_is_created_by_looking(url: str) -> None:
    run = RunDir(url)
    assert (run.read_metrics(), run.last_step(), run.run_id, run.read_resolved()) == ([], None, None, None)
    assert storage.list_names(url) == []


def test_resume_drops_what_will_be_logged_again(url: str) -> None:
    first = RunDir(url)
    first.start_metrics(0)
    for step in (10, 20, 30, 40):
        first.append_metrics({"step": step, "loss": 1.0 / step})
    first.sync()
    second = RunDir(url)
    second.start_metrics(20)
    for step in (30, 40, 50):
        second.append_metrics({"step": step, "loss": 2.0 / step})
    second.close()
    assert raw_steps(second) == [10, 20, 30, 40, 50]
    assert [line["loss"] for line in second.read_metrics()][1:3] == [1.0 / 20, 2.0 / 30]
    third = RunDir(url)  # comes less far than the one before it: what that one logged later no longer counts
    third.start_metrics(20)
    third.append_metrics({"step": 30, "loss": 3.0 / 30})
    third.close()
    assert steps(third) == raw_steps(third) == [10, 20, 30]


@given(
    cuts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), max_size=4), torn=st.integers(0, 30), local=st.booleans()
)  # fmt: skip
def test_each_step_stands_once_whatever_the_interruptions(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]], torn: int, local: bool
) -> None:
    """Runs of some steps, each cut at any byte (an object appears whole or not), each resumed from any earlier step, end in
    1…n exactly once."""
    url = str(tmp_path_factory.mktemp("run")) if local else f"memory://{uuid.uuid4().hex}"
    step = 0
    for length, back in [*cuts, (3, 0)]:
        step = max(0, step - back)
        run = RunDir(url)
        run.start_metrics(step)
        for n in range(length):
            step += 1
            run.append_metrics({"step": step, "loss": 0.5})
            if torn and n % 2 == 0:
                run.sync()
        if not torn or (length, back) == (3, 0):
            run.close()
            last = step
            continue
        if local:  # killed while it wrote
            data = storage.read_bytes(run.metrics_url)
            storage.write_atomic(run.metrics_url, data[: max(len(data) - torn, 0)])
        step = RunDir(url).last_step() or 0
    assert steps(RunDir(url)) == raw_steps(RunDir(url)) == list(range(1, last + 1))


def test_a_step_cannot_be_logged_twice(url: str) -> None:
    run = RunDir(url)
    run.append_metrics({"step": 1})
    with pytest.raises(ValueError, match="each step is logged once"):
        run.append_metrics({"step": 1})


def test_appending_without_start_continues_the_file(url: str) -> None:
    first = RunDir(url)
    first.append_metrics({"step": 5, "loss": 1.0})
    is_local = not url.startswith("memory")
    assert steps(first) == ([5] if is_local else [])  # an object store shows lines from `sync` on
    first.sync()
    run = RunDir(url)
    run.append_metrics({"step": 6, "loss": 1.0})
    assert steps(run) == ([5, 6] if is_local else [5])
    run.sync()
    assert steps(run) == [5, 6]


def test_non_finite_figures_are_null(url: str) -> None:
    run = RunDir(url)
    run.append_metrics({"step": 1, "loss": math.nan, "lr": math.inf, "note": "x"})
    run.sync()
    assert run.read_metrics() == [{"step": 1, "loss": None, "lr": None, "note": "x"}]


def test_resolved_and_run_id_round_trip(url: str) -> None:
    run = RunDir(url)
    tree = {"b": 1, "a": {"c": [1, 2]}}
    assert run.write_resolved(tree) == fingerprint(tree)
    assert RunDir(url).read_resolved() == {"fingerprint": fingerprint(tree), "config": tree}
    run.run_id = "abc"
    assert RunDir(url).run_id == "abc"


def test_the_later_start_fences_the_earlier(url: str) -> None:
    earlier, later = RunDir(url), RunDir(url)
    earlier.check_claim()  # nobody claimed: nothing to check
    earlier.claim()
    earlier.check_claim()
    later.claim()
    later.check_claim()
    with pytest.raises(RunFailure, match="later start"):
        earlier.check_claim()


def test_broken_json_and_empty_url_are_named(url: str) -> None:
    storage.write_atomic(storage.join(url, "tracking.json"), b"{")
    with pytest.raises(UsageError, match=r"tracking\.json"):
        _ = RunDir(url).run_id
    with pytest.raises(UsageError, match=r"run\.dir"):
        RunDir("")
