"""The teacher's side of a step: its pass over each micro-batch, and the centring of the whole step.

Legend: B sites · N rows · d bottleneck dim · h, w fused tokens · L layers with experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, View
from model.config import run_samples
from model.geo_context import ContextSums, assign
from model.hiding import fused_sensors, hide
from model.losses import qsacl
from model.losses.dino import teacher_temperature
from model.losses.ita import IGNORE, token_classes
from model.losses.mgcl import Pairing, pair_views
from model.losses.reduce import Reduce
from model.network import Network, group_name
from model.prediction import gather
from model.rows import to_device
from model.skysense import Features
from model.targets import Rows, Seen, TeacherScores, TeacherTargets, center
from model.validity import HostView, first_tokens, routed_tokens
from model.view_tokens import Validity, features_validity, view_tokens, view_validity


class Teacher(Network):
    """A network that never gets a gradient (`make_teacher`); its weights follow the student's by EMA (`pipeline.ema`)."""

    @torch.no_grad()
    def teacher_forward(self, batch: Batch) -> TeacherScores:
        """The teacher's view of one micro-batch: v and the local views; of u only masks and geometry are used (its features only
        where they are the target of masked tokens)."""
        model, objective = self.model, self.objective
        views = [batch.v, *(batch.local if self.decoder else [])]
        needed = bool(self.head_of_group) or self.prediction.needs_teacher
        latent = bool(objective.masked_weight) and objective.masked_target == "teacher"
        views = views * needed + [batch.u] * latent
        seen = hide(model, objective, batch)
        fused_BM = fused_sensors(model, objective.modality_dropout, seen.u, batch.position_B)
        students = self.student_views(seen)
        first, host_BM = self._look([*students, batch.u, batch.v, *batch.local], fused_BM)
        features = self.features(views, [None] * len(views), known=[first[id(v)] for v in views]) if views else []
        whole_u = features.pop() if latent else None
        features, context = self._teacher_context(batch, features)
        valid_u = view_validity(model, seen.u, first[id(seen.u)].first)
        v = features[0] if features else None
        rows, pairings = self._pairs(batch, seen, valid_u, v, first) if self.spaces and v is not None else ({}, {})
        if self.decoder:
            rows["query"] = self._teacher_queries(batch, features, valid_u.fused)
        tokens_L = sum(routed_tokens(model, first[id(view)].first) for view in students)
        whole = view_validity(model, batch.u, first[id(batch.u)].first) if self.prediction.masked is not None else None
        known = [HostView(first[id(view)].first, host_BM if view is seen.u else None) for view in students]
        return TeacherScores(
            rows, pairings, self._classes(batch.u, valid_u.fused), to_device(np.asarray(tokens_L), batch.position_B.device),
            context, self.prediction.scores(batch, v, valid_u, whole, whole_u), Seen(seen.u, fused_BM, known),
        )  # fmt: skip

    def _look(self, views: list[View], fused_BM: Tensor | None) -> tuple[dict[int, HostView], np.ndarray | None]:
        """What the host has to know of these views, by `id`, and `fused_BM` on the host: the only wait of the teacher's pass."""
        distinct = {id(view): view for view in views}
        grids, more = first_tokens(self.model, list(distinct.values()), *([] if fused_BM is None else [fused_BM]))
        return {key: HostView(first) for key, first in zip(distinct, grids)}, more[0] if more else None

    def _pairs(
        self, batch: Batch, seen: Batch, valid_u: Validity, v: Features, first: Mapping[int, HostView]
    ) -> tuple[dict[str, Rows], dict[str, Pairing]]:
        """Teacher's rows of every group of MGCL, and which tokens each compares."""
        rows: dict[str, Rows] = {}
        pairings = {}
        valid_v, objective = features_validity(v), self.objective
        for name, view in self.contrasted(seen).items():
            valid = valid_u if name == "" else view_validity(self.model, view, first[id(view)].first)
            for space in self.spaces:
                tokens = view_tokens(self.model, view, space, valid)
                theirs = view_tokens(self.model, batch.v, space, valid_v, v)
                pairing, pooled = pair_views(
                    tokens, theirs, batch.position_B, objective.pixel_pairs, objective.object_clusters,
                    objective.sinkhorn_iterations,
                )  # fmt: skip
                pairings[space + name] = pairing
                for level in objective.mgcl_levels:
                    group = group_name(space, level, name != "")
                    y_Nd, valid_N = self.head(group).project(getattr(pooled, level)), pairing.valid(level)
                    former = rows.get(group)
                    if former is not None:  # several local views are one group
                        y_Nd, valid_N = torch.cat([former.y_Nd, y_Nd]), torch.cat([former.valid_N, valid_N])
                    rows[group] = Rows(y_Nd, valid_N)
        return rows, pairings

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
        prototypes = {name: head.prototypes.directions() for name, head in self.all_heads().items()}
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
        return [self.in_context(f, prototypes_BPF) for f in features], sums

    def _teacher_queries(self, batch: Batch, features: list[Features], valid_u_Bhw: Tensor) -> Rows:
        assert self.decoder is not None
        outputs = [self.decoder(f.fused, f.fused_valid) for f in features]
        y_Nd = self.head("query").project(qsacl.teacher_rows(outputs[0], outputs[1:]))
        seen = [f.fused_valid.flatten(1).any(1) for f in features]
        return Rows(y_Nd, qsacl.valid_rows(valid_u_Bhw.flatten(1).any(1), seen[0], seen[1:], self.objective.queries))

    def _classes(self, u: View, valid_Bhw: Tensor) -> Tensor | None:
        if (self.alignment is None and self.prediction.labels is None) or u.classes_BHW is None:
            return None
        return torch.where(valid_Bhw, token_classes(u.classes_BHW, (valid_Bhw.shape[1], valid_Bhw.shape[2])), IGNORE)


def make_teacher(student: Network) -> Teacher:
    """A copy of the student's network, with the same names, as a teacher."""
    teacher = Teacher.__new__(Teacher)
    teacher.__dict__.update(copy.deepcopy(student.__dict__))
    if teacher.context is not None and not hasattr(teacher.context, "prototypes_RPF"):
        teacher.context.own_prototypes(student.objective.geo_regions, student.objective.geo_prototypes)
    teacher.requires_grad_(False)
    return teacher.eval()
