"""The pretraining objective: one `Student`, its no-grad twin (the teacher), and what crosses between them.

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

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model import collapse
from model.augment import photometric
from model.batch import Batch, View
from model.config import ModelConfig, ObjectiveConfig, run_samples
from model.decoder import QueryDecoder
from model.geo_context import ContextSums, GeoContext, assign
from model.heads import ProjectionHead
from model.hiding import fused_sensors, hide
from model.inputs import normalise
from model.losses import qsacl
from model.losses.dino import teacher_temperature
from model.losses.ita import IGNORE, token_classes
from model.losses.mgcl import ViewTokens, pair_views, pool_student
from model.losses.reduce import Reduce
from model.losses.router import router_terms
from model.losses.sinkhorn import memberships
from model.moe.balance import MoEStats, add_stats, describe, reduce_stats
from model.objective_plan import cross_heads, head_dims, head_of, uses_ita
from model.prediction import Prediction, gather
from model.restore import on_cells
from model.skysense import Features, SkySense
from model.targets import Rows, TeacherScores, TeacherTargets, center
from model.text import TextAlignment, load_embeddings
from model.useful import useful_share
from model.validity import routed_tokens
from model.view_tokens import features_validity, view_tokens, view_validity

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
        if objective.labels_weight and not classes:
            log.warning(
                "objective.labels_weight is set, but the shard set has no dense class labels: nothing to predict"
            )
        self.cross = nn.ModuleDict(
            {
                name: ProjectionHead(
                    model.dims[3], objective.head_hidden, objective.head_bottleneck, objective.prototypes
                )
                for name in cross_heads(objective)
            }
        )
        self.prediction = Prediction(model, objective, len(classes or []))
        self.context = GeoContext(model.fusion_dim) if objective.geo_context else None
        self.spaces = (*model.modalities, "fused") if objective.mgcl_weight else ()
        self.head_of_group = self._groups()
        self.num_routers = len(model.moe.placed(sum(model.depths[2:]))) * (
            len(model.modalities) if model.separate else 1
        )
        self.register_buffer("load_LE", torch.zeros(self.num_routers, model.moe.experts, dtype=torch.int64))
        self._group_scalings()
        self._step_stats: list[list[MoEStats]] = []
        self._step_hits: dict[str, Tensor] = {}

    def _groups(self) -> dict[str, str]:
        """Head of every group of rows that is centred by itself, in order."""
        objective = self.objective
        groups = {
            group_name(space, level, local): head_of("fused" if space == "fused" else "dense", level, objective)
            for local in ((False, True) if objective.local_mgcl else (False,))
            for space in self.spaces
            for level in objective.mgcl_levels
        }
        return {**groups, **({"query": "query"} if objective.qsacl_weight else {})}

    def _group_scalings(self) -> None:
        """Running averages of Sinkhorn's scaling, [groups, K] per head; the teacher's are used, and travel in checkpoints."""
        for name, head in self._heads().items() if self.objective.centering_momentum else ():
            groups = [g for g, h in self.head_of_group.items() if h == name]
            self.register_buffer(f"scaling_{name}", torch.zeros(len(groups), head.prototypes.weight.shape[0]))

    # ---- teacher side

    @torch.no_grad()
    def teacher_forward(self, batch: Batch) -> TeacherScores:
        """The teacher's view of one micro-batch: v and the local views; of u only masks and geometry are used (its features only
        where they are the target of masked tokens)."""
        views = [batch.v, *(batch.local if self.decoder else [])]
        needed = bool(self.head_of_group) or self.prediction.needs_teacher
        latent = bool(self.objective.masked_weight) and self.objective.masked_target == "teacher"
        views = views * needed + [batch.u] * latent
        features = self.features(views, [None] * len(views)) if views else []
        whole_u = features.pop() if latent else None
        features, context = self._teacher_context(batch, features)
        seen = hide(self.model, self.objective, batch)
        valid_u = view_validity(self.model, seen.u)
        valid_v = features_validity(features[0]) if needed else view_validity(self.model, batch.v)
        rows: dict[str, Rows] = {}
        pairings = {}
        for name, view in self._contrasted(seen).items():
            valid = valid_u if name == "" else view_validity(self.model, view)
            for space in self.spaces:
                u = view_tokens(self.model, view, space, valid)
                v = view_tokens(self.model, batch.v, space, valid_v, features[0])
                pairing, pooled = pair_views(
                    u, v, batch.position_B, self.objective.pixel_pairs, self.objective.object_clusters,
                    self.objective.sinkhorn_iterations,
                )  # fmt: skip
                pairings[space + name] = pairing
                for level in self.objective.mgcl_levels:
                    group = group_name(space, level, name != "")
                    y_Nd, valid_N = self._head(group).project(getattr(pooled, level)), pairing.valid(level)
                    former = rows.get(group)
                    if former is not None:  # several local views are one group
                        y_Nd, valid_N = torch.cat([former.y_Nd, y_Nd]), torch.cat([former.valid_N, valid_N])
                    rows[group] = Rows(y_Nd, valid_N)
        if self.decoder:
            rows["query"] = self._teacher_queries(batch, features, valid_u.fused)
        tokens_KL = torch.stack([routed_tokens(self.model, view) for view in self._student_views(seen)])
        tokens_L = tokens_KL.sum(0).to(batch.position_B.device)
        prediction = self.prediction.scores(batch, features[0] if features else None, valid_u, whole_u)
        return TeacherScores(rows, pairings, self._classes(batch.u, valid_u.fused), tokens_L, context, prediction)

    @torch.no_grad()
    def center(
        self, scores: list[TeacherScores], samples_seen: int, reduce: Reduce, total_samples: int = 0
    ) -> list[TeacherTargets]:
        """Targets of a whole step from the scores of all its micro-batches; collective over ranks.

        total_samples: length of the run, for schedules that are shares of it.
        """
        objective = self.objective
        warmup = run_samples(objective.teacher_warmup, total_samples)
        temperature = teacher_temperature(samples_seen, objective.teacher_temperature, warmup)
        frozen = samples_seen < run_samples(objective.prototypes_frozen, total_samples)
        prototypes = {name: head.prototypes.directions() for name, head in self._heads().items()}
        iterations = objective.sinkhorn_iterations if objective.centering == "sinkhorn" else 0
        in_student = objective.balance_load == "micro_batch" and self.num_routers > 0
        memory = {name: getattr(self, f"scaling_{name}") for name in prototypes if objective.centering_momentum}
        targets = center(
            scores, self.head_of_group, prototypes, temperature, iterations, reduce, objective.center_bottleneck,
            memory, objective.centering_momentum,
        )  # fmt: skip
        prediction = gather([score.prediction for score in scores], targets[0].scale, reduce)
        sums = [score.context for score in scores if score.context is not None]
        if self.context is not None and sums:
            self.context.learn(sums, objective.geo_momentum, reduce)
        return [
            replace(
                t,
                samples_seen=samples_seen,
                reduce=reduce if in_student else None,
                prediction=p,
                prototypes_frozen=frozen,
            )
            for t, p in zip(targets, prediction)
        ]

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
        if (self.alignment is None and self.prediction.labels is None) or u.classes_BHW is None:
            return None
        return torch.where(valid_Bhw, token_classes(u.classes_BHW, (valid_Bhw.shape[1], valid_Bhw.shape[2])), IGNORE)

    # ---- student side

    def forward(self, batch: Batch, targets: TeacherTargets, diagnose: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one micro-batch. All parameters take part, whatever is missing, with zero gradient if need be."""
        seen = hide(self.model, self.objective, batch)
        kept_BM = fused_sensors(
            self.model, self.objective.modality_dropout if self.training else 0.0, seen.u, batch.position_B
        )
        views = self._student_views(seen)
        seeds = [_seeds(batch, targets.samples_seen, number) for number in range(len(views))]
        features = self.features(views, seeds, [kept_BM] + [None] * (len(views) - 1))
        features = [self._in_context(f, targets.context_BPF) for f in features]
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

    def features(
        self, views: Sequence[View], seeds: Sequence[Tensor | None], fused_BM: Sequence[Tensor | None] | None = None
    ) -> list[Features]:
        """SkySense's features of raw views, in one pass: photometric augmentation, normalisation, network.

        Per view: seeds decide drop-path in training, a function of samples, not of ranks; fused_BM: sensors that the fusion sees.
        """
        views = [normalise(photometric(view), self.statistics) for view in views]
        return self.skysense.views(views, seeds, fused_BM=fused_BM)

    def _contrast(
        self, batch: Batch, u: Features, local: list[Features], targets: TeacherTargets, metrics: dict[str, Tensor]
    ) -> Tensor:
        """MGCL, cross-sensor prediction and QSACL: rows of every group to their head, one call per head."""
        rows: dict[str, Tensor] = {}
        for (name, view), features in zip(self._contrasted(batch).items(), (u, *local)):
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
        for name, head in self._heads().items():
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
                levels = [(i, g.split("/")[1]) for i, g in enumerate(groups) if not g.endswith(LOCAL)]
                own_N = torch.isin(target.group_N, torch.tensor([i for i, _ in levels], device=target.group_N.device))
                ok_N = torch.cat(
                    [(ok[level] & (level in self.objective.cross_levels)).flatten() for _, level in levels]
                )
                aim = replace(
                    target, z_Nd=target.z_Nd[own_N], group_N=target.group_N[own_N], weight_N=target.weight_N[own_N] * ok_N,
                    mean_Gd=torch.zeros_like(target.mean_Gd),  # the mean is of another head's bottleneck
                )  # fmt: skip
                rows_ND = torch.cat([getattr(pooled, level) for _, level in levels])
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
        for name, head in self._heads().items():
            hits = self._step_hits.get(name)
            hits = torch.zeros_like(head.prototypes.age_K) if hits is None else hits
            usage.append(collapse.update_age(head.prototypes.age_K, reduce.sum(hits) > 0))
        if usage:
            shares = torch.stack(usage).tolist()
            metrics.update({f"prototypes/usage_{name}": share for name, share in zip(self._heads(), shares)})
            metrics["prototypes/usage"] = sum(shares) / len(shares)
        self._step_stats, self._step_hits = [], {}
        return metrics

    # ---- shared

    def _in_context(self, features: Features, prototypes_BPF: Tensor | None) -> Features:
        if self.context is None or prototypes_BPF is None:
            return features
        return replace(features, fused=self.context(features.fused, prototypes_BPF))

    def _student_views(self, batch: Batch) -> list[View]:
        return [batch.u, *(batch.local if self.decoder is not None or self.objective.local_mgcl else [])]

    def _contrasted(self, batch: Batch) -> dict[str, View]:
        """Student's views that MGCL compares with the teacher's v, by suffix of their pairings' names: u and, if asked, the local ones."""
        local = batch.local if self.objective.local_mgcl else []
        return {"": batch.u, **{f"{LOCAL}{j}": view for j, view in enumerate(local)}} if self.spaces else {}

    def _heads(self) -> dict[str, ProjectionHead]:
        return {name: head for name, head in self.heads.items() if isinstance(head, ProjectionHead)}

    def _head(self, group: str) -> ProjectionHead:
        return self._heads()[self.head_of_group[group]]

    def _note_hits(self, name: str, best_N: Tensor, weight_N: Tensor, head: ProjectionHead) -> None:
        """Marks the best matches of rows that count."""
        hits = self._step_hits.setdefault(name, torch.zeros_like(head.prototypes.age_K))
        hits.scatter_reduce_(0, best_N, (weight_N > 0).to(hits.dtype), "amax")


LOCAL = "/local"


def group_name(space: str, level: str, local: bool) -> str:
    """Rows that are centred together: one space, one granularity, of u or of the local views."""
    return f"{space}/{level}{LOCAL if local else ''}"


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
