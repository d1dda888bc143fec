"""`torch.compile` of the block stack on CPU, against the same blocks run eagerly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from tests.require import require_program
from tests.unit.test_model_switches import build, loss_of

DEBUG = ModelConfig(size="debug", window=4)


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_equal_eager(backend: str) -> None:
    """aot_eager: tracing, functionalisation and the compiled backward; inductor: generated C++ as well."""
    if backend == "inductor":
        require_program("g++")
    cfg = replace(DEBUG, drop_path=0.3, modalities=("s2",))
    eager, compiled = build(cfg).double().train(), build(cfg).double().train()
    compiled.load_state_dict(eager.state_dict())
    if backend == "aot_eager":
        compiled.compile_blocks(backend=backend)
    else:  # generating C++ takes its time: one block of each kind
        for block in (compiled.backbone.stages[0][0], compiled.backbone.stages[2][0]):
            block.compile(backend=backend)
    twin = copy.deepcopy(compiled)  # a teacher is made this way; its experts must be its own
    assert list(compiled.state_dict()) == list(eager.state_dict())  # names stay: checkpoints fit either way
    seeds = torch.tensor([3, 4])
    a, b = loss_of(eager, seeds), loss_of(compiled, seeds)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    a.backward()
    b.backward()
    for (name, mine), other in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    loss_of(twin, seeds).backward()
    assert all(p.grad is not None for p in twin.parameters())
