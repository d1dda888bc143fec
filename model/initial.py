"""First weights: what every parameter starts as, and numbers that depend on (seed, name, place in the whole parameter) alone.

A layer says how its parameters start (`trunc_normal_(self.weight, 0.02)`): they are drawn at once from torch's default generator,
as torch's own layers do, and the parameter remembers its *law*. A run draws by `draw_all` instead: a rank that holds some experts
of a layer, or a network built by `on_meta`, gets exactly the numbers that the whole network would have there, and takes memory for
nothing else.

Numbers come from Philox (Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405), a counter-based generator, keyed by a hash
of seed, name and block: blocks of BLOCK elements of the flattened whole parameter are drawn whole, and a part takes what is its.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 1 << 18
"""Elements drawn from one key: 1 MB, which stays in a core's cache."""

CUT = 2.0
"""Where `trunc_normal_` cuts, in the parameter's own unit as in torch's: of std 0.02 that is never, of std 1 two deviations."""


@dataclass(frozen=True)
class Law:
    """Distribution of a parameter's first values. kind: "normal" (scale: std, cut at ± cut), "uniform" (within ± scale) or
    "constant" (scale: the value)."""

    kind: str
    scale: float
    cut: float = math.inf


def trunc_normal_(parameter: Tensor, std: float) -> None:
    _remember(parameter, Law("normal", std, CUT))
    nn.init.trunc_normal_(parameter, std=std)


def normal_(parameter: Tensor, std: float = 1.0) -> None:
    _remember(parameter, Law("normal", std))
    nn.init.normal_(parameter, std=std)


def constant_(parameter: Tensor, value: float) -> None:
    _remember(parameter, Law("constant", value))
    nn.init.constant_(parameter, value)


def zeros_(parameter: Tensor) -> None:
    constant_(parameter, 0.0)


def _remember(parameter: Tensor, law: Law) -> None:
    parameter.law = law  # type: ignore[attr-defined]


def law_of(layer: nn.Module, own: str) -> Law:
    """The law of `layer`'s parameter `own`: what the layer said, or how torch's layer of this type starts.

    Raises:
        ValueError: a layer of ours that does not say.
    """
    parameter = layer.get_parameter(own)
    law = getattr(parameter, "law", None)
    if law is not None:
        return law
    if isinstance(layer, (nn.Linear, nn.Conv2d)):  # both: kaiming_uniform_(a=√5), which is ± 1/√fan_in
        return Law("uniform", layer.weight[0].numel() ** -0.5)
    if isinstance(layer, nn.LayerNorm):
        return Law("constant", 1.0 if own == "weight" else 0.0)
    if isinstance(layer, nn.Embedding):
        return Law("normal", 1.0)
    raise ValueError(f"{type(layer).__name__}.{own} does not say how it starts; use a function of model.initial")


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on `meta`: shapes and laws without memory. Buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = _like(parameter, parameter.to("meta"))
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def renew(module: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Gives every parameter of `module`, on `meta` or not, the memory `make(parameter)`, in place; its marks stay."""
    for _, layer, own, parameter in _each(module):
        layer.register_parameter(own, _like(parameter, make(parameter)))


@torch.no_grad()
def draw_all(
    module: nn.Module,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    whole: Callable[[nn.Parameter], tuple[tuple[int, ...], int]] = lambda parameter: (tuple(parameter.shape), 0),
) -> None:
    """Draws all parameters of `module` in place; those on `meta` get memory on `device`, in `dtype`.

    Args:
        whole: (shape of the whole parameter, where this part of it begins when flattened).
    """
    for name, layer, own, parameter in _each(module):
        law, (shape, first) = law_of(layer, own), whole(parameter)
        if parameter.is_meta:
            parameter = _like(parameter, torch.empty(parameter.shape, dtype=dtype, device=device))
            layer.register_parameter(own, parameter)
        draw(parameter.data, law, seed, name, math.prod(shape), first)


def draw(out: Tensor, law: Law, seed: int, name: str, total: int, first: int = 0) -> None:
    """Fills `out`, contiguous, with elements [first, first + out.numel()) of a parameter of `total` elements. The numbers are
    float32 whatever the dtype of `out`, and drawn on the CPU whatever its device."""
    if law.kind == "constant":
        out.fill_(law.scale)
        return
    flat, last = out.view(-1), first + out.numel()
    for block in range(first // BLOCK, -(-last // BLOCK)):
        begin, end = block * BLOCK, min((block + 1) * BLOCK, total)
        values = _block(law, seed, name, block, end - begin)
        a, b = max(begin, first), min(end, last)
        flat[a - first : b - first].copy_(values[a - begin : b - begin])


def _block(law: Law, seed: int, name: str, block: int, size: int) -> Tensor:
    key = hashlib.blake2b(f"{seed}/{block}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    x = torch.from_numpy(generator.random(size, dtype=np.float32))  # multiples of 2^-24 in [0, 1)
    x.mul_(2.0).sub_(1.0)
    if law.kind == "uniform":
        return x.mul_(law.scale)
    x.clamp_(min=-1.0 + 2.0**-23)  # erfinv(-1) is infinite; the largest x is 1 - 2^-23
    if law.cut < math.inf:
        x.mul_(math.erf(law.cut / law.scale / math.sqrt(2.0)))
    return x.erfinv_().mul_(law.scale * math.sqrt(2.0))


def _each(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, layer, its own name, parameter) of every parameter."""
    for path, layer in module.named_modules():
        for own, parameter in list(layer.named_parameters(recurse=False)):
            yield f"{path}.{own}" if path else own, layer, own, parameter


def _like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter with other memory and the same marks (law, expert slice, DeepSpeed's)."""
    made: Any = nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made
