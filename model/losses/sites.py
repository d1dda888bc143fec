"""Telling sites apart: InfoNCE between a student's pooled features and the teacher's of the whole step, and KoLeo against them.

Negatives are the teacher's rows of *all* sites of the step, gathered over ranks and micro-batches: constants to autograd, so the
loss and its gradient are the same however the step is split, at batch 8 as at batch 1024.

Legend: B sites of a micro-batch · S sites of the step · d dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.reduce import Reduce
from model.losses.sinkhorn import work_dtype


def gather_rows(parts_Bd: list[Tensor], reduce: Reduce) -> tuple[Tensor, list[int]]:
    """(rows_Sd, first): the micro-batches' rows of all ranks, rank by rank, and where each of this rank's begins.

    One collective. Every rank must hand in the same number of rows.
    """
    mine_Rd = torch.cat([part.detach() for part in parts_Bd])
    number = mine_Rd.shape[0]
    slots = mine_Rd.new_zeros(reduce.world * number, *mine_Rd.shape[1:])
    slots[reduce.rank * number : (reduce.rank + 1) * number] = mine_Rd
    sizes = [len(part) for part in parts_Bd]
    first = [reduce.rank * number + sum(sizes[:i]) for i in range(len(sizes))]
    return reduce.sum(slots), first


def site_cross_entropy(
    student_Bd: Tensor, teacher_Sd: Tensor, valid_S: Tensor, own_B: Tensor, temperature: float
) -> Tensor:
    """ce_B = −log softmax_s(z_b · y_s / τ)[own site], over valid sites of the step (InfoNCE, arXiv 1807.03748).

    Rows are made unit vectors here. A row whose own site is not valid is meaningless.
    """
    dtype = work_dtype(student_Bd)
    z_Bd, y_Sd = F.normalize(student_Bd.to(dtype), dim=-1), F.normalize(teacher_Sd.to(dtype), dim=-1)
    logits_BS = (z_Bd @ y_Sd.T) / temperature
    is_own_BS = torch.arange(len(teacher_Sd), device=own_B.device) == own_B[:, None]
    logits_BS = logits_BS.masked_fill(~(valid_S[None] | is_own_BS), -1e4)
    return torch.logsumexp(logits_BS, -1) - torch.gather(logits_BS, 1, own_B[:, None])[:, 0]


def koleo(student_BD: Tensor, teacher_SD: Tensor, valid_S: Tensor, own_B: Tensor, least: float = 1e-4) -> Tensor:
    """−log of the distance from each unit row to the nearest of the *other* sites' (Kozachenko-Leonenko, arXiv 1806.03198; DINOv2
    2304.07193). What we change: neighbours are the teacher's rows of the whole step. 0 where there is no other site.
    """
    dtype = work_dtype(student_BD)
    z_BD, y_SD = F.normalize(student_BD.to(dtype), dim=-1), F.normalize(teacher_SD.to(dtype), dim=-1)
    other_BS = valid_S[None] & (torch.arange(len(teacher_SD), device=own_B.device) != own_B[:, None])
    with torch.no_grad():
        near_B = (z_BD @ y_SD.T).masked_fill(~other_BS, -2.0).argmax(1)
    distance_B = (z_BD - y_SD[near_B]).square().sum(-1).clamp_min(least**2).sqrt()
    return torch.where(other_BS.any(1), -torch.log(distance_B), 0.0)
