"""What student and teacher have in common: SkySense with heads, query decoder and (optional) text alignment and geo-context; the
parameters of both, under the same names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.augment import photometric
from model.batch import Batch, View
from model.config import ModelConfig, ObjectiveConfig
from model.decoder import QueryDecoder
from model.geo_context import GeoContext
from model.heads import ProjectionHead
from model.inputs import normalise
from model.objective_plan import cross_heads, head_dims, head_of, uses_ita
from model.prediction import Prediction
from model.skysense import Features, SkySense
from model.text import TextAlignment, load_embeddings
from model.validity import HostView

log = logging.getLogger(__name__)

LOCAL = "/local"


class Network(nn.Module):
    """Modules of the objective. The teacher is a copy of the student's.

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
        for name, head in self.all_heads().items() if self.objective.centering_momentum else ():
            groups = [g for g, h in self.head_of_group.items() if h == name]
            self.register_buffer(f"scaling_{name}", torch.zeros(len(groups), head.prototypes.weight.shape[0]))

    def features(
        self, views: Sequence[View], seeds: Sequence[Tensor | None], fused_BM: Sequence[Tensor | None] | None = None,
        known: Sequence[HostView] | None = None,
    ) -> list[Features]:  # fmt: skip
        """SkySense's features of raw views, in one pass: photometric augmentation, normalisation, network.

        Per view: seeds decide drop-path in training, a function of samples, not of ranks; fused_BM: sensors that the fusion sees;
        known: what the host knows of the views already.
        """
        views = [normalise(photometric(view), self.statistics) for view in views]
        return self.skysense.views(views, seeds, fused_BM=fused_BM, known=known)

    def in_context(self, features: Features, prototypes_BPF: Tensor | None) -> Features:
        if self.context is None or prototypes_BPF is None:
            return features
        return replace(features, fused=self.context(features.fused, prototypes_BPF))

    def student_views(self, batch: Batch) -> list[View]:
        return [batch.u, *(batch.local if self.decoder is not None or self.objective.local_mgcl else [])]

    def contrasted(self, batch: Batch) -> dict[str, View]:
        """Student's views that MGCL compares with the teacher's v, by suffix of their pairings' names: u and, if asked, the local ones."""
        local = batch.local if self.objective.local_mgcl else []
        return {"": batch.u, **{f"{LOCAL}{j}": view for j, view in enumerate(local)}} if self.spaces else {}

    def all_heads(self) -> dict[str, ProjectionHead]:
        return {name: head for name, head in self.heads.items() if isinstance(head, ProjectionHead)}

    def head(self, group: str) -> ProjectionHead:
        return self.all_heads()[self.head_of_group[group]]


def group_name(space: str, level: str, local: bool) -> str:
    """Rows that are centred together: one space, one granularity, of u or of the local views."""
    return f"{space}/{level}{LOCAL if local else ''}"
