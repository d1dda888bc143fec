"""Host memory at the start of a run: no rank takes more than 1.2 times what it then keeps. Real processes, real engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration

RANKS = 4
SIZE = [  # 20 million parameters: large enough that weights outweigh all else that a start allocates
    "model.size=small", "objective.prototypes=2048", "train.batch=4", "train.micro_batch=1", "model.moe.experts=0",
]  # fmt: skip
EXPERTS = ["model.moe.experts=8", "parallel.ep=4", "model.moe.blocks=2"]
CASES = {
    f"{kind}, ZeRO-{stage}, {precision}": [*SIZE, *more, f"parallel.zero_stage={stage}", f"train.precision={precision}"]
    for kind, more, stage, precision in (
        ("dense", [], 2, "fp32"), ("dense", [], 1, "bf16"), ("ep=4", EXPERTS, 1, "fp32"), ("ep=4", EXPERTS, 2, "bf16")
    )
}  # fmt: skip


def test_a_start_takes_what_it_keeps_and_a_fifth(tmp_path: Path) -> None:
    ranks = run_ranks("tests.integration.host_memory:measure", RANKS, list(CASES.values()), tmp_path)
    for number, name in enumerate(CASES):
        for rank, cases in enumerate(ranks):
            found = cases[number]
            share = found["risen"] / found["kept"]
            print(f"{name}: rank {rank} kept {found['kept'] / 1e6:.0f} MB, rose by {share:.2f} of it")
            assert found["kept"] > 100e6
            assert share <= 1.2, (name, rank, found)
