"""Drop-path (stochastic depth, arXiv 1603.09382) whose draws belong to the sample, not to the process.

Each draw is a hash of (image seed, layer, branch). The image seed comes from the sample's seed, modality and date. So the same
sample is dropped in the same layers whatever rank, micro-batch or place in the batch it has, recomputation under
activation checkpointing repeats it, and no generator state has to be saved.

Dimension legend: B sites · N images · T rows · K branches of a block · X layers times branches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from model.rows import to_device

_LOW32 = 0xFFFFFFFF
Integers = TypeVar("Integers", Tensor, np.ndarray)


def mix(value: Integers, salt: int | Integers) -> Integers:
    """A 32-bit hash (two multiply-xorshift rounds, as in MurmurHash3's finaliser) of int64 values and a salt."""
    x = (value ^ (salt * 0x9E3779B1 & _LOW32)) & _LOW32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW32
    return x ^ (x >> 16)


def image_seeds(seed_N: Tensor, modality_N: np.ndarray, date_N: np.ndarray) -> Tensor:
    """int64 [N] of images, from the seed of each one's site, its modality and its date. What the host knows it hashes."""
    device, salt = seed_N.device, modality_N.astype(np.int64) + 1
    salt_2N = to_device(np.stack([salt, np.full_like(salt, 0x51)]), device)
    mixed_N = to_device(mix(date_N.astype(np.int64), 0x77), device)
    low_N, high_N = mix(torch.stack([seed_N, seed_N >> 32]) & _LOW32, salt_2N)
    return mix(low_N ^ high_N ^ mixed_N, 0x1F)


def keep_factors(seed_N: Tensor, rates: Sequence[float], branches: int = 2) -> Tensor:
    """float32 [layers, K, N]: 0 with probability `rates[layer]`, otherwise 1 / (1 - rate). The whole step's draws in one table."""
    salts_X = torch.arange(1, len(rates) * branches + 1, device=seed_N.device)
    draw_XN = mix(mix(seed_N[None], salts_X[:, None]), 0xA5).to(torch.float64) / 2.0**32
    rate_L11 = _rates(tuple(rates), seed_N.device)
    return ((draw_XN.unflatten(0, (-1, branches)) >= rate_L11) / (1.0 - rate_L11)).float()


@functools.lru_cache(maxsize=16)
def _rates(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """[layers, 1, 1] on the device; sent there once."""
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        return torch.tensor(rates, dtype=torch.float64, device=device)[:, None, None]


def drop(x_TD: Tensor, keep_KT: Tensor | None, branch: int) -> Tensor:
    """Multiplies every row of a branch by its image's factor; None: unchanged."""
    return x_TD if keep_KT is None else x_TD * keep_KT[branch, :, None].to(x_TD.dtype)
