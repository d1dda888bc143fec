"""The mixture of experts against its definition, token by token, and the router losses against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig, MoEConfig
from model.moe.balance import (
    MoEStats,
    add_stats,
    balance_term,
    describe,
    reduce_stats,
    routing_stats,
    z_term,
)
from model.moe.dispatch import LocalDispatch, combine, moe_reference, sort_by_expert
from model.moe.experts import experts_grouped, experts_loop, members
from model.moe.layer import MoELayer
from model.moe.router import Router, route
from model.rows import inverse_of
from tests.model_views import randomise

DIM, HIDDEN = 6, 10


def layer(experts: int, top_k: int, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    moe = MoELayer(DIM, HIDDEN, experts, top_k).double()
    randomise(moe, seed, std=0.5)
    return moe


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (5, 3), (8, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_dropless_equals_per_token_loop_with_gradients(experts: int, top_k: int, tokens: int) -> None:
    fast, slow = layer(experts, top_k), layer(experts, top_k)
    mine = torch.randn(tokens, DIM, dtype=torch.float64, requires_grad=True)
    other = mine.detach().clone().requires_grad_()
    out = fast(mine[None], torch.ones(1, tokens, dtype=torch.bool))[0][0]
    if tokens:
        expected = moe_reference(other, slow.router(other), slow.experts)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        (expected**3).sum().backward()
    (out**3).sum().backward()
    for (name, a), b in zip(fast.named_parameters(), slow.parameters()):
        assert a.grad is not None, name  # also where no token came by
        torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad, rtol=1e-10, atol=1e-12)
    if tokens:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_gate_is_the_probability_not_renormalised() -> None:
    moe = layer(4, 1)
    x_TD = torch.randn(9, DIM, dtype=torch.float64)
    routing = moe.router(x_TD)
    assert torch.equal(routing.gate_TK[:, 0], routing.probs_TE.amax(-1))
    assert float(routing.gate_TK.detach().max()) < 1.0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 2))
def test_sort_and_combine_are_inverse(chosen: list[int], top_k: int) -> None:
    expert_TK = torch.tensor([[(c + k) % 6 for k in range(top_k)] for c in chosen])
    order_A, counts_E = sort_by_expert(expert_TK, 6)
    by_expert = expert_TK.flatten()[order_A]
    assert torch.equal(by_expert, by_expert.sort().values)
    assert int(counts_E.sum()) == expert_TK.numel()
    rows_AD = torch.arange(expert_TK.numel(), dtype=torch.float64)[:, None]
    gate = torch.ones(expert_TK.shape, dtype=torch.float64)
    expected = rows_AD.view(len(chosen), top_k, 1).sum(1)
    assert torch.equal(combine(rows_AD[order_A], order_A, inverse_of(order_A), gate), expected)


def test_invalid_tokens_are_neither_routed_nor_counted() -> None:
    moe = layer(4, 2)
    x_NLD = torch.randn(2, 5, DIM, dtype=torch.float64)
    valid_NL = torch.tensor([[True, False, True, True, False], [False] * 5])
    x_NLD[~valid_NL] = torch.nan
    out, stats = moe(x_NLD, valid_NL)
    assert bool((out[~valid_NL] == 0).all())
    assert bool(out.isfinite().all())
    alone, alone_stats = moe(x_NLD[valid_NL][None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(out[valid_NL], alone[0])
    assert all(torch.equal(a, b) for a, b in zip(stats, alone_stats))
    assert float(stats.tokens_M) == 3
    assert float(stats.load_ME.sum()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_loop(dtype: torch.dtype) -> None:
    """With an expert that gets nothing; dims are multiples of 16 bytes, as the kernel asks."""
    experts, dim, hidden = 4, 16, 32
    counts_E = torch.tensor([3, 0, 5, 2])
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, dim), (experts, dim, hidden), (experts, hidden), (experts, hidden, dim), (experts, dim)]
    tensors = [torch.randn(s, generator=generator).mul(0.3).to(dtype) for s in shapes]
    results = []
    for function in (experts_loop, experts_grouped):
        x, *params = (t.clone().requires_grad_() for t in tensors)
        out = function(x, counts_E, *params)
        (out * torch.linspace(-1, 1, dim).to(dtype)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in params)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_grouped_product_of_no_rows_reaches_every_parameter() -> None:
    """A rank of an expert-parallel group may get no row at all."""
    moe = MoELayer(16, 32, 4, 1, grouped=True)
    x_TD = torch.zeros(0, 16, requires_grad=True)
    out = moe.experts(x_TD, torch.zeros(4, dtype=torch.int64))
    assert out.shape == (0, 16)
    out.sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_no_scatter_add_in_the_backward_of_experts() -> None:
    """On CUDA it adds in any order: no bitwise resume."""

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    counts_E, b_ED = torch.tensor([40, 0, 8]), torch.zeros(3, 8)
    w1, b1, w2, b2 = (p.requires_grad_() for p in (torch.zeros(3, 8, 8), b_ED.clone(), torch.zeros(3, 8, 8), b_ED))
    with Names() as names:
        out_TD = experts_grouped(torch.ones(48, 8), counts_E, w1, b1, w2, b2)
        out_TD.backward(torch.ones_like(out_TD))
    assert torch.equal(b2.grad, counts_E[:, None].expand(3, 8).float())
    assert not [name for name in names.seen if "index_add" in name or "scatter" in name or "index_put" in name]


def test_every_row_gets_its_experts_bias_exactly() -> None:
    counts_E, b_ED = torch.tensor([2, 0, 3, 1]), torch.randn(4, 5)
    found_TD = members(counts_E.cumsum(0), 6, torch.float32) @ b_ED
    assert torch.equal(found_TD, b_ED.repeat_interleave(counts_E, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_decides_in_float32(dtype: torch.dtype) -> None:
    router = Router(DIM, 4, 1).to(dtype)
    x_TD = torch.randn(5, DIM).to(dtype)
    exact = torch.nn.functional.linear(x_TD.double(), router.weight_ED.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            routing = router(x_TD)
        assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.gate_TK.dtype == torch.float32
        torch.testing.assert_close(routing.logits_TE.double(), exact, rtol=1e-5, atol=1e-6)


def stats_of(*logits: Tensor, top_k: int = 1) -> MoEStats:
    """One part per modality."""
    modality = torch.repeat_interleave(torch.tensor([len(part) for part in logits]))
    return routing_stats(route(torch.cat(logits), top_k), torch.eye(len(logits))[modality])


def numbers(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_losses_equal_their_formulas(top_k: int) -> None:
    """Switch eq. 4-6 and ST-MoE eq. 5, written out over the tokens of two modalities."""
    first, second = numbers(7, 4, 1), numbers(12, 4, 2)
    stats = stats_of(first, second, top_k=top_k)
    rows = torch.cat([first, second]).tolist()
    probs = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
    share, mean = [0.0] * 4, [0.0] * 4
    for p in probs:
        for e in sorted(range(4), key=lambda e, p=p: -p[e])[:top_k]:
            share[e] += 1 / (len(rows) * top_k)
        for e in range(4):
            mean[e] += p[e] / len(rows)
    assert float(balance_term(stats, stats)) == pytest.approx(4 * sum(f * p for f, p in zip(share, mean)), rel=1e-12)
    z = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert float(z_term(stats, stats)) == pytest.approx(z, rel=1e-12)
    entropy = -sum(v * math.log(v) for p in probs for v in p)
    assert float(stats.entropy_M.sum()) == pytest.approx(entropy, rel=1e-12)
    assert stats.tokens_M.tolist() == [7, 12]
    for m, part in enumerate((first, second)):
        alone = stats_of(part, top_k=top_k)
        assert all(torch.allclose(whole[m], own[0], rtol=1e-12) for whole, own in zip(stats, alone))


def test_balance_is_one_when_uniform_and_grows_with_collapse() -> None:
    even = stats_of(torch.eye(4, dtype=torch.float64) * 1e-9)
    torch.testing.assert_close(balance_term(even, even), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    collapsed = stats_of(torch.tensor([[9.0, 0, 0, 0]] * 8))
    assert float(balance_term(collapsed, collapsed)) > 3.9


def test_parts_of_two_ranks_add_up_to_the_loss_and_its_gradient() -> None:
    logits = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 9)]
    whole = stats_of(torch.cat(logits))
    expected = torch.autograd.grad(balance_term(whole, whole) + z_term(whole, whole), logits)

    parts = [stats_of(p) for p in logits]
    total = MoEStats(*(t.detach() for t in add_stats([[p] for p in parts])[0]))
    loss = sum(balance_term(p, total) + z_term(p, total) for p in parts)
    torch.testing.assert_close(loss, balance_term(whole, whole) + z_term(whole, whole))
    for a, b in zip(torch.autograd.grad(loss, logits), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_reduction_sums_every_field_of_every_layer_in_one_collective() -> None:
    layers = [stats_of(numbers(3, 4, i), numbers(4, 4, i + 9)) for i in range(3)]
    calls = []

    class TwoEqualRanks:
        def sum(self, value: Tensor) -> Tensor:
            calls.append(value.shape)
            return 2 * value

    for layer_stats, total in zip(layers, reduce_stats(layers, TwoEqualRanks())):
        for before, after in zip(layer_stats, total):
            assert torch.equal(2 * before, after)
    assert len(calls) == 1
    assert reduce_stats([], TwoEqualRanks()) == []


def test_metrics_tell_modalities_and_dead_experts_apart() -> None:
    stats = stats_of(torch.tensor([[5.0, 0, 0]] * 4), torch.tensor([[0, 5.0, 0]] * 2))
    metrics = describe([stats], ("hr", "s2"))
    assert float(metrics["moe/load/hr/0"]) == 1.0
    assert float(metrics["moe/load/s2/1"]) == 1.0
    assert float(metrics["moe/dead_experts"]) == 1.0
    assert float(metrics["moe/max_share"]) == pytest.approx(4 / 6)


def test_dispatch_is_replaceable() -> None:
    moe = layer(4, 1)
    calls = []

    class Counting(LocalDispatch):
        def __call__(self, *args):  # type: ignore[no-untyped-def]
            calls.append(len(args))
            return super().__call__(*args)

    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    before, _ = moe(x, torch.ones(1, 3, dtype=torch.bool))
    moe.dispatch = Counting()
    after, _ = moe(x, torch.ones(1, 3, dtype=torch.bool))
    assert calls == [3]
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("moe", "placed"),
    [
        (MoEConfig(), {14, 15, 16, 17, 18, 19}),
        (MoEConfig(placement="uniform", blocks=5), {3, 7, 11, 15, 19}),
        (MoEConfig(placement="list", indices=(0, 7)), {0, 7}),
        (MoEConfig(experts=0), set()),
        (MoEConfig(blocks=50), set(range(20))),
    ],
)
def test_placement(moe: MoEConfig, placed: set[int]) -> None:
    assert ModelConfig(size="base", moe=moe).moe.placed(20) == placed
