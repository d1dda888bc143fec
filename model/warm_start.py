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
    generator = torch.Generator().manual_seed(seed)
    copied, upcycled, missing = [], [], {}
    for name, parameter in module.named_parameters():
        value = source.get(name)
        made = None if value is not None else _upcycled(name, parameter, source, top_k, generator)
        if value is not None and value.shape == parameter.shape:
            parameter.copy_(value)
            copied.append(name)
        elif made is not None and made.shape == parameter.shape:
            parameter.copy_(made)
            upcycled.append(name)
        else:
            other = value if value is not None else made
            there = "not there" if other is None else f"{list(other.shape)} there"
            missing[name] = f"{there}, {list(parameter.shape)} here"
    return Filled(tuple(copied), tuple(upcycled), missing)


def roots(names: Iterable[str]) -> list[str]:
    """Names of modules that cover `names`: their first two components, in order, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _upcycled(
    name: str, parameter: Tensor, source: Mapping[str, Tensor], top_k: int, generator: torch.Generator
) -> Tensor | None:
    """What a tensor of a block of experts is, if the source has a dense layer in that block; else None."""
    if name.endswith(ROUTER) and name.removesuffix(ROUTER) + DENSE[0] in source:
        return torch.randn(parameter.shape, generator=generator) * ROUTER_STD
    for ours, theirs in zip(EXPERTS, DENSE):
        if not name.endswith(ours):
            continue
        dense = source.get(name.removesuffix(ours) + theirs)
        if dense is None:
            return None
        num_experts = parameter.shape[0]
        one = dense.t() if dense.ndim == 2 else dense  # nn.Linear stores [out, in], the experts [in, out]
        scale = num_experts / top_k if theirs.startswith(".ffn.fc2") else 1.0
        return (one * scale).expand(num_experts, *one.shape)
    return None
