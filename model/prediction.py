"""Terms beside the paper's: the student predicts what other sensors, other tokens and the teacher say of its own site.

Which elements count follows from masks alone, so each term's number of elements in the whole step is known before the student
runs (`counts`), and the terms are means over the whole step by the convention of `model.losses.reduce`. Targets come from the
whole view u; the student saw what `model.hiding` left of it. Every term is off at weight 0 and has then no parameters.

Legend: B sites · S sites of the step · T dates · h, w tokens or fused cells · D feature dim · d projection dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig, ObjectiveConfig
from model.losses.ita import IGNORE
from model.losses.reduce import Reduce
from model.losses.sinkhorn import work_dtype
from model.losses.sites import gather_rows, koleo, site_cross_entropy
from model.restore import Restore, apply_head, mlp
from model.skysense import Features
from model.token_decoder import TokenDecoder
from model.view_tokens import Validity


@dataclass(frozen=True)
class PredictionScores:
    """The teacher's side of one micro-batch.

    Attributes:
        counts: elements of each term in this micro-batch, by name, float64.
        site_Bd: the teacher's projection of each site's fused features of v; None without the term.
        pooled: by space, the teacher's pooled features of v [B, D], for KoLeo.
        seen_B: the teacher's v has a valid fused token.
        latent: the teacher's features of the whole u per sensor [B, T, h, w, D], for that target of masked tokens.
        restored: which cells restoration counts, see `Restore.valid`. weights: what each token of the masked term counts.
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    site_Bd: Tensor | None = None
    pooled: dict[str, Tensor] = field(default_factory=dict)
    seen_B: Tensor | None = None
    latent: dict[str, Tensor] | None = None
    restored: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PredictionTargets:
    """`PredictionScores` of a whole step, as one micro-batch needs them. scale: W·A/N by term; rows: of all sites of the step;
    first: which of them is this micro-batch's first. own: its own scores."""

    scale: Mapping[str, Tensor]
    site_Sd: Tensor | None
    pooled: dict[str, Tensor]
    seen_S: Tensor | None
    first: int
    own: PredictionScores


