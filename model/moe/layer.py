"""The mixture-of-experts layer: router · experts · dispatch, composed.

Dimension legend: T valid tokens of all images · M modalities · D channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from model.moe.balance import MoEStats, routing_stats
from model.moe.dispatch import Dispatch, LocalDispatch
from model.moe.experts import Experts
from model.moe.router import Router
from model.plan import Routed
from model.rows import plan_take, take


class MoELayer(nn.Module):
    """Takes the place of a block's FFN. `dispatch` is a plain attribute: expert parallelism swaps it (and `experts` for
    the rank's slice) from outside.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int, grouped: bool | None = None) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, top_k)
        self.experts = Experts(num_experts, dim, hidden, grouped)
        self.dispatch: Dispatch = LocalDispatch()

    def forward(self, x: Tensor, tokens: Routed | Tensor) -> tuple[Tensor, MoEStats]:
        """Routes the valid tokens only; the others get zero output and count in no statistic.

        Args:
            x: […, D]. tokens: which rows of it are valid and of what modality, as planned on the host; or a bool mask […] (which
                the host then waits for), all of one modality.
        """
        routed = plan_mask(tokens) if isinstance(tokens, Tensor) else tokens
        x_TD = take(x.flatten(0, -2), routed.enter)
        routing = self.router(x_TD)
        y_TD = self.dispatch(x_TD, routing, self.experts)
        return take(y_TD.to(x.dtype), routed.leave).view_as(x), routing_stats(routing, routed.member_TM)


def plan_mask(valid: Tensor) -> Routed:
    """The plan for a mask, all tokens of one modality."""
    good_T = valid.flatten().cpu().numpy()
    chosen = np.flatnonzero(good_T)
    back = np.where(good_T, np.cumsum(good_T) - 1, -1)
    enter, leave = plan_take(chosen, len(good_T), valid.device), plan_take(back, len(chosen), valid.device)
    return Routed(enter, leave, torch.ones(len(chosen), 1, device=valid.device))
