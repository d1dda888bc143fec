"""Every parameter is in exactly one group, of the right kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cluster.errors import UsageError
from model.config import ModelConfig, ObjectiveConfig
from model.pretrain import Student
from pipeline.config import OptimizerConfig
from pipeline.optimizer import adamw, kinds, parameter_groups, set_rates
from tests.standin import StandIn
from tests.synthetic_batch import STATISTICS


def test_each_parameter_once_and_by_kind() -> None:
    model = StandIn(4)
    groups = parameter_groups(model, OptimizerConfig(lr_scale={"leave": 0.5, "moe.0": 0.1}))
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


def test_what_is_decayed_is_what_multiplies_activations() -> None:
    """Of the real student: learned tokens and tables, and the networks that make position tables, are not decayed."""
    model = ModelConfig(size="debug", position="learned")
    with torch.device("meta"):
        student = Student(model, ObjectiveConfig(prototypes=8, head_hidden=8, head_bottleneck=8), STATISTICS)
    found = kinds(student)
    assert found.keys() == dict(student.named_parameters()).keys()
    never = (
        "prompts.",
        "fusion.day",
        "query_RF",
        "positions.",
        "attention.bias.",
        "queries",
        "norm",
        "_bias",
        ".bias",
        "logit_scale",
    )
    for name, kind in found.items():
        expected = "no_decay" if any(word in name for word in never) else "decay"
        if ".experts." in name:
            expected = "experts" if ".w" in name else "no_decay_experts"
        assert kind == ("router" if ".router." in name else expected), name
    for name in ("skysense.backbone.stages.0.0.attention.bias.hidden.weight", "skysense.fusion.day.weight",
                 "skysense.backbone.prompts.0.tokens.hr", "skysense.backbone.positions.0.table_DGG"):  # fmt: skip
        assert found[name] == "no_decay", name


def test_a_name_decides_nothing() -> None:
    """A matrix called like a learned token is still a matrix, and a learned token by any name is none."""
    module = nn.ModuleDict({"query_position": nn.Linear(3, 4)})
    module.register_parameter("weight", nn.Parameter(torch.zeros(3, 4)))
    assert kinds(module) == {"weight": "no_decay", "query_position.weight": "decay", "query_position.bias": "no_decay"}


def test_expert_parallel_groups_carry_deepspeeds_marks() -> None:
    model = StandIn(4)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.allreduce, parameter.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    groups = parameter_groups(model, OptimizerConfig())
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
