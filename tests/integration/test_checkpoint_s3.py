"""Checkpoints on a real object store: nothing can be renamed there, so the manifest commits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster import storage
from cluster.errors import RunFailure
from pipeline.checkpoint import committed, consolidated, open_checkpoint, store
from pipeline.checkpoint.tensors import write_tensors
from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration
JOB = "tests.integration.layouts:segments"


def test_saved_and_resumed_on_s3(s3_url: str, tmp_path: Path) -> None:
    url, case = f"{s3_url}/run/checkpoints", {"stage": 2, "ep": 2}
    before = run_ranks(JOB, 2, [{"case": case, "from": 0, "to": k, "save": url} for k in (2, 4)], tmp_path / "a")[0]
    assert [storage.name(u) for u in committed(url)] == ["step-00000004", "step-00000002"]
    names = storage.list_names(committed(url)[0])
    assert len(names) == 3, names  # two ranks and the manifest: no notes, no temporary objects
    [after] = run_ranks(JOB, 1, [{"case": {"stage": 1}, "load": url, "from": 4, "to": 5}], tmp_path / "b")[0]
    assert after["loaded"] == before[1]["final"]
    weights, checkpoint = consolidated(f"{s3_url}/run", "student")
    assert checkpoint.step == 4
    assert weights["moe.0.experts.w1_EDF"].flatten().tolist() == before[1]["final"]["student/moe.0.experts.w1_EDF"]


def test_a_replaced_step_is_one_or_the_other(s3_url: str) -> None:
    """The same step written by two starts of a run: files of both, one manifest, and it names its own."""
    url = f"{s3_url}/checkpoints"
    for token, value in (("old", 1.0), ("new", 2.0)):
        name = f"rank-00000.{token}.safetensors"
        facts = write_tensors(f"{store.work_url(url, 7, token)}/{name}", {"student/w@0": torch.full((3,), value)})
        parameters = {"w": {"shape": [3], "pieces": [[0, 3, name]]}}
        manifest = {
            "format": store.FORMAT,
            "step": 7,
            "samples": 7,
            "adam_step": 7,
            "files": {name: facts},
            "parameters": parameters,
        }
        store.commit(url, 7, token, manifest)
        assert consolidated(url, "student")[0]["w"].tolist() == [value] * 3
        store.tidy(f"{url}/step-00000007", manifest)
    assert storage.list_names(f"{url}/step-00000007") == ["manifest.json", "rank-00000.new.safetensors"]
    storage.remove(f"{committed(url)[0]}/manifest.json")
    with pytest.raises(RunFailure, match="never committed"):
        open_checkpoint(f"{url}/step-00000007")
    assert committed(url) == []
    assert "AWS_ENDPOINT_URL" in os.environ
