"""Every parameter is in exactly one group, of the right kind."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import UsageError
from pipeline.config import OptimizerConfig
from pipeline.optimizer import adamw, kind_of, parameter_groups, set_rates
from tests.standin import StandIn


def test_each_parameter_once_and_by_kind() -> None:
    model = StandIn(4)
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(lr_scale={"leave": 0.5, "moe.0": 0.1}))
    names = {id(p): n for n, p in model.named_parameters()}
    placed = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(placed) == sorted(names.values())
    kinds = {names[id(p)]: (g["kind"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert kinds["enter.weight"] == ("decay", 1.0)
    assert kinds["norm.weight"] == ("no_decay", 1.0)
    assert kinds["leave.bias"] == ("no_decay", 0.5)
    assert kinds["moe.0.experts.w1_EDF"] == ("experts", 0.1)
    assert kinds["moe.1.experts.b1_EF"] == ("no_decay_experts", 1.0)
    assert kinds["moe.1.router.weight_ED"] == ("router", 1.0)


def test_names_that_never_decay() -> None:
    matrix = torch.zeros(3, 4)
    for name in ("skysense.prompts.hr", "decoder.queries", "blocks.0.logit_scale", "fusion.extra_token"):
        assert kind_of(name, matrix) == "no_decay", name
    assert kind_of("skysense.fusion.blocks.0.qkv.weight", matrix) == "decay"


def test_expert_parallel_groups_carry_deepspeeds_marks() -> None:
    model = StandIn(4)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.allreduce, parameter.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    groups = parameter_groups(model.named_parameters(), OptimizerConfig())
    assert all((g["kind"].endswith("experts")) == (g.get("moe", False) and g["name"] == "ep_size_2") for g in groups)


def test_rates() -> None:
    optimizer = adamw(StandIn(4), OptimizerConfig(lr_scale={"leave": 0.5}))
    set_rates(optimizer.param_groups, 0.1, 0.2)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 * group["lr_scale"]
        assert group["weight_decay"] == (0.0 if group["kind"].startswith("no_decay") else 0.2)


def test_a_scale_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"optimizer.lr_scale.leeve matches no parameter"):
        adamw(StandIn(0), OptimizerConfig(lr_scale={"leeve": 0.5}))
