"""Adaptive Patch Merging: one weight, two readings of it."""

from __future__ import annotations

import torch

from model.backbone import Backbone, Images
from model.config import ModelConfig
from model.merging import AdaptivePatchMerging, keep_weight
from model.skysense import SkySense
from tests.model_views import random_view, randomise, transition


def layer(dim: int = 6) -> AdaptivePatchMerging:
    merging = AdaptivePatchMerging(dim).double()
    randomise(merging)
    return merging


def run(merging: AdaptivePatchMerging, x_NHWC: torch.Tensor, valid_NHW: torch.Tensor, merge: bool) -> torch.Tensor:
    """Rows of the valid tokens after the transition."""
    plan, _ = transition(valid_NHW, merge)
    return merging(x_NHWC[valid_NHW], plan)


def test_keep_equals_merge_of_four_equal_neighbours() -> None:
    merging = layer()
    x_NHWC = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    doubled = x_NHWC.repeat_interleave(2, 1).repeat_interleave(2, 2)
    # before the norm the sum of four equal contributions is four times their mean, exactly …
    kept = torch.nn.functional.linear(x_NHWC, keep_weight(merging.reduction.weight))
    torch.testing.assert_close(merging.reduction(x_NHWC.repeat(1, 1, 1, 4)), 4 * kept, rtol=1e-12, atol=1e-12)
    # … and the norm takes the factor out (up to its epsilon, made negligible here)
    merging.norm.eps = 1e-30
    out_keep = run(merging, x_NHWC, valid, merge=False)
    out_merge = run(merging, doubled, torch.ones(2, 6, 10, dtype=torch.bool), merge=True)
    torch.testing.assert_close(out_keep, out_merge, rtol=1e-10, atol=1e-10)


def test_keep_is_the_mean_of_the_four_blocks_and_has_no_parameters_of_its_own() -> None:
    merging = layer()
    w = merging.reduction.weight
    expected = (w[:, :6] + w[:, 6:12] + w[:, 12:18] + w[:, 18:]) / 4
    torch.testing.assert_close(keep_weight(w), expected, rtol=1e-14, atol=1e-14)
    assert sorted(dict(merging.named_parameters())) == ["norm.bias", "norm.weight", "reduction.weight"]


def test_invalid_neighbours_contribute_nothing() -> None:
    merging = layer()
    x_NHWC = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    valid = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    valid[:, :2, :2] = False
    out, (_, merged) = run(merging, x_NHWC, valid, merge=True), transition(valid, True)
    assert not merged[0, 0, 0]
    zeroed = torch.where(valid[..., None], x_NHWC, 0)
    whole = run(merging, zeroed, torch.ones_like(valid), merge=True).view(1, 2, 3, -1)
    torch.testing.assert_close(out, whole[merged])


def test_merging_switches_per_call_and_per_transition_without_new_weights() -> None:
    torch.manual_seed(0)
    backbone = Backbone(ModelConfig(size="debug")).eval()
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    part = random_view(1).modalities["hr"]
    sides = {}
    with torch.no_grad():
        for merges in [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]:
            [tokens] = backbone([Images("hr", part.x_BTCHW[:, 0], part.valid_BTHW[:, 0], part.gsd_B, None, merges)])
            sides[merges] = tokens.feat_NhwD.shape[1]
            assert tokens.stride == 64 // sides[merges]
    assert sides == {
        (True, True, True): 2, (True, False, True): 4, (False, True, False): 8, (False, False, False): 16,
    }  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


def test_whole_model_runs_with_merging_switched_off_for_hr_alone() -> None:
    """What fine-tuning does: the fused grid becomes hr's finer one; the other modalities' features stay as they are."""
    torch.manual_seed(0)
    model = SkySense(ModelConfig(size="debug")).eval()
    view = random_view(1)
    with torch.no_grad():
        usual, fine = model(view), model(view, merges={"hr": (False, False, False)})
    assert usual.fused.shape[1:3] == (4, 4)
    assert fine.fused.shape[1:3] == fine.dense["hr"].shape[2:4] == (16, 16)
    assert (fine.stride["hr"], usual.stride["hr"], fine.fused_like) == (4, 32, "hr")
    assert torch.equal(fine.dense["s2"], usual.dense["s2"])
    assert bool(fine.fused_valid.all())
