"""How tokens reach their experts and come back. Dropless: every token meets all its chosen experts.

`LocalDispatch` is the one-process version and the reference of every other: expert parallelism replaces it from outside
(`MoELayer.dispatch`) by one that exchanges rows between ranks, and must give the same numbers.

Dimension legend: T tokens · D channels · K chosen experts per token · A = T·K assignments.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.moe.experts import Experts
from model.moe.router import Routing


class Dispatch(Protocol):
    """Moves rows to experts, applies them, and combines: y_t = Σ_k gate_tk · expert_tk(x_t)."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalDispatch:
    """All experts here: sort assignments by expert, one pass through the stacked experts, unsort, weigh and add."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        order_A, counts_E = sort_by_expert(routing.expert_TK, experts.num_experts)
        sorted_AD = x_TD.index_select(0, order_A // routing.expert_TK.shape[1])
        return combine(experts(sorted_AD, counts_E), order_A, routing.gate_TK)


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the flattened assignments by expert (stable: by token within an expert), and assignments per expert."""
    flat_A = expert_TK.flatten()
    return flat_A.argsort(stable=True), torch.bincount(flat_A, minlength=num_experts)


def combine(out_AD: Tensor, order_A: Tensor, gate_TK: Tensor) -> Tensor:
    """Undoes `sort_by_expert` on expert outputs and sums them per token, weighed by the gate.

    A gather through the inverse permutation, not a scatter-add: the sum's order, hence its bits, never varies.
    """
    num_tokens, top_k = gate_TK.shape
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(order_A.shape[0], device=order_A.device)
    out_TKD = out_AD.index_select(0, inverse_A).unflatten(0, (num_tokens, top_k))
    return (out_TKD * gate_TK[..., None].to(out_TKD.dtype)).sum(1)


def moe_reference(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Token by token from the definition; slow, for tests."""
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for k in range(routing.expert_TK.shape[1]):
            e = int(routing.expert_TK[t, k])
            h_F = torch.nn.functional.gelu(x_TD[t] @ experts.w1_EDF[e] + experts.b1_EF[e])
            y_D = y_D + routing.gate_TK[t, k].to(x_TD.dtype) * (h_F @ experts.w2_EFD[e] + experts.b2_ED[e])
        rows.append(y_D)
    return torch.stack(rows)
