"""One packed call for several views, sensors and sizes is the same as one call for each; what is planned on the host is what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import View
from model.config import ModelConfig
from model.moe.balance import add_stats
from model.plan import lengths_to_buckets, plan_windows
from model.rows import plan_spread, plan_take, spread, take
from model.skysense import Features
from tests.model_views import random_view
from tests.unit.test_masking import CONFIGS, build, random_validity

CPU = torch.device("cpu")


def views(seed: int, absent: frozenset[str], dtype: torch.dtype = torch.float32) -> list[View]:
    """A global and a local view of two sites with clouds, missing dates and sensors; sizes that are no multiple of a window."""
    found = [
        random_view(2, hr=(64, 72), series=(16, 18), seed=seed, dtype=dtype),
        random_view(2, hr=40, series=10, s2_dates=2, s1_dates=1, seed=seed + 1, dtype=dtype),
    ]
    return [random_validity(view, seed + i, absent) for i, view in enumerate(found)]


def loss_of(features: list[Features]) -> Tensor:
    weighed = [f.fused.pow(3).sum() + sum(d.square().sum() for d in f.dense.values()) for f in features]
    return torch.stack(weighed).sum()


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), absent=st.sets(st.sampled_from(["hr", "s2", "s1"]), max_size=1))
def test_packed_views_equal_one_call_each(kind: str, seed: int, absent: set[str]) -> None:
    """Features, gradients of every parameter and router sums, with drop-path, in float32."""
    cfg = replace(CONFIGS[kind], drop_path=0.3)
    both = views(seed, frozenset(absent))
    seeds = [torch.tensor([7, 8]), torch.tensor([9, 2**40])]
    packed, single = build(cfg).train(), build(cfg).train()
    together, alone = packed.views(both, seeds), [single(view, s) for view, s in zip(both, seeds)]
    for a, b in zip(together, alone):
        for name in a.dense:
            assert torch.equal(a.dense_valid[name], b.dense_valid[name])
            torch.testing.assert_close(a.dense[name], b.dense[name], rtol=1e-6, atol=2e-6)
        assert torch.equal(a.fused_valid, b.fused_valid)
        torch.testing.assert_close(a.fused, b.fused, rtol=1e-6, atol=2e-6)
    for ours, theirs in zip(together[0].moe, add_stats([f.moe for f in alone]), strict=True):
        for x, y in zip(ours, theirs):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    loss_of(together).backward()
    loss_of(alone).backward()
    for (name, p), q in zip(packed.named_parameters(), single.parameters()):
        scale = float(q.grad.abs().max()) + 1e-3
        torch.testing.assert_close(
            p.grad / scale, q.grad / scale, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_absent_images_and_cloudy_tokens_are_not_computed() -> None:
    model = build(CONFIGS["default"])
    view = random_view(2, hr=64, series=16)
    view.modalities["s2"].valid_BTHW[0, 1] = False
    view.modalities["s2"].valid_BTHW[1, 0, :8] = False
    rows = []
    model.backbone.stages[0][0].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model(view)
    hr, s2, s1 = 2 * 16 * 16, 5 * 16 - 8, 4 * 16  # one date of s2 is absent, half of another cloudy
    assert rows == [hr + s2 + s1]


def test_take_moves_rows_and_their_gradient_back() -> None:
    source = np.array([3, -1, 0, 4])
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    plan = plan_take(source, 5, CPU)
    out = take(x, plan)
    assert torch.equal(out[[0, 2, 3]], x[[3, 0, 4]])
    assert not out[1].any()
    assert torch.autograd.gradcheck(lambda t: take(t, plan), (x,))
    assert take(x, plan_take(np.arange(5), 5, CPU)) is x


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_buckets_hold_every_sequence_once_in_few_groups(lengths: list[int]) -> None:
    groups = lengths_to_buckets(np.array(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert len(groups) <= 6
    if len(set(lengths)) == 1:
        assert len(groups) == 1


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([0, 2]), st.integers(0, 1000))
def test_every_token_is_in_exactly_one_window(height: int, width: int, shift: int, seed: int) -> None:
    valid = np.random.default_rng(seed).random((2, height, width)) > 0.3
    valid[0, 0, 0] = True
    grid = np.where(valid, np.cumsum(valid.reshape(-1)).reshape(valid.shape) - 1, -1)
    plan = plan_windows(4, [grid], shift, CPU)
    assert sum(bucket.count * bucket.span for bucket in plan.buckets) == len(plan.enter.index_T)
    x = torch.arange(int(valid.sum()), dtype=torch.float64)[:, None]
    assert torch.equal(take(take(x, plan.enter), plan.leave), x)


def test_sets_of_one_modality_must_be_neighbours() -> None:
    from model.plan import ImageSet, plan_trunk

    sets = [ImageSet(name, np.ones((1, 2, 2), bool), (False,) * 3) for name in ("hr", "s2", "hr")]
    with pytest.raises(ValueError, match="neighbours"):
        plan_trunk(ModelConfig(size="debug"), sets, CPU, torch.float32)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 20))
def test_spread_copies_rows_and_gathers_their_gradient(seed: int, rows: int, places: int) -> None:
    """Against indexing, whose gradient autograd knows; rows that no place wants get none."""
    row = np.random.default_rng(seed).integers(0, rows, places)
    x = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = spread(ours, plan_spread(row, rows, CPU)), theirs[torch.from_numpy(row)]
    assert torch.equal(got, wanted)
    weight = torch.arange(1.0, wanted.numel() + 1, dtype=torch.float64).view_as(wanted)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
