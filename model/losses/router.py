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
from model.moe.balance import MoEStats, balance_term, reduce_stats, z_term


def router_terms(
    stats: list[MoEStats], previous_LE: Tensor, tokens_L: Tensor, parts: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """(balance_L, z_L) of this micro-batch, such that their mean over the step's ranks and micro-batches is the loss.

    Args:
        previous_LE: counts of the previous step; a layer without any (the first step) counts as uniform: no pull.
        tokens_L: tokens of the whole step per layer. parts: its ranks × micro-batches.
        reduce: given → loads and token counts are those of the current micro-batch over all ranks (a collective).
    """
    totals = _of_previous_step(stats, previous_LE, tokens_L) if reduce is None else reduce_stats(stats, reduce)
    factor = parts if reduce is None else reduce.world
    balance = [balance_term(local, total) * factor for local, total in zip(stats, totals)]
    z = [z_term(local, total) * factor for local, total in zip(stats, totals)]
    return torch.stack(balance), torch.stack(z)


def _of_previous_step(stats: list[MoEStats], previous_LE: Tensor, tokens_L: Tensor) -> list[MoEStats]:
    """Totals with the previous step's loads and this step's token counts (one row: modalities are pooled anyway)."""
    totals = []
    for layer, counts_E, tokens in zip(stats, previous_LE, tokens_L):
        load_E = torch.where(counts_E.sum() > 0, counts_E, 1).to(layer.prob_ME.dtype)
        totals.append(layer._replace(load_ME=load_E[None], tokens_M=tokens.to(layer.prob_ME.dtype)[None]))
    return totals
