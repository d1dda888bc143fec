"""Drop-path (stochastic depth, arXiv 1603.09382) whose draws belong to the sample, not to the process.

Each draw is a hash of (image seed, layer, branch). The image seed comes from the sample's seed, modality and date. So the same
sample is dropped in the same layers whatever rank, micro-batch or place in the batch it has, recomputation under
activation checkpointing repeats it, and no generator state has to be saved.

Dimension legend: B sites · N images · K branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF


def mix(value: Tensor, salt: int) -> Tensor:
    """A 32-bit hash (two multiply-xorshift rounds, as in MurmurHash3's finaliser) of int64 values and a salt."""
    x = (value ^ (salt * 0x9E3779B1 & _LOW32)) & _LOW32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW32
    return x ^ (x >> 16)


def image_seeds(seed_B: Tensor, modality: int, num_dates: int) -> Tensor:
    """int64 [B, T] from the sites' seeds: one per date of one modality."""
    folded_B = mix(seed_B & _LOW32, modality + 1) ^ mix((seed_B >> 32) & _LOW32, 0x51)
    dates_T = torch.arange(num_dates, device=seed_B.device, dtype=torch.int64)
    return mix(folded_B[:, None] ^ mix(dates_T, 0x77), 0x1F)


def keep_factors(seed_N: Tensor, layer: int, rate: float, branches: int = 2) -> Tensor:
    """float32 [N, K]: 0 with probability `rate`, otherwise 1 / (1 - rate)."""
    columns = [mix(mix(seed_N, layer * branches + k + 1), 0xA5) for k in range(branches)]
    uniform_NK = torch.stack(columns, dim=1).to(torch.float64) / 2.0**32
    return (uniform_NK >= rate).to(torch.float32) / (1.0 - rate)


def drop(x: Tensor, keep_N2: Tensor | None, branch: int) -> Tensor:
    """Multiplies each image's branch output by its factor; None: unchanged."""
    if keep_N2 is None:
        return x
    return x * keep_N2[:, branch].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
