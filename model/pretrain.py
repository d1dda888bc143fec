"""The pretraining objective: one `Student`, its no-grad twin (the teacher), and what crosses between them.

One optimiser step with A micro-batches on each of W ranks:

    scores  = [teacher.teacher_forward(batch) for batch in micro_batches]     # no gradient, small
    targets = teacher.center(scores, samples_seen, reduce)                    # all collectives of the losses
    for batch, target in zip(micro_batches, targets):
        loss, metrics = student(batch, target)                               # backward, averaged over ranks and A
    more = student.finish_step(reduce)                                       # loads and prototype usage of the step

Loss and metrics follow the convention of `model.losses.reduce`: their mean over ranks and micro-batches is exact.
Metric names: `loss`; `loss/mgcl_<modality|fused>` (sum of the granularities); `loss/qsacl`; `loss/ita`; `loss/balance`,
`loss/z` (means over layers); `targets/entropy` (of the teacher's
targets, as a share of log K, mean over groups: 1 = they say nothing, 0 = one prototype each); `feature/effective_rank`, `feature/std` (`model.collapse`); from `finish_step`: `moe/…`
(`model.moe.balance.describe`), `prototypes/usage` and `prototypes/usage_<head>`.

Dimension legend: B sites · T dates · h, w tokens · D final dim · F fused dim · N rows · L layers with experts · E experts.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model import collapse
from model.augment import photometric
from model.batch import Batch, View
from model.config import ModelConfig, ObjectiveConfig
from model.decoder import QueryDecoder
from model.geo_context import ContextSums, GeoContext, assign
from model.heads import ProjectionHead
from model.inputs import normalise
from model.losses import qsacl
from model.losses.dino import teacher_temperature
from model.losses.ita import IGNORE, token_classes
from model.losses.mgcl import pair_views, pool_student
from model.losses.reduce import Reduce
from model.losses.router import router_terms
from model.moe.balance import MoEStats, add_stats, describe, reduce_stats
from model.objective_plan import head_dims, head_of, uses_ita
from model.skysense import Features, SkySense
from model.targets import Rows, TeacherScores, TeacherTargets, center
from model.text import TextAlignment, load_embeddings
from model.validity import routed_tokens
from model.view_tokens import view_tokens, view_validity

log = logging.getLogger(__name__)


class Student(nn.Module):
    """SkySense with heads, query decoder and (optional) text alignment and geo-context. The teacher is the same class.

    Args:
        statistics: the manifest's, `{modality: {mean, std, …}}`.
        classes: names of the dense classes in `View.classes_BHW`, index = value; without any, ITA is off.

    Buffers (int64, part of a checkpoint, not for EMA): `load_LE`, expert loads of the previous step; each head's `age_K`.
    """

    load_LE: Tensor

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        statistics: Mapping[str, Any],
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.statistics = model, objective, dict(statistics)
        self.skysense = SkySense(model)
        self.heads = nn.ModuleDict(
            {
                name: ProjectionHead(dim, objective.head_hidden, objective.head_bottleneck, objective.prototypes)
                for name, dim in head_dims(model, objective).items()
            }
        )
        self.decoder = (
            QueryDecoder(model.fusion_dim, objective.queries, model.fusion_heads) if objective.qsacl_weight else None
        )
        self.alignment: TextAlignment | None = None
        if uses_ita(objective) and not classes:
            log.warning(
                "objective.ita_embeddings is set, but the shard set has no dense class labels: no image-text alignment"
            )
        elif uses_ita(objective):
            text_CE = load_embeddings(str(objective.ita_embeddings), classes or [])
            self.alignment = TextAlignment(model.fusion_dim, text_CE, objective.ita_temperature)
        self.context = GeoContext(model.fusion_dim) if objective.geo_context else None
        self.spaces = (*model.modalities, "fused") if objective.mgcl_weight else ()
        self.head_of_group = self._groups()
        self.num_routers = len(model.moe.placed(sum(model.depths[2:]))) * (
            len(model.modalities) if model.separate else 1
        )
        self.register_buffer("load_LE", torch.zeros(self.num_routers, model.moe.experts, dtype=torch.int64))
        self._step_stats: list[list[MoEStats]] = []
        self._step_hits: dict[str, Tensor] = {}

    def _groups(self) -> dict[str, str]:
        """Head of every group of rows that is centred by itself, in order."""
        objective = self.objective
        groups = {
            f"{space}/{level}": head_of("fused" if space == "fused" else "dense", level, objective)
            for space in self.spaces
            for level in objective.mgcl_levels
        }
        return {**groups, **({"query": "query"} if objective.qsacl_weight else {})}

    # ---- teacher side

    @torch.no_grad()
    def teacher_forward(self, batch: Batch) -> TeacherScores:
        """The teacher's view of one micro-batch: v and the local views; of u only masks and geometry are used."""
        views = [batch.v, *(batch.local if self.decoder else [])]
        features = [self.features(view) for view in views] if self.head_of_group else []
        features, context = self._teacher_context(batch, features)
        valid_u, valid_v = view_validity(self.model, batch.u), view_validity(self.model, batch.v)
        rows: dict[str, Rows] = {}
        pairings = {}
        for space in self.spaces:
            u = view_tokens(self.model, batch.u, space, valid_u)
            v = view_tokens(self.model, batch.v, space, valid_v, features[0])
            pairings[space], pooled = pair_views(
                u, v, batch.position_B, self.objective.pixel_pairs, self.objective.object_clusters,
                self.objective.sinkhorn_iterations,
            )  # fmt: skip
            for level in self.objective.mgcl_levels:
                y_Nd = self._head(f"{space}/{level}").project(getattr(pooled, level))
                rows[f"{space}/{level}"] = Rows(y_Nd, pairings[space].valid(level))
        if self.decoder:
            rows["query"] = self._teacher_queries(batch, features, valid_u.fused)
        tokens_KL = torch.stack([routed_tokens(self.model, view) for view in self._student_views(batch)])
        tokens_L = tokens_KL.sum(0).to(batch.position_B.device)
        return TeacherScores(rows, pairings, self._classes(batch.u, valid_u.fused), tokens_L, context)

    @torch.no_grad()
    def center(self, scores: list[TeacherScores], samples_seen: int, reduce: Reduce) -> list[TeacherTargets]:
        """Targets of a whole step from the scores of all its micro-batches; collective over ranks."""
        objective = self.objective
        temperature = teacher_temperature(samples_seen, objective.teacher_temperature, objective.teacher_warmup_samples)
        prototypes = {name: head.prototypes.directions() for name, head in self._heads().items()}
        iterations = objective.sinkhorn_iterations if objective.centering == "sinkhorn" else 0
        in_student = objective.balance_load == "micro_batch" and self.num_routers > 0
        targets = center(
            scores, self.head_of_group, prototypes, temperature, iterations, reduce, objective.center_bottleneck
        )
        sums = [score.context for score in scores if score.context is not None]
        if self.context is not None and sums:
            self.context.learn(sums, objective.geo_momentum, reduce)
        return [replace(t, samples_seen=samples_seen, reduce=reduce if in_student else None) for t in targets]

    def _teacher_context(self, batch: Batch, features: list[Features]) -> tuple[list[Features], ContextSums | None]:
        """Fused features with their regions' context, and what the regions learn from v."""
        if self.context is None or not features:
            return features, None
        region_B, prototypes_BPF = self.context.of_sites(batch.lonlat_B2)
        sums = assign(features[0].fused, features[0].fused_valid, region_B, prototypes_BPF)
        return [self._in_context(f, prototypes_BPF) for f in features], sums

    def _teacher_queries(self, batch: Batch, features: list[Features], valid_u_Bhw: Tensor) -> Rows:
        assert self.decoder is not None
        outputs = [self.decoder(f.fused, f.fused_valid) for f in features]
        y_Nd = self._head("query").project(qsacl.teacher_rows(outputs[0], outputs[1:]))
        seen = [f.fused_valid.flatten(1).any(1) for f in features]
        return Rows(y_Nd, qsacl.valid_rows(valid_u_Bhw.flatten(1).any(1), seen[0], seen[1:], self.objective.queries))

    def _classes(self, u: View, valid_Bhw: Tensor) -> Tensor | None:
        if self.alignment is None or u.classes_BHW is None:
            return None
        return torch.where(valid_Bhw, token_classes(u.classes_BHW, (valid_Bhw.shape[1], valid_Bhw.shape[2])), IGNORE)

    # ---- student side

    def forward(self, batch: Batch, targets: TeacherTargets, diagnose: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one micro-batch. All parameters take part, whatever is missing, with zero gradient if need be."""
        features = [
            self.features(view, _seeds(batch, targets.samples_seen, number))
            for number, view in enumerate(self._student_views(batch))
        ]
        features = [self._in_context(f, targets.context_BPF) for f in features]
        u, local = features[0], features[1:]
        metrics: dict[str, Tensor] = {}
        loss = self._contrast(batch, u, local, targets, metrics)
        if self.alignment is not None:
            ita = self.alignment(u.fused, targets.class_Bhw)
            ita = ita * targets.ita_scale.to(ita.dtype)
            loss = loss + self.objective.ita_weight * ita
            metrics["loss/ita"] = ita.detach()
        loss = loss + self._router(features, targets, metrics)
        metrics["loss"] = loss.detach()
        if diagnose:
            metrics.update(collapse.feature_metrics(u.fused.detach(), u.fused_valid))
        return loss, metrics

    def features(self, view: View, seed_B: Tensor | None = None) -> Features:
        """SkySense's features of a raw view: photometric augmentation, normalisation, network.

        seed_B: decides drop-path in training; a function of samples, not of ranks.
        """
        return self.skysense(normalise(photometric(view), self.statistics), seed_B)

    def _contrast(
        self, batch: Batch, u: Features, local: list[Features], targets: TeacherTargets, metrics: dict[str, Tensor]
    ) -> Tensor:
        """MGCL and QSACL: rows of every group to their head, one call per head."""
        rows: dict[str, Tensor] = {}
        validity = view_validity(self.model, batch.u)
        for space in self.spaces:
            tokens = view_tokens(self.model, batch.u, space, validity, u)
            pooled = pool_student(tokens, targets.pairings[space])
            rows.update({f"{space}/{level}": getattr(pooled, level) for level in self.objective.mgcl_levels})
        if self.decoder is not None:
            outputs = [self.decoder(f.fused, f.fused_valid) for f in (u, *local)]
            rows["query"] = qsacl.student_rows(outputs[0], outputs[1:])
        loss = u.fused.new_zeros((), dtype=torch.float32)
        for name, head in self._heads().items():
            target, groups = targets.heads[name], targets.groups[name]
            out = head(torch.cat([rows[g] for g in groups]), target, self.objective.student_temperature)
            loss = loss + out.loss * (self.objective.qsacl_weight if name == "query" else self.objective.mgcl_weight)
            self._note_hits(name, out.best_N[target.weight_N > 0], head)
            for i, group in enumerate(groups):
                weight_N = target.weight_N * (target.group_N == i)
                key = "loss/qsacl" if group == "query" else f"loss/mgcl_{group.split('/')[0]}"
                metrics[key] = metrics.get(key, 0.0) + (out.ce_N * weight_N).sum()
                share = (out.entropy_N * weight_N).sum() / (
                    len(self.head_of_group) * math.log(self.objective.prototypes)
                )
                metrics["targets/entropy"] = metrics.get("targets/entropy", 0.0) + share
        return loss

    def _router(self, features: list[Features], targets: TeacherTargets, metrics: dict[str, Tensor]) -> Tensor | float:
        if not self.num_routers:
            return 0.0
        stats = add_stats([f.moe for f in features])
        if self.training:
            self._step_stats.append([MoEStats(*(x.detach() for x in layer)) for layer in stats])
        balance_L, z_L = router_terms(stats, self.load_LE, targets.router_tokens_L, targets.parts, targets.reduce)
        metrics["loss/balance"], metrics["loss/z"] = balance_L.detach().mean(), z_L.detach().mean()
        return self.model.moe.balance_weight * balance_L.sum() + self.model.moe.z_weight * z_L.sum()

    @torch.no_grad()
    def finish_step(self, reduce: Reduce) -> dict[str, Tensor]:
        """Once per optimiser step, on all ranks: sums loads and prototype hits over the step; metrics `moe/…`, `prototypes/…`."""
        metrics: dict[str, Tensor] = {}
        if self._step_stats:
            stats = reduce_stats(add_stats(self._step_stats), reduce)
            self.load_LE.copy_(torch.stack([layer.load_ME.sum(0) for layer in stats]).round().long())
            metrics.update(describe(stats, self.model.modalities))
        for name, head in self._heads().items():
            hits = self._step_hits.get(name)
            hits = torch.zeros_like(head.prototypes.age_K) if hits is None else hits
            metrics[f"prototypes/usage_{name}"] = collapse.update_age(head.prototypes.age_K, reduce.sum(hits) > 0)
        if self.heads:
            metrics["prototypes/usage"] = torch.stack(
                [metrics[f"prototypes/usage_{name}"] for name in self.heads]
            ).mean()
        self._step_stats, self._step_hits = [], {}
        return metrics

    # ---- shared

    def _in_context(self, features: Features, prototypes_BPF: Tensor | None) -> Features:
        if self.context is None or prototypes_BPF is None:
            return features
        return replace(features, fused=self.context(features.fused, prototypes_BPF))

    def _student_views(self, batch: Batch) -> list[View]:
        return [batch.u, *(batch.local if self.decoder is not None else [])]

    def _heads(self) -> dict[str, ProjectionHead]:
        return {name: head for name, head in self.heads.items() if isinstance(head, ProjectionHead)}

    def _head(self, group: str) -> ProjectionHead:
        return self._heads()[self.head_of_group[group]]

    def _note_hits(self, name: str, best_N: Tensor, head: ProjectionHead) -> None:
        hits = self._step_hits.setdefault(name, torch.zeros_like(head.prototypes.age_K))
        hits[best_N] = 1


def make_teacher(student: Student) -> Student:
    """The teacher: a copy that never gets a gradient; its weights follow by EMA (`pipeline.ema`)."""
    teacher = copy.deepcopy(student)
    if teacher.context is not None and not hasattr(teacher.context, "prototypes_RPF"):
        teacher.context.own_prototypes(student.objective.geo_regions, student.objective.geo_prototypes)
    teacher.requires_grad_(False)
    return teacher.eval()


def _seeds(batch: Batch, samples_seen: int, view: int) -> Tensor:
    """Drop-path seed per site, from (sample, samples seen, view): equal on every layout, new in every step."""
    return batch.position_B.to(torch.int64) * 1_000_003 + samples_seen * 31 + view
