"""What the teacher hands to the student, and how a whole step is centred and normalised (conventions: `model.losses.reduce`).

Legend: N rows · d bottleneck dim · K prototypes · G groups of one head · L layers with experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import View
from model.geo_context import ContextSums
from model.heads import HeadTargets, unit_rows
from model.losses.mgcl import Pairing
from model.losses.reduce import Reduce
from model.losses.sinkhorn import memberships, prototype_scaling
from model.prediction import PredictionScores, PredictionTargets
from model.rows import Take, plan_take, take, to_device
from model.validity import HostView, on_host


@dataclass(frozen=True)
class Rows:
    """Teacher's bottleneck vectors of one group (`hr/pixel`, …, `query`) of one micro-batch; invalid ones are meaningless."""

    y_Nd: Tensor
    valid_N: Tensor


@dataclass(frozen=True)
class Seen:
    """What the student sees of a micro-batch (`model.hiding`): its u, which sensors its fusion sees, bool [B, M] (None: all), and what
    the host knows of its views, in the student's order.
    """

    u: View
    fused_BM: Tensor | None
    known: list[HostView]


@dataclass(frozen=True)
class TeacherScores:
    """One micro-batch after the teacher's forward: a few hundred bytes per position, whatever the number of prototypes.

    Attributes:
        rows: by group, in the student's group order.
        pairings: which tokens of u each modality compares (constants to autograd).
        class_Bhw: class of each fused token of u, -1 where unlabelled or invalid; None without ITA.
        tokens_L: float64, router tokens that the student will see per layer.
        context: geo-context of the sites and what it learns; None if off.
        seen: what the student will see.
    """

    rows: dict[str, Rows]
    pairings: dict[str, Pairing]
    class_Bhw: Tensor | None
    tokens_L: Tensor
    context: ContextSums | None
    prediction: PredictionScores
    seen: Seen


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
        prototypes_frozen: the student's prototypes do not learn in this step. seen: what the student sees.
    """

    heads: dict[str, HeadTargets]
    groups: dict[str, list[str]]
    pairings: dict[str, Pairing]
    class_Bhw: Tensor | None
    ita_scale: Tensor
    router_tokens_L: Tensor
    parts: int
    seen: Seen
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
    for head, members in _counted(scores, groups).items():
        names = groups[head]
        y_Nd, group_N, valid_N = (_joined(column) for column in zip(*(member[:3] for member in members)))
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
        weight_N = scale_G.index_select(0, group_N) * valid_N
        sizes = [len(member.y_Nd) for member in members]
        for targets, member, z, weight in zip(heads, members, z_Nd.split(sizes), weight_N.split(sizes)):
            targets[head] = HeadTargets(
                z,
                member.group_N,
                mean_Gd,
                weight,
                prototypes[head],
                log_v_GK,
                temperature,
                member.rows,
                member.host_rows,
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
            score.seen,
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
    member_GN = memberships(group_N, num_groups, valid_N).double()
    total = reduce.sum(
        torch.cat([member_GN @ torch.where(valid_N[:, None], y_Nd, 0).double(), member_GN.sum(1, keepdim=True)], 1)
    )
    return (total[:, :-1] / total[:, -1:].clamp_min(1)).to(y_Nd.dtype)


def _scales(
    scores: list[TeacherScores], groups: list[str], parts: int, reduce: Reduce
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """W·A/N per group and prediction term, and of labelled tokens, 0 where nothing is valid anywhere; tokens per router layer."""
    names = [*groups, *scores[0].prediction.counts]
    counts = []
    for score in scores:
        rows = [score.rows[name].valid_N.sum(dtype=torch.float64) for name in groups]
        labelled = (
            score.tokens_L.new_zeros(())
            if score.class_Bhw is None
            else (score.class_Bhw >= 0).sum(dtype=score.tokens_L.dtype)
        )
        counts.append(torch.cat([torch.stack([*rows, *score.prediction.counts.values(), labelled]), score.tokens_L]))
    total = reduce.sum(counts[0] if len(counts) == 1 else torch.stack(counts).sum(0))
    scale = torch.where(total > 0, parts / total.clamp_min(1e-12), 0.0)
    return dict(zip(names, scale)), scale[len(names)], total[len(names) + 1 :]


class _Counted(NamedTuple):
    """Rows of one head in one micro-batch that count (one that does not, if none does: every parameter is part of every graph)."""

    y_Nd: Tensor
    group_N: Tensor
    valid_N: Tensor
    rows: Take
    host_rows: np.ndarray


def _counted(scores: list[TeacherScores], groups: Mapping[str, list[str]]) -> dict[str, list[_Counted]]:
    """Per head, the rows of every micro-batch. What does not count is not computed, neither here nor by the student, and for that
    the host has to know it: the step's only wait in the centring.
    """
    stacked = [(name, [score.rows[g] for g in members]) for name, members in groups.items() for score in scores]
    if not stacked:
        return {}
    hosts = on_host([torch.cat([row.valid_N for row in rows]) for _, rows in stacked])
    found: dict[str, list[_Counted]] = {name: [] for name in groups}
    for (name, rows), valid in zip(stacked, hosts):
        device = rows[0].y_Nd.device
        chosen = np.flatnonzero(valid) if valid.any() else np.arange(min(1, len(valid)))
        group = np.repeat(np.arange(len(rows)), [len(row.valid_N) for row in rows])
        plan = plan_take(chosen, len(valid), device)
        y_Nd = take(torch.cat([row.y_Nd for row in rows]), plan)
        found[name].append(
            _Counted(y_Nd, to_device(group[chosen], device), to_device(valid[chosen], device), plan, chosen)
        )
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
