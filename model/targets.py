"""What the teacher hands to the student, and how a whole step is centred and normalised (conventions: `model.losses.reduce`).

Legend: N rows · d bottleneck dim · K prototypes · G groups of one head · L layers with experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.geo_context import ContextSums
from model.heads import HeadTargets, unit_rows
from model.losses.mgcl import Pairing
from model.losses.reduce import Reduce
from model.losses.sinkhorn import prototype_scaling
from model.prediction import PredictionScores, PredictionTargets


@dataclass(frozen=True)
class Rows:
    """Teacher's bottleneck vectors of one group (`hr/pixel`, …, `query`) of one micro-batch; invalid ones are meaningless."""

    y_Nd: Tensor
    valid_N: Tensor


@dataclass(frozen=True)
class TeacherScores:
    """One micro-batch after the teacher's forward: a few hundred bytes per position, whatever the number of prototypes.

    Attributes:
        rows: by group, in the student's group order.
        pairings: which tokens of u each modality compares (constants to autograd).
        class_Bhw: class of each fused token of u, -1 where unlabelled or invalid; None without ITA.
        tokens_L: router tokens that the student will see per layer.
        context: geo-context of the sites and what it learns; None if off.
    """

    rows: dict[str, Rows]
    pairings: dict[str, Pairing]
    class_Bhw: Tensor | None
    tokens_L: Tensor
    context: ContextSums | None = None
    prediction: PredictionScores = field(default_factory=PredictionScores)


@dataclass(frozen=True)
class TeacherTargets:
    """One micro-batch of a centred step. Scales are W·A/N of their term.

    Attributes:
        router_tokens_L: tokens that each layer with experts routes in the whole step; parts: W·A.
        heads: by head; `weight_N` of a row is its group's scale, 0 if invalid.
        groups: names of the head's groups, index = `group_N`.
        context_BPF: geo-context prototypes of each site's region, before this step's update.
        samples_seen: of the run so far; the same for all micro-batches of the step.
        reduce: set where the student must meet the other ranks (`balance_load: micro_batch`).
        scale: W·A/N of the prediction terms, by name. prediction: their targets.
        prototypes_frozen: the student's prototypes do not learn in this step.
    """

    heads: dict[str, HeadTargets]
    groups: dict[str, list[str]]
    pairings: dict[str, Pairing]
    class_Bhw: Tensor | None
    ita_scale: Tensor
    router_tokens_L: Tensor
    parts: int
    samples_seen: int = 0
    reduce: Reduce | None = None
    context_BPF: Tensor | None = None
    scale: Mapping[str, Tensor] = field(default_factory=dict)
    prediction: PredictionTargets | None = None
    prototypes_frozen: bool = False


def center(
    scores: list[TeacherScores], head_of_group: Mapping[str, str], prototypes: Mapping[str, Tensor], temperature: float,
    iterations: int, reduce: Reduce, center_bottleneck: bool = True, memory: Mapping[str, Tensor] | None = None,
    momentum: float = 0.0,
) -> list[TeacherTargets]:  # fmt: skip
    """Targets of every micro-batch of a step from the scores of all of them, on all ranks.

    Collectives: one for all counts, then per head one for means and `iterations` for Sinkhorn. Each group (say `s2/pixel`) is centred by itself.

    Args:
        head_of_group: which head scores a group; also the order of groups.
        prototypes: unit rows [K, d] of the teacher's heads.
        memory: by head, running averages [G, K] of log v, updated in place; groups with fewer rows than prototypes use them. Few
        rows cannot say which of many prototypes are rare: balanced by themselves, their targets say more of the batch than of
        the rows.
    """
    parts = reduce.world * len(scores)
    scale, ita_scale, router_tokens_L = _scales(scores, list(head_of_group), parts, reduce)
    terms = {name: scale[name] for name in scores[0].prediction.counts}
    groups = {head: [g for g, h in head_of_group.items() if h == head] for head in prototypes}
    heads: list[dict[str, HeadTargets]] = [{} for _ in scores]
    for head, names in groups.items():
        members = [_stack(score, names) for score in scores]
        y_Nd, group_N, valid_N = (torch.cat(column) for column in zip(*members))
        if center_bottleneck:
            mean_Gd = group_means(y_Nd, group_N, valid_N, len(names), reduce)
        else:
            mean_Gd = y_Nd.new_zeros(len(names), y_Nd.shape[1])
        z_Nd = unit_rows(y_Nd, group_N, mean_Gd)
        log_v_GK = prototype_scaling(
            z_Nd, prototypes[head], group_N, valid_N, len(names), temperature, iterations, reduce
        )  # fmt: skip
        scale_G = torch.stack([scale[name] for name in names]).to(log_v_GK.dtype)
        if memory:
            rows_G = torch.where(scale_G > 0, parts / scale_G.clamp_min(1e-30), 0)
            log_v_GK = remember(log_v_GK, memory[head], rows_G, momentum)
        for targets, (y, group, valid) in zip(heads, members):
            weight = scale_G[group] * valid.to(log_v_GK.dtype)
            targets[head] = HeadTargets(
                unit_rows(y, group, mean_Gd), group, mean_Gd, weight, prototypes[head], log_v_GK, temperature
            )
    return [
        TeacherTargets(
            by_head,
            groups,
            score.pairings,
            score.class_Bhw,
            ita_scale,
            router_tokens_L,
            parts,
            context_BPF=None if score.context is None else score.context.prototypes_BPF,
            scale=terms,
        )
        for by_head, score in zip(heads, scores)
    ]


