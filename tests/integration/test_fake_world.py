"""Engines built for single ranks of a world of 1,024 hold the pieces that the pure plan says, and the groups that DeepSpeed needs.

Size skysense_v2's structure (stages, fusion, heads, experts in the last six blocks), shrunk in width.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data_folder import REPOSITORY

pytestmark = pytest.mark.integration

WORLD, PER_NODE, EP = 1024, 8, 8
RANKS = [0, 1, 7, 8, 9, 127, 128, 255, 256, 511, 512, 513, 640, 767, 1016, 1022, 1023]
SHRUNK = {"size": "debug", "moe": {"experts": 8, "top_k": 1, "placement": "last_n", "blocks": 3}}
OBJECTIVE = {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16}


def build_all(stage: int) -> list[dict[str, Any]]:
    from cluster.config import from_dict
    from pipeline.config import PretrainConfig
    from pipeline.parallel.fake import built

    config = from_dict(PretrainConfig, {
        "model": SHRUNK, "objective": OBJECTIVE, "train": {"batch": WORLD, "micro_batch": 1, "precision": "fp32"},
        "parallel": {"zero_stage": stage, "ep": EP},
    })  # fmt: skip
    return [built(config, rank, WORLD, PER_NODE) for rank in RANKS]


@pytest.mark.parametrize("stage", [1, 2])
def test_built_ranks_hold_what_the_plan_says(stage: int, tmp_path: Path) -> None:
    """In a process of its own: a fake process group leaves traces in DeepSpeed's and torch's modules."""
    code = f"import json; from tests.integration import test_fake_world as t; json.dump(t.build_all({stage}), open({str(tmp_path / 'found.json')!r}, 'w'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [rank["rank"] for rank in found] == RANKS
    for rank in found:
        assert rank["pieces"] == rank["planned_pieces"], rank["rank"]
        assert rank["state_bytes"] == rank["planned_state_bytes"] > 0
        assert rank["parameters"] == rank["planned_parameters"] < rank["total"]
        assert set(rank["groups"]) == {WORLD, WORLD // EP}
    assert len({json.dumps(rank["pieces"]) for rank in found}) == len(RANKS)  # no two hold the same
