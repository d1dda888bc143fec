"""The real model under several layouts: experts on other ranks, sharded weights, accumulation, recomputation in backward and
drop-path change nothing in what is computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.data_folder import REPOSITORY
from tests.rank_jobs import run_ranks

SAVING = {"activation_checkpointing": True}
ONE = [{"stage": 1}]
TWO = [
    {"stage": 2, "ep": 2},
    {"stage": 1, "ep": 2, "micro": 2, "model": SAVING},
    {"stage": 3, "model": SAVING},
]
# every term of `model.prediction`, everything that hides, local views in MGCL
ALL_TERMS = yaml.safe_load((REPOSITORY / "tests/runs/all_terms.yaml").read_text())["objective"]


@pytest.mark.integration
@pytest.mark.parametrize("objective", [{}, ALL_TERMS], ids=["paper", "all"])
def test_every_layout_trains_the_same_model(tmp_path: Path, objective: dict[str, object]) -> None:
    job = "tests.integration.model_layouts:train"
    one, two = ([{**case, "objective": objective} for case in cases] for cases in (ONE, TWO))
    [reference] = run_ranks(job, 1, one, tmp_path / "one")[0]
    assert all(loss == loss for loss in reference["losses"])
    for case, result in zip(two, run_ranks(job, 2, two, tmp_path / "two")[0], strict=True):
        # every layout draws the same first weights; after that float32, where float64 agrees to 1e-9 (`tests/unit/test_pretrain.py`)
        assert result["losses"][0] == pytest.approx(reference["losses"][0], rel=1e-6), case
        assert result["losses"] == pytest.approx(reference["losses"], rel=5e-5), case
        assert result["norms"].keys() == reference["norms"].keys()
        for name, norm in result["norms"].items():
            assert norm == pytest.approx(reference["norms"][name], rel=2e-3, abs=1e-6), (case, name)