class Prediction(nn.Module):
    """Heads of the terms that are on; see `ObjectiveConfig`."""

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.spaces = (*model.modalities, "fused")
        hidden = objective.predictor_hidden
        self.restore = Restore(model, hidden) if objective.restore_weight else None
        self.masked = TokenDecoder(model, objective) if objective.masked_weight else None
        self.site = nn.ModuleDict()
        if objective.site_weight:
            for space, dim in (("dense", model.dims[3]), ("fused", model.fusion_dim)):
                self.site[space] = mlp(dim, hidden, objective.head_bottleneck)
        self.labels = nn.Linear(model.fusion_dim, num_classes) if objective.labels_weight and num_classes else None

    @property
    def is_on(self) -> bool:
        """Whether any term is computed."""
        return self.needs_teacher or any(part is not None for part in (self.restore, self.masked, self.labels))

    @property
    def needs_teacher(self) -> bool:
        """Whether a term needs the teacher's features of v."""
        return bool(self.site) or self.objective.koleo_weight > 0

    # ---- teacher side

    def scores(
        self, batch: Batch, v: Features | None, valid_u: Validity, whole: Validity | None, whole_u: Features | None
    ) -> PredictionScores:
        """batch: as the reader gave it. v: the teacher's features. valid_u: of what the student sees. whole, whole_u: validity and
        the teacher's features of the whole u, for masked tokens."""
        counts: dict[str, Tensor] = {}
        site_Bd, pooled, seen_B = None, {}, None
        restored: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        if self.restore is not None:
            restored = self.restore.valid(batch.u, valid_u.dense, valid_u.fused)
            counts.update({f"restore/{pair}": ok.sum(dtype=torch.float64) for pair, ok in restored.items()})
        if self.masked is not None:
            assert whole is not None
            weights = self.token_weights(whole, valid_u)
            counts.update({f"masked/{name}": w.sum(dtype=torch.float64) for name, w in weights.items()})
        if self.site or self.objective.koleo_weight:
            assert v is not None
            seen_B = v.fused_valid.flatten(1).any(1)
            if self.site:
                site_Bd = _lifted(self._project("fused", self._pooled(v, "fused")))
            if self.objective.koleo_weight:
                pooled = {space: _lifted(self._pooled(v, space)) for space in self.spaces}
            for space, ok_B in self.sites_valid(valid_u, seen_B).items():
                counts[f"site/{space}"] = ok_B.sum(dtype=torch.float64)
        latent = None if whole_u is None else {name: whole_u.dense[name] for name in self.model.modalities}
        return PredictionScores(counts, site_Bd, pooled, seen_B, latent, restored, weights)

    def token_weights(self, whole: Validity, valid_u: Validity) -> dict[str, Tensor]:
        """[B, T, h, w] per sensor: 1 where the student's token is hidden, `masked_visible` where it is not, 0 if there is none."""
        visible = self.objective.masked_visible
        return {
            name: whole.dense[name] * torch.where(valid_u.dense[name], visible, 1.0) for name in self.model.modalities
        }

    def sites_valid(self, valid_u: Validity, seen_B: Tensor) -> dict[str, Tensor]:
        """bool [B] per space: the student has a token of it, and the teacher saw the site."""
        own = {name: valid_u.dense[name].flatten(1).any(1) for name in self.model.modalities}
        return {space: ok_B & seen_B for space, ok_B in {**own, "fused": valid_u.fused.flatten(1).any(1)}.items()}

    # ---- student side

    def forward(
        self, whole: Batch, u: Features, valid_u: Validity, targets: PredictionTargets,
        classes: tuple[Tensor | None, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """(loss, metrics) of one micro-batch.

        Args:
            whole: the batch with nothing hidden and u normalised. u: the student's features of what it saw; valid_u: its tokens.
            classes: class of each fused token of u (−1: none), and W·A / number of labelled ones.
        """
        objective, metrics = self.objective, {}
        loss = u.fused.new_zeros((), dtype=work_dtype(u.fused))
        if self.restore is not None:
            scale = _of(targets.scale, "restore/")
            for source, term in self.restore(whole.u, u, targets.own.restored, scale).items():
                loss = loss + objective.restore_weight * term
                metrics[f"loss/restore_{source}"] = term.detach()
        if self.masked is not None:
            scale = _of(targets.scale, "masked/")
            found = self.masked(whole.u, u, targets.own.weights, scale, targets.own.latent)
            for name, term in found.items():
                loss = loss + objective.masked_weight * term
                metrics[f"loss/masked_{name}"] = term.detach()
        if self.labels is not None:
            class_N, of_labels = classes
            if class_N is None:
                class_N = torch.full(u.fused.shape[:3], IGNORE, dtype=torch.int64, device=u.fused.device)
            logits_NC = self.labels(torch.where(u.fused_valid[..., None], u.fused, 0).flatten(0, 2))
            term = nn.functional.cross_entropy(
                logits_NC.to(work_dtype(logits_NC)), class_N.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            term = term * of_labels.to(term.dtype)
            loss, metrics["loss/labels"] = loss + objective.labels_weight * term, term.detach()
        return self._tell_apart(u, valid_u, targets, loss, metrics), metrics

    def _tell_apart(
        self, u: Features, valid_u: Validity, targets: PredictionTargets, loss: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Site contrast and KoLeo."""
        if targets.seen_S is None:
            return loss
        number = u.fused.shape[0]
        own_B = torch.arange(targets.first, targets.first + number, device=u.fused.device)
        usable = self.sites_valid(valid_u, targets.seen_S[own_B] > 0)
        for space in self.spaces:
            weight_B = usable[space] * targets.scale[f"site/{space}"]
            x_BD = self._pooled(u, space)
            for key, strength, row_B in self._rows(space, x_BD, targets, own_B):
                term = torch.where(weight_B > 0, row_B * weight_B.to(row_B.dtype), 0).sum()
                loss, metrics[f"loss/{key}_{space}"] = loss + strength * term, term.detach()
        return loss

    def _rows(
        self, space: str, x_BD: Tensor, targets: PredictionTargets, own_B: Tensor
    ) -> list[tuple[str, float, Tensor]]:
        objective, found = self.objective, []
        assert targets.seen_S is not None
        seen_S = targets.seen_S > 0
        if targets.site_Sd is not None:
            z_Bd = self._project("fused" if space == "fused" else "dense", x_BD)
            ce_B = site_cross_entropy(z_Bd, targets.site_Sd, seen_S, own_B, objective.site_temperature)
            found.append(("site", objective.site_weight, ce_B))
        if objective.koleo_weight:
            found.append(("koleo", objective.koleo_weight, koleo(x_BD, targets.pooled[space], seen_S, own_B)))
        return found

    def _pooled(self, features: Features, space: str) -> Tensor:
        if space == "fused":
            return _mean(features.fused[:, None], features.fused_valid[:, None])
        return _mean(features.dense[space], features.dense_valid[space])

    def _project(self, space: str, x_BD: Tensor) -> Tensor:
        return apply_head(self.site[space], x_BD)


def gather(scores: list[PredictionScores], scale: Mapping[str, Tensor], reduce: Reduce) -> list[PredictionTargets]:
    """Targets of every micro-batch from all micro-batches on all ranks. Collectives: one per kind of row that is on."""
    if scores[0].seen_B is None:
        return [PredictionTargets(scale, None, {}, None, 0, s) for s in scores]
    seen_S, first = gather_rows([s.seen_B.float() for s in scores if s.seen_B is not None], reduce)
    site_Sd = None
    if scores[0].site_Bd is not None:
        site_Sd, _ = gather_rows([s.site_Bd for s in scores if s.site_Bd is not None], reduce)
    pooled = {space: gather_rows([s.pooled[space] for s in scores], reduce)[0] for space in scores[0].pooled}
    return [PredictionTargets(scale, site_Sd, pooled, seen_S, f, s) for s, f in zip(scores, first)]


def _mean(x_BThwD: Tensor, ok_BThw: Tensor) -> Tensor:
    weight = ok_BThw[..., None]
    total_BD = torch.where(weight, x_BThwD, 0).flatten(1, 3).sum(1)
    return total_BD / weight.flatten(1, 3).sum(1).clamp_min(1).to(x_BThwD.dtype)


def _lifted(x: Tensor) -> Tensor:
    return x.to(work_dtype(x))


def _of(scale: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in scale.items() if name.startswith(prefix)}
