"""Spread (ours, optional): fused features are pushed out of the directions that already hold most of the variance.

Contrastive targets may be met by few directions of feature space; small batches and short runs end there. With C the covariance of the
teacher's fused tokens over the whole step, scaled to trace F,

    L = mean_n  x̂_nᵀ C x̂_n,    x̂ = (x − μ) / |x − μ|  of the student's fused tokens;  μ, C constants from the teacher

is 1 when all directions hold the same variance and F when one holds all. As the teacher follows the student, its gradient is that of
½ tr C², the inverse of the participation ratio. Given μ and C it is a plain mean over tokens: exact for any split.

Legend: X tokens · F fused dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.sinkhorn import work_dtype


def moments(fused_XF: Tensor, valid_X: Tensor) -> Tensor:
    """[F + 1, F + 1] float64: Σ [x ‖ 1] [x ‖ 1]ᵀ over valid tokens; adds over micro-batches and ranks."""
    x_XF = torch.where(valid_X[:, None], fused_XF, 0).double()
    x_Xf = torch.cat([x_XF, valid_X[:, None].double()], dim=1)
    return x_Xf.T @ x_Xf


def directions(moments_ff: Tensor) -> tuple[Tensor, Tensor]:
    """(μ_F, C_FF) of the summed moments; C has trace F, or is zero if there is no variance."""
    count = moments_ff[-1, -1].clamp_min(1)
    mean_F = moments_ff[:-1, -1] / count
    covariance_FF = moments_ff[:-1, :-1] / count - mean_F[:, None] * mean_F[None, :]
    trace = covariance_FF.diagonal().sum()
    scaled_FF = torch.where(trace > 1e-12, covariance_FF * (len(mean_F) / trace.clamp_min(1e-12)), 0.0)
    return mean_F, scaled_FF


def spread_sum(fused_XF: Tensor, valid_X: Tensor, mean_F: Tensor, covariance_FF: Tensor) -> Tensor:
    """Σ over valid tokens of x̂ᵀ C x̂."""
    dtype = work_dtype(fused_XF)
    x_XF = torch.where(valid_X[:, None], fused_XF, 0).to(dtype) - mean_F.to(dtype)
    x_XF = F.normalize(x_XF, dim=-1)
    return torch.where(valid_X, ((x_XF @ covariance_FF.to(dtype)) * x_XF).sum(-1), 0.0).sum()
