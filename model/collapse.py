"""Collapse diagnostics: is the network still saying different things about different places?

Legend: N rows · D feature dim · K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 256
USAGE_WINDOW = 100  # steps


@torch.no_grad()
def effective_rank(x_ND: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred rows (Roy & Vetterli 2007; RankMe, 2210.02885).

    Between 1 (all rows on a line) and min(N − 1, D); 0 if there are fewer than two rows or no spread; NaN for non-finite
    features. Scale-free.
    """
    if x_ND.shape[0] < 2:
        return x_ND.new_zeros((), dtype=torch.float32)
    if not torch.isfinite(x_ND).all():  # the eigenvalue solver would raise; the engine reports what is not finite
        return x_ND.new_full((), float("nan"), dtype=torch.float32)
    x_ND = x_ND.float() - x_ND.float().mean(dim=0)
    x_ND = x_ND / x_ND.abs().max().clamp_min(1e-30)
    gram = x_ND @ x_ND.T if x_ND.shape[0] <= x_ND.shape[1] else x_ND.T @ x_ND
    singular = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    rank = torch.exp(torch.special.entr(share).sum())
    return torch.where(singular.sum() > 1e-12, rank, 0.0).float()


@torch.no_grad()
def feature_metrics(features_XD: Tensor, valid_X: Tensor) -> dict[str, Tensor]:
    """`feature/effective_rank` and `feature/std` (mean over channels of the std over rows) of at most 256 valid rows,
    evenly spaced; of this rank's micro-batch (so a mean over ranks, not exact for the global batch)."""
    rows = valid_X.flatten().nonzero()[:, 0]
    rows = rows[torch.linspace(0, max(len(rows) - 1, 0), min(len(rows), MAX_ROWS), device=rows.device).round().long()]
    x_ND = features_XD.flatten(0, -2)[rows].float()
    spread = x_ND.std(dim=0, correction=0).mean() if len(rows) else x_ND.new_zeros(())
    return {"feature/effective_rank": effective_rank(x_ND), "feature/std": spread}


@torch.no_grad()
def update_age(age_K: Tensor, hit_K: Tensor) -> Tensor:
    """Steps since each prototype was last some valid row's best match; in place, returns the share used within the window."""
    age_K.copy_(torch.where(hit_K, 0, age_K + 1))
    return (age_K < USAGE_WINDOW).float().mean()
