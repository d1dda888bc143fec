"""The whole objective gives the losses that it gave: files with provenance, one per arrangement (`make golden` makes them anew)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import TERM_WEIGHTS
from tests import golden


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_are_the_golden_ones(name: str) -> None:
    kept = golden.read(name)
    assert golden.settings_of(kept) == golden.CASES[name], "settings changed: make golden"
    lines = golden.run(*golden.CASES[name])
    assert len(lines) == len(kept["steps"]) == golden.STEPS
    for line, wanted in zip(lines, kept["steps"]):
        assert line == pytest.approx(wanted, rel=kept["rtol"], abs=1e-9), f"step {wanted['step']}"
    assert {"made_by", "layout", "seed", "versions"} <= kept.keys()


def test_a_weight_changed_by_one_percent_is_seen() -> None:
    """Each weight in turn, of the terms and of the router; the first step's loss tells by ten tolerances."""
    model, objective = golden.CASES["all_terms_experts"]
    first = golden.read("all_terms_experts")["steps"][0]["loss"]
    changed = {
        name: (model, replace(objective, **{name: 1.01 * getattr(objective, name)})) for name in TERM_WEIGHTS
    } | {
        name: (replace(model, moe=replace(model.moe, **{name: 1.01 * getattr(model.moe, name)})), objective)
        for name in ("balance_weight", "z_weight")
    }  # fmt: skip
    moved = {name: abs(golden.run(*settings, steps=1)[0]["loss"] / first - 1) for name, settings in changed.items()}
    assert {name: by for name, by in moved.items() if not by > 10 * golden.RTOL} == {}
