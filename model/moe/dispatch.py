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
from model.rows import inverse_of, permute


class Dispatch(Protocol):
    """Moves rows to experts, applies them, and combines: y_t = Σ_k gate_tk · expert_tk(x_t)."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalDispatch:
    """All experts here: sort assignments by expert, one pass through the stacked experts, unsort, weigh and add."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        order_A, counts_E = sort_by_expert(routing.expert_TK, experts.num_experts)
        inverse_A = inverse_of(order_A)
        sorted_AD = permute(spread(x_TD, routing.expert_TK.shape[1]), order_A, inverse_A)
        return combine(experts(sorted_AD, counts_E), order_A, inverse_A, routing.gate_TK)


def spread(x_TD: Tensor, top_k: int) -> Tensor:
    """Every row K times, one per assignment."""
    return x_TD if top_k == 1 else x_TD[:, None].expand(-1, top_k, -1).flatten(0, 1)


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the flattened assignments by expert (stable: by token within an expert), and assignments per expert."""
    flat_A = expert_TK.flatten()
    # not bincount: on CUDA the host would wait for it
    counts_E = (flat_A[:, None] == torch.arange(num_experts, device=flat_A.device)).sum(0)
    return flat_A.argsort(stable=True), counts_E


def combine(out_AD: Tensor, order_A: Tensor, inverse_A: Tensor, gate_TK: Tensor) -> Tensor:
    """Undoes `sort_by_expert` on expert outputs and sums them per token, weighed by the gate.

    Gathers both ways, no scatter-add: the sums' order, hence their bits, never varies.
    """
    out_TKD = permute(out_AD, inverse_A, order_A).unflatten(0, gate_TK.shape)
    weighed_TKD = out_TKD * gate_TK[..., None].to(out_TKD.dtype)
    return weighed_TKD[:, 0] if gate_TK.shape[1] == 1 else weighed_TKD.sum(1)


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
