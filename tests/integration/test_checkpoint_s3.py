"""Checkpoints on a real object store: nothing can be renamed there, so the manifest commits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster import storage
from cluster.errors import Fenced, RunFailure
from cluster.lease import Lease
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


def write_one(url: str, token: str, value: float, put: store.Write = storage.write_atomic) -> None:
    """A checkpoint of step 7 with one parameter of three equal values."""
    name = store.file_name(0, token)
    facts = write_tensors(f"{store.step_url(url, 7)}/{name}", {"student/w@0": torch.full((3,), value)})
    parameters = {"w": {"shape": [3], "pieces": [[0, 3, name]]}}
    manifest = {
        "format": store.FORMAT, "step": 7, "samples": 7, "adam_step": 7, "files": {name: facts}, "parameters": parameters,
    }  # fmt: skip
    store.commit(url, 7, manifest, put)


def test_a_replaced_step_is_one_or_the_other(s3_url: str) -> None:
    """The same step written by two starts of a run: files of both, one manifest, and it names its own."""
    url = f"{s3_url}/checkpoints"
    for token, value in (("old", 1.0), ("new", 2.0)):
        write_one(url, token, value)
        assert consolidated(url, "student")[0]["w"].tolist() == [value] * 3
    assert storage.list_names(f"{url}/step-00000007") == ["manifest.json", "rank-00000.new.safetensors"]
    storage.remove(f"{committed(url)[0]}/manifest.json")
    with pytest.raises(RunFailure, match="never committed"):
        open_checkpoint(f"{url}/step-00000007")
    assert committed(url) == []
    assert "AWS_ENDPOINT_URL" in os.environ


@pytest.mark.parametrize("replaces", [True, False])
def test_a_commit_that_is_under_way_during_a_takeover(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """Frozen after its last look, it sends its manifest when the successor has started: it replaces nothing, and where nothing
    stood it makes no whole checkpoint."""
    url, first = f"{s3_url}/checkpoints", Lease.acquire(s3_url)
    if replaces:
        write_one(url, "old", 1.0, first.write)
    send = storage.replace

    def frozen(target: str, data: bytes, expected: str | None) -> bool:
        monkeypatch.setattr(storage, "replace", send)
        second = Lease.acquire(s3_url)
        store.clear_leftovers(url, write=second.write)
        return send(target, data, expected)

    monkeypatch.setattr(storage, "replace", frozen)
    with pytest.raises(Fenced, match="a later start"):
        write_one(url, "late", 2.0, first.write)
    if replaces:
        assert consolidated(url, "student")[0]["w"].tolist() == [1.0] * 3
        assert storage.list_names(f"{url}/step-00000007") == ["manifest.json", "rank-00000.old.safetensors"]
    else:
        with pytest.raises(RunFailure, match=r"rank-00000.late.safetensors is missing"):
            store.check_sizes(open_checkpoint(committed(url)[0]))
