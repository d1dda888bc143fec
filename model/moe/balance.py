"""Router statistics as sums, and the auxiliary losses as functions of the summed statistics.

The balance loss is a product of two averages over *all* tokens of the step, so it cannot be averaged over calls or ranks:
every call returns sums, sums are added over modalities, views and ranks, and only then the loss is taken.

Dimension legend: T tokens · E experts · K chosen experts per token · M modalities.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.moe.router import Routing
from model.precision import no_autocast


class MoEStats(NamedTuple):
    """Sums over the valid tokens of one layer, by modality (first dimension M, in `ModelConfig.modalities` order).

    Attributes:
        load_ME: float32, assignments per expert (sums to T·K); no gradient.
        prob_ME: Σ_t softmax probability of each expert.
        z_M: Σ_t logsumexp(logits_t)². entropy_M: Σ_t entropy of the gate, nats; no gradient. tokens_M: T; no gradient.
    """

    load_ME: Tensor
    prob_ME: Tensor
    z_M: Tensor
    entropy_M: Tensor
    tokens_M: Tensor


class SumReduce(Protocol):
    """What the losses need from other ranks: the sum of a tensor over all of them, a constant to autograd."""

    def sum(self, value: Tensor) -> Tensor: ...


def routing_stats(routing: Routing, member_TM: Tensor) -> MoEStats:
    """Sums of one routing decision, in the router's precision: one product with the tokens' one-hot modality."""
    logits_TE, probs_TE, _, expert_TK = routing
    num_experts, dtype = logits_TE.shape[-1], probs_TE.dtype
    with no_autocast(probs_TE.device):
        member_MT = member_TM.to(dtype).T
        z_T1 = logits_TE.logsumexp(-1, keepdim=True).square()
        prob_ME, z_M1 = (member_MT @ torch.cat([probs_TE, z_T1], 1)).split([num_experts, 1], 1)
        with torch.no_grad():
            experts_E = torch.arange(num_experts, device=expert_TK.device)
            load_TE = (expert_TK[..., None] == experts_E).sum(1, dtype=dtype)
            entropy_T1 = torch.special.entr(probs_TE).sum(-1, keepdim=True)
            load_ME, entropy_M1, tokens_M1 = (
                member_MT @ torch.cat([load_TE, entropy_T1, torch.ones_like(entropy_T1)], 1)
            ).split([num_experts, 1, 1], 1)
    return MoEStats(load_ME, prob_ME, z_M1[:, 0], entropy_M1[:, 0], tokens_M1[:, 0])


def add_stats(several: list[list[MoEStats]]) -> list[MoEStats]:
    """Sums the per-layer statistics of several views (each a list over layers)."""
    return [MoEStats(*(torch.stack(column).sum(0) for column in zip(*layer))) for layer in zip(*several)]


def reduce_stats(stats: list[MoEStats], reduce: SumReduce) -> list[MoEStats]:
    """The sums over all ranks, constants, all layers in one collective."""
    if not stats:
        return []
    num_experts = stats[0].load_ME.shape[1]
    flat = [
        torch.cat([s.load_ME, s.prob_ME, s.z_M[:, None], s.entropy_M[:, None], s.tokens_M[:, None]], 1) for s in stats
    ]
    total_LMX = reduce.sum(torch.stack(flat).detach())
    parts = (layer_MX.split([num_experts, num_experts, 1, 1, 1], dim=1) for layer_MX in total_LMX)
    return [MoEStats(load, prob, z[:, 0], entropy[:, 0], tokens[:, 0]) for load, prob, z, entropy, tokens in parts]


def balance_term(local: MoEStats, total: MoEStats) -> Tensor:
    """One rank's part of the Switch load-balancing loss, E · Σ_e f_e · P_e (arXiv 2101.03961 eq. 4-6), of one layer.

    f_e: share of *all* assignments that went to expert e; P_e: mean probability of e over all tokens. The parts of all ranks
    add up to the loss, and their gradients to its gradient (f has none). `total`: `reduce_stats` of `local`, or `local`
    itself on one rank. 1 when uniform, also for top-k > 1, since f is a share of the T·K assignments; no tokens: 0.
    Pooled over modalities on purpose: experts may specialise by sensor, only the whole has to be balanced.
    """
    load_E, tokens = total.load_ME.detach().sum(0), total.tokens_M.detach().sum()
    share_E = load_E / load_E.sum().clamp_min(1)
    return load_E.shape[0] * (share_E * local.prob_ME.sum(0)).sum() / tokens.clamp_min(1)


def z_term(local: MoEStats, total: MoEStats) -> Tensor:
    """One rank's part of the router z-loss, mean over all tokens of logsumexp(logits)² (ST-MoE, arXiv 2202.08906 eq. 5)."""
    return local.z_M.sum() / total.tokens_M.detach().sum().clamp_min(1)


def describe(stats: list[MoEStats], modalities: tuple[str, ...]) -> dict[str, float]:
    """Metrics of all layers: per modality the share of each expert (mean over layers) and the gate's entropy in nats;
    over all modalities the largest share over layers and experts (1/E when uniform) and the dead (unused) experts.

    Names: `moe/load/<modality>/<expert>`, `moe/layer<n>/load/<modality>/<expert>`, `moe/entropy/<modality>`, `moe/max_share`,
    `moe/dead_experts`.
    """
    if not stats:
        return {}
    load_LME = torch.stack([layer.load_ME.detach() for layer in stats]).double()
    entropy_LM1 = torch.stack([layer.entropy_M / layer.tokens_M.clamp_min(1) for layer in stats])[..., None]
    table = torch.cat([load_LME, entropy_LM1.to(load_LME.dtype)], -1).cpu().numpy()  # the host waits once
    loads, entropies = table[..., :-1], table[..., -1].mean(0)
    total_LE = loads.sum(1)
    metrics = {
        "moe/max_share": float((total_LE / total_LE.sum(-1, keepdims=True).clip(1)).max()),
        "moe/dead_experts": float((total_LE == 0).sum()),
    }
    share_LME = loads / loads.sum(-1, keepdims=True).clip(1)
    for m, name in enumerate(modalities):
        metrics[f"moe/entropy/{name}"] = float(entropies[m])
        for e, mean in enumerate(share_LME[:, m].mean(0).tolist()):
            metrics[f"moe/load/{name}/{e}"] = mean
            for layer, share in enumerate(share_LME[:, m, e].tolist()):
                metrics[f"moe/layer{layer}/load/{name}/{e}"] = share
    return metrics
