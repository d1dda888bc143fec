"""AdamW and its parameter groups: decay · no decay · router · experts, each with its learning-rate scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cluster.errors import UsageError
from model.heads import Prototypes
from model.moe.experts import Experts
from model.moe.router import Router
from model.swin import PositionBias
from pipeline.config import OptimizerConfig
from pipeline.parallel.pieces import Group

# What is decayed: matrices that multiply activations. All else is a scale, an offset, or a learned vector that stands for itself
# (prompt, query, day, position table): decay would pull what it says to zero.
MATRICES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)), (nn.Conv2d, ("weight",)), (Prototypes, ("weight",)), (Router, ("weight_ED",)),
    (Experts, ("w1_EDF", "w2_EFD")),
)  # fmt: skip
POSITIONS = (PositionBias,)  # their layers compute a table of positions, not features


def kinds(module: nn.Module) -> dict[str, str]:
    """Group of every parameter by name: "experts", "no_decay_experts", "router", "no_decay" or "decay".

    Decided by the layer that owns the parameter and its role there, never by how a name happens to end.
    """
    found: dict[str, str] = {}
    inside = [name for name, part in module.named_modules() if isinstance(part, POSITIONS)]
    for path, layer in module.named_modules():
        roles = [names for kind, names in MATRICES if isinstance(layer, kind)]
        is_position = any(f"{path}.".startswith(f"{name}.") for name in inside)
        for own, _ in layer.named_parameters(recurse=False):
            decayed = any(own in names for names in roles) and not is_position
            if isinstance(layer, Experts):
                kind = "experts" if decayed else "no_decay_experts"
            elif isinstance(layer, Router) and decayed:
                kind = "router"
            else:
                kind = "decay" if decayed else "no_decay"
            found[f"{path}.{own}" if path else own] = kind
    return found


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups holding every trainable parameter of `module` exactly once, in a deterministic order.

    Expert-parallel parameters (those DeepSpeed must not average over all ranks) get `moe`/`name` keys: its own marks. A group
    holds parameters of one kind, one learning-rate scale and one sharding.

    Raises:
        UsageError: a prefix in `optimizer.lr_scale` that matches no parameter.
    """
    groups: dict[tuple[str, float, str], dict[str, Any]] = {}
    unused = set(config.lr_scale)
    kind_of = kinds(module)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in config.lr_scale if _matches(name, p)), key=len, default=None)
        scale = config.lr_scale[prefix] if prefix else 1.0
        unused.discard(prefix or "")
        kind = kind_of[name]
        sharding = getattr(parameter, "group_name", "") if not getattr(parameter, "allreduce", True) else ""
        group = groups.setdefault((kind, scale, sharding), {"params": [], "kind": kind, "lr_scale": scale})
        if sharding:
            group.update(moe=True, name=sharding)
        group["params"].append(parameter)
    if unused:
        raise UsageError(f"optimizer.lr_scale.{min(unused)} matches no parameter; prefixes look like skysense.backbone")
    return [groups[key] for key in sorted(groups)]


def groups_of(module: nn.Module, config: OptimizerConfig, ep: int) -> list[Group]:
    """The optimizer's groups of a one-process model (also on `meta`), as `pipeline.parallel.pieces` takes them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for group in parameter_groups(module, config):
        members = tuple((names[id(p)], tuple(p.shape)) for p in group["params"])
        found.append(Group(members, ep > 1 and group["kind"].endswith("experts")))
    return found


def _matches(name: str, prefix: str) -> bool:
    """Prefixes are given by component, from the top or from below it (`backbone` matches `skysense.backbone.…`)."""
    return f".{name}".find(f".{prefix}.") >= 0 or f".{name}".endswith(f".{prefix}")


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `module`. Rates start at 0: `set_rates` decides them before every step."""
    groups = parameter_groups(module, config)
    for group in groups:
        group.update(lr=0.0, weight_decay=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, foreach=True)


def set_rates(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> None:
    """Puts this step's learning rate and weight decay into optimizer groups. The router is decayed like any matrix."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = 0.0 if group["kind"].startswith("no_decay") else weight_decay
