"""Which tokens are valid, from pixel validity alone: what the model computes on its way, available before it runs (the losses need the
number of pairs and of routed tokens of a whole step before the student's first forward).

Dimension legend: N images · B sites · T dates · H, W pixels · h, w tokens · K mixture-of-experts layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import View
from model.config import ModelConfig


def patch_validity(valid_NHW: Tensor, patch: int, min_valid: float) -> Tensor:
    """bool [N, ⌈H/P⌉, ⌈W/P⌉]: more than the share `min_valid` of the token's pixels is valid; padding never is."""
    pad = (0, -valid_NHW.shape[2] % patch, 0, -valid_NHW.shape[1] % patch)
    if any(pad):
        valid_NHW = F.pad(valid_NHW, pad)
    cells = valid_NHW.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    return cells.sum((2, 4)) > min_valid * patch**2


def merge_validity(valid_NHW: Tensor) -> Tensor:
    """bool [N, ⌈H/2⌉, ⌈W/2⌉]: any of the four is valid."""
    return patch_validity(valid_NHW, 2, 0.0)


def stage_validity(cfg: ModelConfig, modality: str, valid_NHW: Tensor) -> list[Tensor]:
    """Token validity of one modality in each of the four stages."""
    stages = [patch_validity(valid_NHW, cfg.patch, cfg.token_min_valid)]
    for merge in cfg.merges(modality):
        stages.append(merge_validity(stages[-1]) if merge else stages[-1])
    return stages


def dense_validity(cfg: ModelConfig, view: View) -> dict[str, Tensor]:
    """`Features.dense_valid` of a view, bool [B, T, h, w] per modality."""
    found = {}
    for name in cfg.modalities:
        valid_BTHW = view.modalities[name].valid_BTHW
        found[name] = stage_validity(cfg, name, valid_BTHW.flatten(0, 1))[3].unflatten(0, valid_BTHW.shape[:2])
    return found


def routed_tokens(cfg: ModelConfig, view: View) -> Tensor:
    """float32 [K]: tokens (prompts included) that each mixture-of-experts layer routes in this view, summed over modalities; in the
    order of `Features.moe`.
    """
    num_third = cfg.depths[2]
    per_modality = []
    for name in cfg.modalities:
        stages = stage_validity(cfg, name, view.modalities[name].valid_BTHW.flatten(0, 1))
        counts = [v.sum() + cfg.prompts * v.flatten(1).any(1).sum() for v in stages]
        layers = [counts[2] if i < num_third else counts[3] for i in sorted(cfg.moe.placed(sum(cfg.depths[2:])))]
        if layers:
            per_modality.append(torch.stack(layers).float())
    if not per_modality:
        return torch.zeros(0)
    return torch.cat(per_modality) if cfg.separate else torch.stack(per_modality).sum(0)
