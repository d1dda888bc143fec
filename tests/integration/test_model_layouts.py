"""The real model under several layouts: experts on other ranks, sharded weights, accumulation, recomputation in backward and
drop-path change nothing in what is computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rank_jobs import run_ranks

SAVING = {"activation_checkpointing": True}
ONE = [{"stage": 1}]
TWO = [
    {"stage": 2, "ep": 2},
    {"stage": 1, "ep": 2, "micro": 2, "model": SAVING},
    {"stage": 3, "model": SAVING},
]


@pytest.mark.integration
def test_every_layout_trains_the_same_model(tmp_path: Path) -> None:
    job = "tests.integration.model_layouts:train"
    [reference] = run_ranks(job, 1, ONE, tmp_path / "one")[0]
    assert all(loss == loss for loss in reference["losses"])
    for case, result in zip(TWO, run_ranks(job, 2, TWO, tmp_path / "two")[0], strict=True):
        assert result["losses"] == pytest.approx(reference["losses"], rel=2e-5), case
        assert result["norms"].keys() == reference["norms"].keys()
        for name, norm in result["norms"].items():
            assert norm == pytest.approx(reference["norms"][name], rel=2e-3, abs=1e-6), (case, name)
