"""ZeRO stage, expert parallelism, accumulation and number of processes change nothing in what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rank_jobs import run_ranks

JOB = "tests.integration.layouts:train_all"
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 2e-6  # relative, absolute; measured: 1.2e-7 and 2.4e-7 after 20 steps (float32)
pytestmark = pytest.mark.integration


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
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process, ZeRO-0, no accumulation, no expert parallelism."""
    return run_ranks(JOB, 1, [{"stage": 0}], tmp_path_factory.mktemp("reference"))[0][0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_trains_alike(world: int, reference: Any, tmp_path: Path) -> None:
    grid = cases(world)
    results = run_ranks(JOB, world, grid, tmp_path)
    assert all(rank[i]["losses"] == results[0][i]["losses"] for rank in results for i in range(len(grid)))
    for case, result in zip(grid, results[0]):
        assert result["losses"] == pytest.approx(reference["losses"], rel=LOSS_TOLERANCE), case
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5), case
        assert result["tensors"].keys() == reference["tensors"].keys()
        for name, values in reference["tensors"].items():  # student, teacher, both moments, of every parameter
            assert result["tensors"][name] == pytest.approx(values, rel=1e-5, abs=WEIGHT_TOLERANCE), (case, name)
        assert result["teacher_drift"] == 0.0, case
    if world == 2:  # the same layout twice is the same run, bit by bit
        twice = [i for i, case in enumerate(grid) if case == {"stage": 2, "ep": 2, "micro": 4}]
        assert len(twice) == 2
        assert results[0][twice[0]] == results[0][twice[1]]


def test_gradients_equal_the_single_process_ones(tmp_path: Path) -> None:
    job = "tests.integration.layouts:gradients"
    expected = run_ranks(job, 1, [{"stage": 1}], tmp_path / "1")[0][0]
    found = run_ranks(job, 4, [{"stage": 1, "ep": 2}, {"stage": 2, "ep": 4}, {"stage": 2, "ep": 2, "micro": 1}], tmp_path / "4")[0]
    for gradients in found:
        assert gradients.keys() == expected.keys()
        for name, values in expected.items():  # router, experts and dense parts
            assert any(values), name
            assert gradients[name] == pytest.approx(values, abs=1e-6), name


def test_bfloat16_keeps_fp32_masters_and_averages(tmp_path: Path) -> None:
    """At momentum 0.9995 a bf16 average would stand still; ours moves as the fp32 formula says."""
    grid = [{"stage": s, "ep": e, "precision": "bf16"} for s, e in ((1, 1), (2, 2), (3, 1))]
    results = run_ranks(JOB, 2, grid, tmp_path)[0]
    for result in results:
        assert result["losses"][-1] < 0.9 * result["losses"][0]
        assert result["losses"] == pytest.approx(results[0]["losses"], rel=0.02)
    for kind in ("student", "teacher"):
        values = [v for name, t in results[1]["tensors"].items() if name.startswith(kind) for v in t]
        assert any(abs(v) * 256 % 1 for v in values)  # more digits than bf16 holds
