"""Our SwinV2 blocks and merging against `transformers`' independent implementation, in float64, with copied weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.swinv2.configuration_swinv2 import Swinv2Config
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer, Swinv2PatchMerging, Swinv2Stage

from model.merging import AdaptivePatchMerging
from model.swin import PositionBias, SwinBlock
from tests.model_views import randomise, transition, window_plans

DIM, HEADS = 12, 3


def reference_config(window: int) -> Swinv2Config:
    return Swinv2Config(
        window_size=window, embed_dim=DIM, qkv_bias=True, hidden_act="gelu", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, drop_path_rate=0.0, mlp_ratio=4.0,
    )  # fmt: skip


def exact_coordinates(block: nn.Module, window: int) -> None:
    """Their log-spaced coordinates are rounded to float32 at construction; the same in float64, from the paper's formula."""
    attention = block.attention.self
    offsets = 8 * np.arange(1 - window, window) / (window - 1)
    axis = np.sign(offsets) * np.log2(1 + np.abs(offsets)) / np.log2(8)
    table = torch.from_numpy(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1))[None]
    torch.testing.assert_close(attention.relative_coords_table, table, rtol=1e-6, atol=1e-6)
    attention.relative_coords_table = table


def copy_block(theirs: nn.Module, ours: SwinBlock) -> None:
    """Copies the weights and returns nothing; every parameter of ours is written."""
    attention, own = theirs.attention.self, ours.attention
    with torch.no_grad():
        own.qkv.weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))
        own.q_bias.copy_(attention.query.bias)
        own.v_bias.copy_(attention.value.bias)
        own.logit_scale_A.copy_(attention.logit_scale.flatten())
        own.bias.hidden.load_state_dict(attention.continuous_position_bias_mlp[0].state_dict())
        own.bias.out.load_state_dict(attention.continuous_position_bias_mlp[2].state_dict())
        own.proj.load_state_dict(theirs.attention.output.dense.state_dict())
        ours.norm1.load_state_dict(theirs.layernorm_before.state_dict())
        ours.norm2.load_state_dict(theirs.layernorm_after.state_dict())
        ours.fc1.load_state_dict(theirs.intermediate.dense.state_dict())
        ours.fc2.load_state_dict(theirs.output.dense.state_dict())


def block_gradients(theirs: nn.Module, ours: SwinBlock) -> list[tuple[Tensor, Tensor]]:
    attention, own = theirs.attention.self, ours.attention
    cpb = attention.continuous_position_bias_mlp
    qkv = torch.cat([attention.query.weight.grad, attention.key.weight.grad, attention.value.weight.grad])
    pairs = [
        (own.qkv.weight.grad, qkv),
        (own.q_bias.grad, attention.query.bias.grad),
        (own.v_bias.grad, attention.value.bias.grad),
        (own.logit_scale_A.grad, attention.logit_scale.grad.flatten()),
        (own.bias.hidden.weight.grad, cpb[0].weight.grad),
        (own.bias.hidden.bias.grad, cpb[0].bias.grad),
        (own.bias.out.weight.grad, cpb[2].weight.grad),
        (own.proj.weight.grad, theirs.attention.output.dense.weight.grad),
        (ours.norm1.weight.grad, theirs.layernorm_before.weight.grad),
        (ours.norm2.bias.grad, theirs.layernorm_after.bias.grad),
        (ours.fc1.weight.grad, theirs.intermediate.dense.weight.grad),
        (ours.fc2.bias.grad, theirs.output.dense.bias.grad),
    ]
    assert all(mine is not None for mine, _ in pairs)
    return pairs


def inputs(height: int, width: int) -> tuple[Tensor, Tensor]:
    x_NHWC = torch.randn(2, height, width, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x_NHWC.clone().requires_grad_(), x_NHWC.clone().requires_grad_()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("window", "height", "width"), [(4, 8, 12), (8, 16, 16), (5, 10, 15)])
def test_block_equals_independent_implementation(window: int, height: int, width: int, shift: bool) -> None:
    theirs = Swinv2Layer(
        reference_config(window), DIM, (height, width), HEADS, shift_size=window // 2 if shift else 0
    ).double()
    randomise(theirs)
    exact_coordinates(theirs, window)
    ours = SwinBlock(DIM, HEADS, shift, window).double()
    copy_block(theirs, ours)
    mine, other = inputs(height, width)
    plans = window_plans(torch.ones(2, height, width, dtype=torch.bool), window)
    out = ours(mine.flatten(0, 2), plans).view_as(mine)
    expected = theirs(other.flatten(1, 2), (height, width))[0].view_as(out)
    assert_close(out, expected)
    (out**3).sum().backward()
    (expected**3).sum().backward()
    assert_close(mine.grad, other.grad)
    for grad, reference in block_gradients(theirs, ours):
        assert_close(grad, reference)


def test_stage_with_merging_equals_independent_implementation() -> None:
    height, width, window = 8, 16, 4
    config = reference_config(window)
    theirs = Swinv2Stage(config, DIM, (height, width), 2, HEADS, [0.0, 0.0], Swinv2PatchMerging).double()
    randomise(theirs)
    blocks = [SwinBlock(DIM, HEADS, i == 1, window).double() for i in range(2)]
    merging = AdaptivePatchMerging(DIM).double()
    for their_block, own in zip(theirs.blocks, blocks):
        exact_coordinates(their_block, window)
        copy_block(their_block, own)
    merging.load_state_dict(theirs.downsample.state_dict())
    mine, other = inputs(height, width)
    valid = torch.ones(2, height, width, dtype=torch.bool)
    x, plans = mine.flatten(0, 2), window_plans(valid, window)
    for block in blocks:
        x = block(x, plans)
    out = merging(x, transition(valid, True)[0])
    expected = theirs(other.flatten(1, 2), (height, width))[0].view_as(out)
    assert_close(out, expected)
    (out**3).sum().backward()
    (expected**3).sum().backward()
    assert_close(mine.grad, other.grad)
    assert_close(merging.reduction.weight.grad, theirs.downsample.reduction.weight.grad)
    for their_block, own in zip(theirs.blocks, blocks):
        for grad, reference in block_gradients(their_block, own):
            assert_close(grad, reference)


def test_merge_of_an_odd_grid_equals_independent_implementation() -> None:
    theirs = Swinv2PatchMerging((5, 7), DIM).double()
    randomise(theirs)
    ours = AdaptivePatchMerging(DIM).double()
    ours.load_state_dict(theirs.state_dict())
    mine, other = inputs(5, 7)
    plan, valid = transition(torch.ones(2, 5, 7, dtype=torch.bool), True)
    assert valid.shape == (2, 3, 4)
    out = ours(mine.flatten(0, 2), plan)
    assert_close(out, theirs(other.flatten(1, 2), (5, 7)).view_as(out))


def test_position_bias_loses_little_in_bfloat16() -> None:
    """16 · sigmoid lies round 8 where bfloat16's steps are 1/16; a constant less, which softmax cannot see, half the error is left."""
    torch.manual_seed(0)
    bias_RA = PositionBias(16, 8)().detach()
    error = (bias_RA.bfloat16().float() - bias_RA).abs().max()
    assert float(error) <= 2**-6
    assert abs(float(bias_RA.mean())) < 1.0
