"""Router of a mixture-of-experts layer: gate = softmax(linear without bias), the k best experts per token.

Dimension legend: T tokens · D channels · E experts · K chosen experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.precision import no_autocast


class Routing(NamedTuple):
    """What the router decided for T tokens.

    Attributes:
        logits_TE, probs_TE: float32 (float64 if the input is), over all experts.
        gate_TK: probability of each chosen expert, not renormalised (for top-1 that would stop the router's gradient).
        expert_TK: int64 global expert index, best first.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    gate_TK: Tensor
    expert_TK: Tensor


class Router(nn.Module):
    """Linear gate computed in float32 whatever the precision around it: bfloat16 logits flip close decisions."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initial.trunc_normal_(self.weight_ED, std=0.02)

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with no_autocast(x_TD.device):
            logits_TE = F.linear(x_TD.to(dtype), self.weight_ED.to(dtype))
            return route(logits_TE, self.top_k)


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """Softmax over experts, then the `top_k` most probable (ties: lower index, as `torch.topk` gives them)."""
    probs_TE = logits_TE.softmax(dim=-1)
    gate_TK, expert_TK = probs_TE.topk(top_k, dim=-1)
    return Routing(logits_TE, probs_TE, gate_TK, expert_TK)
