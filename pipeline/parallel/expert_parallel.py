"""Expert parallelism, applied to a finished model from outside.

Each rank of an expert-parallel group keeps `E / ep` consecutive experts of every MoE layer. Rows travel to their experts and
back by two all-to-alls with uneven splits: dropless, nothing padded. Gradients follow from the same exchanges reversed.

Scaling of expert gradients: a local expert receives rows from all `ep` ranks of its group, so its gradient already sums
over them; DeepSpeed then sums over the `world / ep` ranks with the same slice and divides by `world`: the average over all
ranks, as for dense parameters.

Dimension legend: T tokens here · D channels · K chosen experts · A = T·K assignments · R rows received · E all experts ·
P ranks of the group · L local experts (E = P·L).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from model.moe.dispatch import combine, sort_by_expert, spread
from model.moe.experts import Experts
from model.moe.layer import MoELayer
from model.moe.router import Routing
from model.rows import inverse_of, permute
from pipeline.parallel.layout import Layout


class ExpertParallelMoE(MoELayer, MoE):
    """Our layer, and a `deepspeed.moe.layer.MoE` by type: by that DeepSpeed recognises expert parameters and makes the
    groups. Its constructor is skipped; gate, capacity and experts of its own are never built. Parameter names stay those of
    `MoELayer`.
    """

    def __init__(self, layer: MoELayer, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.num_experts = layer.experts.num_experts
        self.ep_size = layout.ep
        self.num_local_experts = self.num_experts // layout.ep
        self.expert_group_name = f"ep_size_{layout.ep}"
        self.use_residual = False
        self.enable_expert_tensor_parallelism = False
        self.router = layer.router
        self.experts = localise(layer.experts, layout, self.expert_group_name)
        self.dispatch = AllToAllDispatch(self.num_experts)

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine (and by us for the teacher): makes the groups once, then looks them up."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        assert isinstance(self.dispatch, AllToAllDispatch)
        self.dispatch.group = groups._get_expert_parallel_group(self.expert_group_name)


class AllToAllDispatch:
    """`model.moe.dispatch.LocalDispatch` over several ranks: same routing, same result."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.group: Any = None

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        order_A, counts_E = sort_by_expert(routing.expert_TK, self.num_experts)
        inverse_A = inverse_of(order_A)
        sorted_AD = permute(spread(x_TD, routing.expert_TK.shape[1]), order_A, inverse_A)
        counts_PL, sent_P = self._exchange_counts(counts_E)
        received_P = counts_PL.sum(1).tolist()
        rows_RD = exchange(sorted_AD, received_P, sent_P, self.group)
        # rows lie by source rank, then expert; the experts want them by expert (stable: by rank within one)
        expert_R = torch.arange(experts.num_experts, device=x_TD.device).repeat(counts_PL.shape[0])
        expert_R = expert_R.repeat_interleave(counts_PL.flatten())
        by_expert_R = expert_R.argsort(stable=True)
        inverse_R = inverse_of(by_expert_R)
        out_RD = experts(permute(rows_RD, by_expert_R, inverse_R), counts_PL.sum(0))
        out_AD = exchange(permute(out_RD, inverse_R, by_expert_R), sent_P, received_P, self.group)
        return combine(out_AD, order_A, inverse_A, routing.gate_TK)

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, list[int]]:
        """(rows this rank receives per source rank and local expert, rows it sends per rank)."""
        ranks = dist.get_world_size(self.group)
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        return received_E.view(ranks, -1), counts_E.view(ranks, -1).sum(1).tolist()


class _Exchange(torch.autograd.Function):
    """all_to_all_single with uneven splits; its gradient is the exchange reversed."""

    @staticmethod
    def forward(ctx: Any, rows_XD: Tensor, out_P: list[int], in_P: list[int], group: Any) -> Tensor:
        ctx.out_P, ctx.in_P, ctx.group = out_P, in_P, group
        return _all_to_all(rows_XD, out_P, in_P, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.in_P, ctx.out_P, ctx.group), None, None, None


def exchange(rows_XD: Tensor, out_P: list[int], in_P: list[int], group: Any) -> Tensor:
    """Sends `in_P[p]` consecutive rows to rank p and returns the `out_P[p]` rows from each rank p, in rank order."""
    return _Exchange.apply(rows_XD, out_P, in_P, group)


def _all_to_all(rows_XD: Tensor, out_P: list[int], in_P: list[int], group: Any) -> Tensor:
    received = rows_XD.new_empty(sum(out_P), rows_XD.shape[1])
    dist.all_to_all_single(received, rows_XD.contiguous(), out_P, in_P, group=group)
    return received


def localise(experts: Experts, layout: Layout, group_name: str) -> Experts:
    """The rank's slice of a layer's experts, in DeepSpeed's marks (`allreduce`, `group_name`) and ours (the global index)."""
    count = experts.num_experts // layout.ep
    first = layout.expert_rank * count
    local = Experts.__new__(Experts)
    nn.Module.__init__(local)
    local.num_experts, local.dim, local.hidden, local.grouped = count, experts.dim, experts.hidden, experts.grouped
    for name, whole in experts.named_parameters():
        part = nn.Parameter(whole.detach()[first : first + count].clone(), requires_grad=whole.requires_grad)
        part.allreduce, part.group_name = False, group_name  # type: ignore[attr-defined]
        part.num_experts, part.first_expert = experts.num_experts, first  # type: ignore[attr-defined]
        if hasattr(whole, "law"):
            part.law = whole.law  # type: ignore[attr-defined]
        setattr(local, name, part)
    return local


def apply_expert_parallel(model: nn.Module, layout: Layout) -> int:
    """Replaces every `MoELayer` of `model` in place; returns how many. With ep = 1 nothing changes: all experts stay dense."""
    if layout.ep == 1:
        return 0
    found = [(name, module) for name, module in model.named_modules() if type(module) is MoELayer]
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        replacement: Any = ExpertParallelMoE(layer, layout).train(layer.training)
        setattr(model.get_submodule(parent), child, replacement)
        replacement.set_deepspeed_parallelism()
    return len(found)
