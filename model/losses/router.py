"""Router losses over a whole step: balance and z from the layers' sums (formulas: `model.moe.balance`).

The balance loss is a product of two averages, so micro-batches cannot simply be added. P (probabilities) is linear; f (loads)
is a constant to autograd. With f taken from the *previous step's* loads, complete over ranks and micro-batches, the loss is a
plain sum and exact for any split; the router still sees its own last loads, one step late. With f of the current global
micro-batch it is Switch's formula to the letter per micro-batch, equal across ranks but not across accumulation.

Legend: L layers with experts · M modalities · E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses.reduce import Reduce
from model.moe.balance import MoEStats


def router_terms(
    stats: list[MoEStats], previous_LE: Tensor, scale_L: Tensor, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """(balance_L, z_L): this micro-batch's part, to be averaged over the step's ranks and micro-batches.

    balance_l = E · Σ_e f_e · Σ_t p_te · scale_l (arXiv 2101.03961, eq. 4-6; 1 when uniform), z_l = Σ_t logsumexp² · scale_l
    (arXiv 2202.08906, eq. 5); scale_l = W·A / tokens of the step in layer l.

    Args:
        previous_LE: counts of the previous step; a layer without any (the first step) counts as uniform.
        reduce: given → f and token count are those of the current micro-batch over all ranks (a collective).
    """
    balance, z = [], []
    if reduce is not None and stats:
        load_LE = torch.stack([layer.load_ME.detach().sum(0) for layer in stats])
        tokens_L = torch.stack([layer.tokens_M.detach().sum() for layer in stats])
        summed = reduce.sum(torch.cat([load_LE, tokens_L[:, None]], dim=1))
        previous_LE, scale_L = summed[:, :-1], reduce.world / summed[:, -1].clamp_min(1)
    for layer, counts_E, scale in zip(stats, previous_LE, scale_L):
        prob_E = layer.prob_ME.sum(0)
        counts_E = counts_E.to(prob_E.dtype)
        num_experts = prob_E.shape[0]
        share_E = torch.where(counts_E.sum() > 0, counts_E / counts_E.sum().clamp_min(1), 1.0 / num_experts)
        balance.append(num_experts * (share_E * prob_E).sum() * scale)
        z.append(layer.z_M.sum() * scale)
    if not stats:
        empty = scale_L.new_zeros(0)
        return empty, empty
    return torch.stack(balance), torch.stack(z)
