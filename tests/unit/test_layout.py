"""Layouts that cannot work are refused by one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import from_dict
from cluster.errors import UsageError
from cluster.ranks import Ranks
from pipeline.config import PretrainConfig
from pipeline.parallel.layout import Layout


def layout(world: int, **keys: Any) -> Layout:
    tree: dict[str, Any] = {
        "train": {"batch": 16, "precision": "fp32"},
        "model": {"moe": {"experts": 4}},
        "parallel": {},
    }
    for key, value in keys.items():
        section, _, leaf = key.partition("__")
        tree[section][leaf] = value
    return Layout.of(from_dict(PretrainConfig, tree), Ranks(rank=world - 1, world=world))


def test_expert_parallelism_stays_in_a_node() -> None:
    tree = {"train": {"batch": 64, "precision": "fp32"}, "model": {"moe": {"experts": 16}}, "parallel": {"ep": 16}}
    for local_world, allowed, fits in ((8, False, False), (8, True, True), (16, False, True), (32, False, True)):
        config = from_dict(PretrainConfig, {**tree, "parallel": {"ep": 16, "ep_across_nodes": allowed}})
        if fits:
            assert Layout.of(config, Ranks(world=32, local_world=local_world)).ep == 16
        else:
            with pytest.raises(UsageError, match=r"parallel\.ep=16 does not fit into nodes of 8 processes"):
                Layout.of(config, Ranks(world=32, local_world=local_world))


def test_degrees() -> None:
    found = layout(4, train__micro_batch=2, parallel__ep=2)
    assert (found.accumulation, found.batch, found.batch_per_rank, found.expert_rank) == (2, 16, 4, 1)
    assert "4 x 2 x 2" in str(found)


@pytest.mark.parametrize(
    ("world", "keys", "named"),
    [
        (3, {}, "train.batch=16 is not divisible by 3 processes; use 15 or 18"),
        (32, {}, "train.batch=16 is not divisible by 32 processes; use 32"),
        (4, {"train__micro_batch": 3}, "train.micro_batch=3"),
        (4, {"parallel__ep": 3}, "parallel.ep=3 does not divide the 4 processes"),
        (8, {"parallel__ep": 8}, "parallel.ep=8 does not divide model.moe.experts=4"),
        (4, {"parallel__ep": 2, "model__moe": {"experts": 0}}, "parallel.ep=2 needs experts"),
        (4, {"parallel__ep": 2, "parallel__zero_stage": 3}, "parallel.zero_stage=3 with parallel.ep>1"),
        (4, {"parallel__zero_stage": 4}, "zero_stage must be 0 to 3"),
        (4, {"parallel__zero_stage": 0, "train__precision": "bf16"}, "bf16 with parallel.zero_stage=0"),
        (4, {"parallel__zero_stage": 1, "train__precision": "bf16", "train__micro_batch": 1}, "bf16 with ZeRO-1"),
        (4, {"parallel__zero_stage": 0, "parallel__offload": True}, "parallel.offload"),
    ],
)
def test_refusals_name_the_key(world: int, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        layout(world, **keys)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
