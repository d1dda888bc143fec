"""Resume is an equality: on the same layout bit by bit, on any other to rounding; what is loaded is exactly what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration
JOB = "tests.integration.layouts:segments"


def test_a_chain_over_layouts_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    def run(world: int, jobs: list[dict[str, Any]], name: str) -> list[Any]:
        return run_ranks(JOB, world, jobs, tmp_path / name)[0]

    first = {"stage": 2, "ep": 2}
    half, whole = run(4, [
        {"case": first, "from": 0, "to": 10, "save": str(tmp_path / "10")},
        {"case": first, "from": 0, "to": 20},
    ], "a")  # fmt: skip
    chain = [
        (4, first, 10, 20, None),
        (2, {"stage": 1, "ep": 1}, 10, 14, "14"),
        (1, {"stage": 0}, 14, 16, "16"),
        (4, {"stage": 2, "ep": 4}, 16, 18, "18"),
        (2, {"stage": 3}, 18, 20, None),
    ]
    saved = {"10": half["final"]}
    for i, (world, case, start, stop, save) in enumerate(chain):
        job = {"case": case, "load": str(tmp_path / str(start)), "from": start, "to": stop}
        [result] = run(world, [{**job, "save": str(tmp_path / save)} if save else job], f"b{i}")
        assert result["loaded"] == saved[str(start)]  # weights, both moments, teacher: every element, every expert
        assert result["distinct"]
        assert result["losses"] == pytest.approx(whole["losses"][start:stop], rel=1e-6)
        if i == 0:
            assert result["losses"] == whole["losses"][10:]
            assert result["final"] == whole["final"]
        if save:
            saved[save] = result["final"]
    for name, values in whole["final"].items():
        assert result["final"][name] == pytest.approx(values, rel=1e-5, abs=2e-6), name


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """And it is said, and with none left the run does not start over silently."""
    url, case = tmp_path / "c", {"stage": 1}
    jobs = [{"case": case, "from": 0, "to": k, "save": str(url)} for k in (2, 4)]
    run_ranks(JOB, 1, jobs, tmp_path / "a")
    newest = url / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 255
    newest.write_bytes(data)
    [result] = run_ranks(JOB, 1, [{"case": case, "load": str(url), "from": 2, "to": 3}], tmp_path / "b")[0]
    assert len(result["losses"]) == 1
    assert "is damaged" in (tmp_path / "b" / "rank-0.log").read_text()
    manifest = url / "step-00000002" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"]["rank-00000.safetensors"]["bytes"] += 1
    manifest.write_text(json.dumps(tree))
    with pytest.raises(AssertionError, match="none of the 2 checkpoints is whole"):
        run_ranks(JOB, 1, [{"case": case, "load": str(url), "from": 2, "to": 3}], tmp_path / "d")
