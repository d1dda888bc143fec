"""Weights of one model put into another: the same or a different one of the same family, dense feed-forward layers into experts.

By name and shape, and nothing is guessed: what fits is copied, what does not is named. The one change of structure known here is
upcycling (Komatsuzaki et al., 2023, "Sparse upcycling", https://arxiv.org/abs/2212.05055): a dense block becomes a block of experts, each
a copy of the dense layer. Ours differ in two ways so that the network's output stays the dense one's:

- gates are probabilities that are not renormalised (`model.moe.router`), about 1/E each, so the experts' last layer is scaled by E / k;
- the router starts at almost nothing (ROUTER_STD): gates are equal to about 1e-5, and still every token has a best expert, different for
  different tokens, which a router of zeros would not give.

Dimension legend: D channels · F hidden channels · E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.initial import Law, draw

ROUTER_STD = 2e-6
EXPERTS = (".ffn.experts.w1_EDF", ".ffn.experts.b1_EF", ".ffn.experts.w2_EFD", ".ffn.experts.b2_ED")
DENSE = (".ffn.fc1.weight", ".ffn.fc1.bias", ".ffn.fc2.weight", ".ffn.fc2.bias")
ROUTER = ".ffn.router.weight_ED"


@dataclass(frozen=True)
class Filled:
    """What became of every tensor of the model. copied: taken as it is; upcycled: made of a dense layer's; missing: name → why it was
    left as drawn."""

    copied: tuple[str, ...]
    upcycled: tuple[str, ...]
    missing: dict[str, str]

    def of(self, prefix: str) -> dict[str, str]:
        """Those of `missing` whose name begins so."""
        return {name: why for name, why in self.missing.items() if name.startswith(prefix)}

    def __str__(self) -> str:
        words = [f"{len(self.copied)} tensors copied"]
        words += [f"{len(self.upcycled)} made of dense layers"] if self.upcycled else []
        words += [f"{len(self.missing)} left as drawn ({', '.join(roots(self.missing))})"] if self.missing else []
        return ", ".join(words)


@torch.no_grad()
def fill(module: nn.Module, source: Mapping[str, Tensor], top_k: int, seed: int = 0) -> Filled:
    """Copies `source` into the parameters of `module`, in place; a dense layer of the source fills experts of the module.

    Buffers stay: they tell of the steps of a run (expert loads, ages of prototypes), not of what was learnt.

    Args:
        top_k: experts per token of `module`.
        seed: of the routers that upcycling draws; equal on all ranks.
    """
    parameters = dict(module.named_parameters())
    filled = plan_fill({name: tuple(parameter.shape) for name, parameter in parameters.items()}, source)
    for name in (*filled.copied, *filled.upcycled):
        parameters[name].copy_(value_of(name, tuple(parameters[name].shape), source, top_k, seed))
    return filled


def plan_fill(shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, Tensor]) -> Filled:
    """What `source` has for parameters of these whole shapes, without touching any."""
    copied: list[str] = []
    upcycled: list[str] = []
    missing: dict[str, str] = {}
    for name, shape in shapes.items():
        there = source.get(name)
        found = tuple(there.shape) if there is not None else _upcycled_shape(name, shape, source)
        if found != shape:
            said = "not there" if found is None else f"{list(found)} there"
            missing[name] = f"{said}, {list(shape)} here"
        else:
            (copied if there is not None else upcycled).append(name)
    return Filled(tuple(copied), tuple(upcycled), missing)


def value_of(name: str, shape: tuple[int, ...], source: Mapping[str, Tensor], top_k: int, seed: int) -> Tensor:
    """The whole tensor for a parameter that `plan_fill` found copied or upcycled."""
    if name in source:
        return source[name]
    if name.endswith(ROUTER):
        drawn = torch.empty(shape)
        draw(drawn, Law("normal", ROUTER_STD), seed, name, drawn.numel())
        return drawn
    ours, theirs = _dense_layer(name)
    dense = source[name.removesuffix(ours) + theirs]
    one = dense.t() if dense.ndim == 2 else dense  # nn.Linear stores [out, in], the experts [in, out]
    scale = shape[0] / top_k if theirs.startswith(".ffn.fc2") else 1.0
    return (one * scale).expand(shape[0], *one.shape)


def roots(names: Iterable[str]) -> list[str]:
    """Names of modules that cover `names`: their first two components, in order, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _dense_layer(name: str) -> tuple[str, str]:
    """(how the name of an expert tensor ends, how the dense tensor's does that it is made of); both empty for other tensors."""
    return next(((ours, theirs) for ours, theirs in zip(EXPERTS, DENSE) if name.endswith(ours)), ("", ""))


def _upcycled_shape(name: str, shape: tuple[int, ...], source: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of what a tensor of a block of experts becomes, if the source has a dense layer in that block; else None."""
    if name.endswith(ROUTER):
        return shape if name.removesuffix(ROUTER) + DENSE[0] in source else None
    ours, theirs = _dense_layer(name)
    dense = source.get(name.removesuffix(ours) + theirs) if ours else None
    return None if dense is None else (shape[0], *reversed(dense.shape))
