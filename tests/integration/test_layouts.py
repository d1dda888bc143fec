"""ZeRO stage, expert parallelism, accumulation and number of processes change nothing in what is computed, nor does a resume.

Starting ranks is what takes the time, so each number of processes is started once for all its cases.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration
JOBS = "tests.integration.layouts:everything"
# float32, 20 steps; measured: losses 1.8e-7 relative; weights and moments 1.2e-6 absolute in one element (Adam divides a
# gradient near zero by its own size, rounding included), else below 1e-7
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 5e-6
BF16 = [{"stage": stage, "ep": ep, "precision": "bf16"} for stage, ep in ((1, 1), (2, 2), (3, 1))]
EP2 = {"stage": 2, "ep": 2}


def cases(world: int) -> list[dict[str, Any]]:
    found = [
        {"stage": stage, "ep": ep, "micro": 8 // world // parts}
        for stage in (0, 1, 2) for ep in (1, 2, 4) if world % ep == 0 for parts in (1, 2)
    ]  # fmt: skip
    if world == 2:
        found += [{"stage": 1, "offload": True}, {"stage": 2, "ep": 2, "offload": True}, found[-2]]
    # last: DeepSpeed replaces torch's linear for the rest of the process, which then rounds differently
    return found + [{"stage": 3, "micro": 8 // world // parts} for parts in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[int], Any]:
    """What the ranks of the job with 1, 2 or 4 processes found; each runs when it is first asked for."""
    halves = [{"case": EP2, "from": 0, "to": 10, "save": str(folder / "10")}, {"case": EP2, "from": 0, "to": 20}]
    grads = [{"stage": 1, "ep": 2}, {"stage": 2, "ep": 4}, {"stage": 2, "ep": 2, "micro": 1}]
    jobs = {
        1: {"gradients": [{"stage": 1}], "train_all": cases(1)},
        2: {"train_all": cases(2) + BF16},
        4: {"gradients": grads, "segments": halves, "train_all": cases(4)},
    }
    return functools.cache(lambda world: run_ranks(JOBS, world, jobs[world], folder / str(world)))


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]], where: str) -> None:
    """student, teacher and both moments of every parameter."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        a, b = torch.tensor(found[name]), torch.tensor(values)
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=WEIGHT_TOLERANCE, msg=lambda text, n=name: f"{where}: {n}: {text}"
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_trains_alike(world: int, results: Callable[[int], Any]) -> None:
    reference = results(1)[0]["train_all"][0]  # one process, ZeRO-0, no accumulation, no expert parallelism
    grid, found = cases(world), [rank["train_all"] for rank in results(world)]
    assert all(rank[i]["losses"] == found[0][i]["losses"] for rank in found for i in range(len(grid)))
    for case, result in zip(grid, found[0]):
        assert result["losses"] == pytest.approx(reference["losses"], rel=LOSS_TOLERANCE), case
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5), case
        assert_close(result["tensors"], reference["tensors"], str(case))
        assert result["same_average"], case  # sharded averages are the unsharded one, bit by bit
        assert result["teacher_drift"] == 0.0, case  # and what the teacher computes with


def test_the_same_layout_twice_is_the_same_run(results: Callable[[int], Any]) -> None:
    twice = [i for i, case in enumerate(cases(2)) if case == {"stage": 2, "ep": 2, "micro": 4}]
    first, second = (results(2)[0]["train_all"][i] for i in twice)
    assert first == second


def test_gradients_equal_the_single_process_ones(results: Callable[[int], Any]) -> None:
    [expected] = results(1)[0]["gradients"]
    for gradients in results(4)[0]["gradients"]:
        assert gradients.keys() == expected.keys()
        for name, values in expected.items():  # router, experts and dense parts
            assert any(values), name
            assert gradients[name] == pytest.approx(values, rel=1e-6, abs=1e-6), name


def test_bfloat16_keeps_fp32_masters_and_averages(results: Callable[[int], Any]) -> None:
    found = results(2)[0]["train_all"][-len(BF16) :]
    for result in found:
        assert result["losses"][-1] < 0.9 * result["losses"][0]
        assert result["losses"] == pytest.approx(found[0]["losses"], rel=0.02)
    for kind in ("student", "teacher"):
        values = [v for name, t in found[1]["tensors"].items() if name.startswith(kind) for v in t]
        assert any(abs(v) * 256 % 1 for v in values)  # more digits than bf16 holds


def test_a_chain_over_layouts_equals_the_uninterrupted_run(results: Callable[[int], Any], folder: Path) -> None:
    """10 steps on 4 ranks, then a new process per line: bit by bit on the same layout, to rounding on others."""

    def go(world: int, name: str, *jobs: dict[str, Any]) -> list[Any]:
        return run_ranks(JOBS, world, {"segments": list(jobs)}, folder / name)[0]["segments"]

    def job(case: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        return {
            "case": case,
            "load": str(folder / str(start)),
            "from": start,
            "to": stop,
            "save": str(folder / str(stop)),
        }

    half, whole = results(4)[0]["segments"]
    [two] = go(2, "a", job({"stage": 1}, 10, 14))
    one, three = go(1, "b", job({"stage": 0}, 14, 16), job({"stage": 3}, 16, 18))
    same, four = go(4, "c", {**job(EP2, 10, 20), "save": None}, job({"stage": 2, "ep": 4}, 18, 20))

    assert same["losses"] == whole["losses"][10:]
    assert same["final"] == whole["final"]
    for before, after in ((half, two), (two, one), (one, three), (three, four), (half, same)):
        assert after["loaded"] == before["final"]  # weights, both moments, teacher: every element, every expert
        assert after["distinct"]
    losses = two["losses"] + one["losses"] + three["losses"] + four["losses"]
    assert losses == pytest.approx(whole["losses"][10:], rel=LOSS_TOLERANCE)
    assert_close(four["final"], whole["final"], "after the chain")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """And it is said; and with none left the run does not start over silently."""
    job, url, case = "tests.integration.layouts:segments", tmp_path / "c", {"stage": 1}
    run_ranks(job, 1, [{"case": case, "from": 0, "to": k, "save": str(url)} for k in (2, 4)], tmp_path / "a")
    newest = min((url / "step-00000004").glob("rank-*"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 255
    newest.write_bytes(data)
    [result] = run_ranks(job, 1, [{"case": case, "load": str(url), "from": 2, "to": 3}], tmp_path / "b")[0]
    assert len(result["losses"]) == 1
    assert "is damaged" in (tmp_path / "b" / "rank-0.log").read_text()
    manifest = url / "step-00000002" / "manifest.json"
    tree = json.loads(manifest.read_text())
    next(iter(tree["files"].values()))["bytes"] += 1
    manifest.write_text(json.dumps(tree))
    with pytest.raises(AssertionError, match="none of the 2 checkpoints could be loaded"):
        run_ranks(job, 1, [{"case": case, "load": str(url), "from": 2, "to": 3}], tmp_path / "d")
