"""`python -m pipeline layout`: what it refuses before anything is built, and which ranks it takes."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from cluster.config import load
from cluster.errors import UsageError
from pipeline.commands.layout import _check_memory, _ranks
from pipeline.config import PretrainConfig
from tests.data_folder import REPOSITORY


def test_ranks_are_named_or_the_first_middle_and_last() -> None:
    assert _ranks("0,513,1023", 1024) == [0, 513, 1023]
    assert _ranks(None, 1024) == [0, 513, 1023]
    assert [_ranks(None, world) for world in (1, 2, 4)] == [[0], [0, 1], [0, 3]]
    for text, named in (("0,8", "--ranks 8 is outside a world of 8"), ("a", "--ranks a: give numbers")):
        with pytest.raises(UsageError, match=named):
            _ranks(text, 8)


def test_a_model_that_does_not_fit_here_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    _check_memory(load(PretrainConfig, f"{REPOSITORY}/pipeline/runs/tiny.yaml", []))
    with pytest.raises(
        UsageError, match=r"takes \d+ GB of this machine's memory, 8 GB are free; a smaller model\.size"
    ):
        _check_memory(load(PretrainConfig, f"{REPOSITORY}/pipeline/runs/skysense_v2.yaml", []))
