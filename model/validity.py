"""Which tokens are valid, from pixel validity alone: what the model computes on its way, available before it runs (the losses need the
number of pairs and of routed tokens of a whole step before the student's first forward). The device says which first-stage tokens are
valid, once per step for all views; everything after that is the host's arithmetic.

Dimension legend: N images · B sites · T dates · H, W pixels · h, w tokens · K mixture-of-experts layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import View
from model.config import ModelConfig
from model.plan import stage_grids

Grids = dict[str, np.ndarray]  # by sensor


class HostView(NamedTuple):
    """What the host knows of a view: `first_tokens`, and which sensors the fusion of a site sees, bool [B, M] (None: all)."""

    first: Grids
    fused_BM: np.ndarray | None = None


def patch_validity(valid_NHW: Tensor, patch: int, min_valid: float) -> Tensor:
    """bool [N, ⌈H/P⌉, ⌈W/P⌉]: more than the share `min_valid` of the token's pixels is valid; padding never is."""
    pad = (0, -valid_NHW.shape[2] % patch, 0, -valid_NHW.shape[1] % patch)
    if any(pad):
        valid_NHW = F.pad(valid_NHW, pad)
    cells = valid_NHW.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    return cells.sum((2, 4)) > min_valid * patch**2


def on_host(masks: Sequence[Tensor]) -> list[np.ndarray]:
    """Masks of any shapes as host arrays; the host waits for the device once. On `meta` everything is valid."""
    flat = torch.cat([mask.flatten() for mask in masks])
    host = np.ones(flat.shape, bool) if flat.is_meta else flat.cpu().numpy()
    ends = np.cumsum([mask.numel() for mask in masks])[:-1]
    return [part.reshape(mask.shape) for part, mask in zip(np.split(host, ends), masks)]


def first_tokens(cfg: ModelConfig, views: Sequence[View], *more: Tensor) -> tuple[list[Grids], list[np.ndarray]]:
    """Validity of first-stage tokens in several views, bool [B, T, h, w] per sensor, and `more` masks; one wait for all of them."""
    masks = []
    for view in views:
        for name in cfg.modalities:
            valid_BTHW = view.modalities[name].valid_BTHW
            token_Nhw = patch_validity(valid_BTHW.flatten(0, 1), cfg.patch, cfg.token_min_valid)
            masks.append(token_Nhw.unflatten(0, valid_BTHW.shape[:2]))
    hosts = on_host([*masks, *more])
    grids = iter(hosts[: len(masks)])
    return [{name: next(grids) for name in cfg.modalities} for _ in views], hosts[len(masks) :]


def final_tokens(cfg: ModelConfig, first: Grids) -> Grids:
    """`Features.dense_valid` on the host, from first-stage tokens."""
    return {name: stages_of(cfg, name, valid_BThw)[3] for name, valid_BThw in first.items()}


def stages_of(cfg: ModelConfig, name: str, first_BThw: np.ndarray) -> list[np.ndarray]:
    """Validity of one sensor's tokens in each of the four stages, [B, T, h, w]."""
    layout = first_BThw.shape[:2]
    grids = stage_grids(first_BThw.reshape(-1, *first_BThw.shape[2:]), cfg.merges(name))
    return [grid.reshape(*layout, *grid.shape[1:]) for grid in grids]


def routed_tokens(cfg: ModelConfig, first: Grids) -> np.ndarray:
    """float64 [K]: tokens (prompts included) that each mixture-of-experts layer routes in this view, summed over modalities; in the
    order of `Features.moe`.
    """
    layers = sorted(cfg.moe.placed(sum(cfg.depths[2:])))
    counts_MK = np.zeros((len(first), len(layers)))
    for row_K, (name, valid_BThw) in zip(counts_MK, first.items()):
        third, last = (v.sum() + cfg.prompts * v.any((2, 3)).sum() for v in stages_of(cfg, name, valid_BThw)[2:])
        row_K[:] = [third if i < cfg.depths[2] else last for i in layers]
    return counts_MK.reshape(-1) if cfg.separate else counts_MK.sum(0)
