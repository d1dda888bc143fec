"""`run.profile`: a trace of the chosen steps, and of no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.config import load
from cluster.errors import UsageError
from cluster.ranks import Ranks
from cluster.rundir import RunDir
from pipeline.config import PretrainConfig
from pipeline.profiling import Profile


def test_the_chosen_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    profile = Profile((2, 3), RunDir(str(tmp_path)), Ranks(rank=1, world=2))
    for step in range(1, 6):
        profile.at(step)
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(2).sum()
    profile.close()
    [path] = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3-rank-00001.json"
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"step-{step}" for step in range(1, 6)} & names == {"step-2", "step-3"}


def test_a_run_that_ends_within_them_keeps_its_trace(tmp_path: Path) -> None:
    profile = Profile((1, 100), RunDir(str(tmp_path)), Ranks())
    profile.at(1)
    profile.close()
    assert len(list((tmp_path / "profile").iterdir())) == 1
    silent = Profile(None, RunDir(str(tmp_path / "other")), Ranks())
    silent.at(1)
    silent.close()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("steps", ["[0,3]", "[3,2]"])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(UsageError, match=r"run\.profile|first and last step"):
        load(PretrainConfig, None, [f"run.profile={steps}"])