def remember(log_v_GK: Tensor, memory_GK: Tensor, rows_G: Tensor, momentum: float) -> Tensor:
    """The scaling to use: each group's own, or the running average (updated here, started by the first step) where it has fewer
    valid rows than prototypes. A group without rows leaves its average as it is."""
    memory = memory_GK.to(log_v_GK.dtype)
    started_G1 = (memory != 0).any(1, keepdim=True)
    average_GK = torch.where(started_G1, momentum * memory + (1 - momentum) * log_v_GK, log_v_GK)
    average_GK = torch.where(rows_G[:, None] > 0, average_GK, memory)
    memory_GK.copy_(average_GK)
    return torch.where(rows_G[:, None] < log_v_GK.shape[1], average_GK, log_v_GK)


def group_means(y_Nd: Tensor, group_N: Tensor, valid_N: Tensor, num_groups: int, reduce: Reduce) -> Tensor:
    """mean_Gd of the teacher's valid bottleneck vectors over the whole step; one collective.

    Ours. Features of a young network hardly differ from their mean: unit vectors then all point the same way, balanced
    targets are uniform over the prototypes, and student and teacher agree on saying nothing (measured: the entropy of
    targets reached log K within 60 steps). Taken off in the bottleneck, on both sides, by a constant to autograd.
    """
    member_GN = F.one_hot(group_N, num_groups).T.double() * valid_N
    total = reduce.sum(
        torch.cat([member_GN @ torch.where(valid_N[:, None], y_Nd, 0).double(), member_GN.sum(1, keepdim=True)], 1)
    )
    return (total[:, :-1] / total[:, -1:].clamp_min(1)).to(y_Nd.dtype)


def _scales(
    scores: list[TeacherScores], groups: list[str], parts: int, reduce: Reduce
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """W·A/N per group and prediction term, and of labelled tokens, 0 where nothing is valid anywhere; tokens per router layer."""
    device = scores[0].tokens_L.device
    labelled = [0 if s.class_Bhw is None else (s.class_Bhw >= 0).sum() for s in scores]
    rows = [torch.as_tensor(sum(s.rows[name].valid_N.sum() for s in scores), device=device) for name in groups]
    terms = list(scores[0].prediction.counts)
    elements = [torch.stack([s.prediction.counts[name] for s in scores]).sum() for name in terms]
    names = [*groups, *terms]
    counts = torch.stack(
        [x.to(torch.float64) for x in (*rows, *elements, torch.as_tensor(sum(labelled), device=device))]
    )
    tokens_L = torch.stack([s.tokens_L.to(torch.float64) for s in scores]).sum(0)
    total = reduce.sum(torch.cat([counts, tokens_L]))
    scale = torch.where(total > 0, parts / total.clamp_min(1e-12), 0.0)
    return dict(zip(names, scale)), scale[len(names)], total[len(names) + 1 :]


def _stack(score: TeacherScores, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [score.rows[name] for name in names]
    group_N = torch.cat([torch.full_like(r.valid_N, i, dtype=torch.int64) for i, r in enumerate(rows)])
    return torch.cat([r.y_Nd for r in rows]), group_N, torch.cat([r.valid_N for r in rows])
