"""The pretraining objective: the `Student`, and how it meets its no-grad twin, the teacher (`model.teacher`).

One optimiser step with A micro-batches on each of W ranks:

    scores  = [teacher.teacher_forward(batch) for batch in micro_batches]     # no gradient, small
    targets = teacher.center(scores, samples_seen, reduce, total_samples)     # all collectives of the losses
    for batch, target in zip(micro_batches, targets):
        loss, metrics = student(batch, target)                               # backward, averaged over ranks and A
    more = student.finish_step(reduce)                                       # loads and prototype usage of the step

Loss and metrics follow the convention of `model.losses.reduce`: their mean over ranks and micro-batches is exact.
Metric names: `loss`; `loss/mgcl_<modality|fused>` (sum of the granularities); `loss/qsacl`; `loss/ita`; `loss/balance`,
`loss/z` (means over layers); `loss/cross_<modality>`, `loss/{restore,site,koleo}_<modality|fused>`, `loss/masked_<modality>`,
`loss/labels` (`model.prediction`); `targets/entropy` (of the teacher's
targets, as a share of log K, mean over groups: 1 = they say nothing, 0 = one prototype each); `feature/effective_rank`, `feature/std` (`model.collapse`); `work/share` (`model.useful`); from `finish_step`: `moe/…`
(`model.moe.balance.describe`), `prototypes/usage` and `prototypes/usage_<head>`.

Dimension legend: B sites · T dates · h, w tokens · D final dim · F fused dim · N rows · L layers with experts · E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import collapse
from model.batch import Batch
from model.heads import HeadTargets, ProjectionHead
from model.inputs import normalise
from model.losses import qsacl
from model.losses.mgcl import ViewTokens, pool_student
from model.losses.reduce import Reduce
from model.losses.router import router_terms
from model.losses.sinkhorn import memberships
from model.moe.balance import MoEStats, add_stats, describe, reduce_stats
from model.network import LOCAL, Network, group_name
from model.restore import on_cells
from model.rows import plan_take, to_device
from model.skysense import Features
from model.targets import TeacherTargets
from model.useful import useful_share
from model.view_tokens import features_validity, view_tokens


class Student(Network):
    """The network that learns. `forward` is its pass over one micro-batch; `finish_step` sums what only a whole step can say."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_stats: list[list[MoEStats]] = []
        self._step_hits: dict[str, Tensor] = {}

    def forward(self, batch: Batch, targets: TeacherTargets, diagnose: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one micro-batch. All parameters take part, whatever is missing, with zero gradient if need be."""
        seen = replace(batch, u=targets.seen.u)
        kept_BM = targets.seen.fused_BM if self.training else None
        known = targets.seen.known if self.training else [item._replace(fused_BM=None) for item in targets.seen.known]
        views = self.student_views(seen)
        seeds = [_seeds(batch, targets.samples_seen, number) for number in range(len(views))]
        features = self.features(views, seeds, [kept_BM] + [None] * (len(views) - 1), known)
        features = [self.in_context(f, targets.context_BPF) for f in features]
        u, local = features[0], features[1:]
        valid_u = features_validity(u)
        metrics: dict[str, Tensor] = {}
        loss = self._contrast(seen, u, local, targets, metrics)
        if self.prediction.is_on:
            assert targets.prediction is not None
            whole = replace(batch, u=normalise(batch.u, self.statistics))
            classes = (targets.class_Bhw, targets.ita_scale)
            term, found = self.prediction(whole, u, valid_u, targets.prediction, classes)
            loss = loss + term
            metrics.update(found)
        if self.alignment is not None:
            ita = self.alignment(u.fused, targets.class_Bhw)
            ita = ita * targets.ita_scale.to(ita.dtype)
            loss = loss + self.objective.ita_weight * ita
            metrics["loss/ita"] = ita.detach()
        loss = loss + self._router(features, targets, metrics)
        metrics["loss"] = loss.detach()
        if diagnose:
            metrics.update(collapse.feature_metrics(u.fused.detach(), u.fused_valid))
            metrics["work/share"] = useful_share(self.model, views, features)
        return loss, metrics

    def _contrast(
        self, batch: Batch, u: Features, local: list[Features], targets: TeacherTargets, metrics: dict[str, Tensor]
    ) -> Tensor:
        """MGCL, cross-sensor prediction and QSACL: rows of every group to their head, one call per head."""
        rows: dict[str, Tensor] = {}
        for (name, view), features in zip(self.contrasted(batch).items(), (u, *local)):
            valid = features_validity(features)
            for space in self.spaces:
                tokens = view_tokens(self.model, view, space, valid, features)
                pooled = pool_student(tokens, targets.pairings[space + name])
                for level in self.objective.mgcl_levels:
                    group, x_ND = group_name(space, level, name != ""), getattr(pooled, level)
                    rows[group] = torch.cat([rows[group], x_ND]) if group in rows else x_ND
        if self.decoder is not None:
            outputs = [self.decoder(f.fused, f.fused_valid) for f in (u, *local)]
            rows["query"] = qsacl.student_rows(outputs[0], outputs[1:])
        loss = u.fused.new_zeros((), dtype=torch.float32)
        for name, head in self.all_heads().items():
            target, groups = targets.heads[name], targets.groups[name]
            out = head(
                torch.cat([rows[g] for g in groups]),
                target,
                self.objective.student_temperature,
                targets.prototypes_frozen,
            )
            loss = loss + out.loss * (self.objective.qsacl_weight if name == "query" else self.objective.mgcl_weight)
            self._note_hits(name, out.best_N, target.weight_N, head)
            weight_GN = memberships(target.group_N, len(groups), target.weight_N > 0) * target.weight_N
            totals_G2 = weight_GN @ torch.stack([out.ce_N, out.entropy_N], 1).to(weight_GN.dtype)
            for group, ce in zip(groups, totals_G2[:, 0].unbind()):
                key = "loss/qsacl" if group == "query" else f"loss/mgcl_{group.split('/')[0]}"
                metrics[key] = metrics[key] + ce if key in metrics else ce
            share = totals_G2[:, 1].sum() / (len(self.head_of_group) * math.log(self.objective.prototypes))
            metrics["targets/entropy"] = metrics.get("targets/entropy", 0.0) + share
        if self.cross:
            fused = view_tokens(self.model, batch.u, "fused", features_validity(u))
            loss = loss + self.objective.cross_weight * self._cross(fused, u, targets, metrics)
        return loss

    def _cross(self, fused: ViewTokens, u: Features, targets: TeacherTargets, metrics: dict[str, Tensor]) -> Tensor:
        """Cross-sensor prediction: every sensor's tokens of u, dates averaged, on the fused grid, against the teacher's targets of
        the fused features of v, by heads of their own. A mean over all fused rows: a sensor that is not there counts 0.
        """
        loss = u.fused.new_zeros((), dtype=torch.float32)
        pairing = targets.pairings["fused"]
        cells = (u.fused_valid.shape[1], u.fused_valid.shape[2])
        for space in self.model.modalities:
            x_BhwD, ok_Bhw = on_cells(u.dense[space], u.dense_valid[space], cells)
            tokens = replace(fused, valid_BThw=ok_Bhw[:, None], features_BThwD=x_BhwD[:, None])
            pooled = pool_student(tokens, pairing)
            any_B1 = ok_Bhw.flatten(1).any(1)[:, None]
            ok = {
                "pixel": torch.gather(ok_Bhw.flatten(1)[:, None], 2, pairing.index_BTP),
                "object": any_B1[..., None].expand(pairing.object_valid_BTC.shape),
                "image": any_B1,
            }
            total: Tensor | float = 0.0
            for name, head in self.cross.items():
                target, groups = targets.heads[name], targets.groups[name]
                levels = [g.split("/")[1] for g in groups if not g.endswith(LOCAL)]
                rows_ND = torch.cat([getattr(pooled, level) for level in levels])
                ok_N = torch.cat([(ok[level] & (level in self.objective.cross_levels)).flatten() for level in levels])
                aim = _of_first(target, len(rows_ND), ok_N)
                total = total + head(rows_ND, aim, self.objective.student_temperature, targets.prototypes_frozen).loss
            assert isinstance(total, Tensor)
            metrics[f"loss/cross_{space}"] = total.detach()
            loss = loss + total
        return loss

    def _router(self, features: list[Features], targets: TeacherTargets, metrics: dict[str, Tensor]) -> Tensor | float:
        if not self.num_routers:
            return 0.0
        stats = features[0].moe
        if self.training:
            self._step_stats.append([MoEStats(*(x.detach() for x in layer)) for layer in stats])
        balance_L, z_L = router_terms(stats, self.load_LE, targets.router_tokens_L, targets.parts, targets.reduce)
        metrics["loss/balance"], metrics["loss/z"] = balance_L.detach().mean(), z_L.detach().mean()
        return self.model.moe.balance_weight * balance_L.sum() + self.model.moe.z_weight * z_L.sum()

    @torch.no_grad()
    def finish_step(self, reduce: Reduce) -> dict[str, float]:
        """Once per optimiser step, on all ranks: sums loads and prototype hits over the step; metrics `moe/…`, `prototypes/…`."""
        metrics: dict[str, float] = {}
        if self._step_stats:
            stats = reduce_stats(add_stats(self._step_stats), reduce)
            self.load_LE.copy_(torch.stack([layer.load_ME.sum(0) for layer in stats]).round().long())
            metrics.update(describe(stats, self.model.modalities))
        usage = []
        for name, head in self.all_heads().items():
            hits = self._step_hits.get(name)
            hits = torch.zeros_like(head.prototypes.age_K) if hits is None else hits
            usage.append(collapse.update_age(head.prototypes.age_K, reduce.sum(hits) > 0))
        if usage:
            shares = torch.stack(usage).tolist()
            metrics.update({f"prototypes/usage_{name}": share for name, share in zip(self.all_heads(), shares)})
            metrics["prototypes/usage"] = sum(shares) / len(shares)
        self._step_stats, self._step_hits = [], {}
        return metrics

    def _note_hits(self, name: str, best_N: Tensor, weight_N: Tensor, head: ProjectionHead) -> None:
        """Marks the best matches of rows that count."""
        hits = self._step_hits.setdefault(name, torch.zeros_like(head.prototypes.age_K))
        hits.scatter_reduce_(0, best_N, (weight_N > 0).to(hits.dtype), "amax")


def _seeds(batch: Batch, samples_seen: int, view: int) -> Tensor:
    """Drop-path seed per site, from (sample, samples seen, view): equal on every layout, new in every step."""
    return batch.position_B.to(torch.int64) * 1_000_003 + samples_seen * 31 + view


def _of_first(target: HeadTargets, number: int, ok_N: Tensor) -> HeadTargets:
    """The targets of a head's first `number` rows (its own groups come before those of local views), without its mean, which is of
    another head's bottleneck. ok_N: rows that count."""
    chosen = target.host_rows[target.host_rows < number]
    counts = len(chosen) > 0
    chosen = chosen if counts else np.zeros(1, np.int64)
    first, device = slice(0, len(chosen)), ok_N.device
    return replace(
        target, z_Nd=target.z_Nd[first], group_N=target.group_N[first],
        weight_N=target.weight_N[first] * (ok_N.index_select(0, to_device(chosen, device)) & counts),
        mean_Gd=torch.zeros_like(target.mean_Gd), rows=plan_take(chosen, number, device), host_rows=chosen,
    )  # fmt: skip
