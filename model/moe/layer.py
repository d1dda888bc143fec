"""The mixture-of-experts layer: router · experts · dispatch, composed.

Dimension legend: N images · L tokens per image · T valid tokens of all images · D channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.moe.balance import CallStats, call_stats
from model.moe.dispatch import Dispatch, LocalDispatch
from model.moe.experts import Experts
from model.moe.router import Router


class MoELayer(nn.Module):
    """Takes the place of a block's FFN. `dispatch` is a plain attribute: expert parallelism swaps it (and `experts` for
    the rank's slice) from outside.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int, grouped: bool | None = None) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, top_k)
        self.experts = Experts(num_experts, dim, hidden, grouped)
        self.dispatch: Dispatch = LocalDispatch()

    def forward(self, x_NLD: Tensor, valid_NL: Tensor) -> tuple[Tensor, CallStats]:
        """Routes the valid tokens only; the others get zero output and count in no statistic."""
        chosen_T = valid_NL.flatten().nonzero()[:, 0]
        x_TD = x_NLD.flatten(0, 1).index_select(0, chosen_T)
        routing = self.router(x_TD)
        y_TD = self.dispatch(x_TD, routing, self.experts)
        y_XD = x_NLD.new_zeros(x_NLD.shape[0] * x_NLD.shape[1], x_NLD.shape[2])
        y_XD = y_XD.index_copy(0, chosen_T, y_TD.to(x_NLD.dtype))
        return y_XD.view_as(x_NLD), call_stats(routing)
