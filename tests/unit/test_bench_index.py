"""The made-up index of `bench index` is one that the reader opens, and its harms are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bench import index
from pipeline.config import DataConfig
from pipeline.reader import table


def test_a_made_up_index_is_opened_and_wrong_ones_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "PART", 700)
    large, small = tmp_path / "large", tmp_path / "small"
    index.make(large, 1500, 5, 4)
    index.make(small, 400, 5, 4)
    held = table.load(DataConfig(url=str(large)), ("hr", "s2", "s1"))
    assert len(held) == 1500
    row = int(held.rows.of([1499])[0])
    assert (held.keys[row], held.shard_urls[held.shard_N[row]]) == ("433D_629L_0000001499", f"{large}/train-000007.tar")
    assert {m: len(clear) for m, clear in held.facts(row, ("hr", "s2", "s1")).clear.items()} == {
        "hr": 1,
        "s2": 5,
        "s1": 4,
    }
    found = index.refusals(large, small)
    assert {harm: "is not the index that the manifest lists" in said for harm, said in found.items()} == {
        "truncated": True, "one bit": True, "another state": True,
    }  # fmt: skip
    assert len(table.load(DataConfig(url=str(large)), ("hr", "s2", "s1"))) == 1500  # as it was
