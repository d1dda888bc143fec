"""Raw views to what the network takes: float32, normalised per band, zero where invalid.

Legend: B sites · T dates · C bands · H, W canvas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from model.batch import ModalityView, View

CLIP = 10.0  # standard deviations: one saturated pixel must not dominate a token (or leave bfloat16's useful range)
MIN_STD = 1e-6


def normalise(view: View, statistics: Mapping[str, Mapping[str, Any]]) -> View:
    """(x − mean) / std per band with the manifest's statistics over CLEAR pixels, clipped at ±10; 0 where invalid.

    s2 stays linear in reflectance and s1 in dB (no log or square root): the statistics then are those of what is stored. Invalid
    pixels may hold anything, NaN included. Deterministic; no parameters.

    Raises:
        UsageError: statistics lack a modality of the view or have another number of bands.
    """
    modalities = {name: _normalise(name, m, statistics) for name, m in view.modalities.items()}
    return replace(view, modalities=modalities)


def _normalise(name: str, m: ModalityView, statistics: Mapping[str, Mapping[str, Any]]) -> ModalityView:
    if name not in statistics:
        raise UsageError(
            f"the shard set's manifest has no statistics of {name}; rebuild it, or drop {name} from model.modalities"
        )
    mean, std = (
        _column(name, statistics[name][key], least, m.x_BTCHW.device)
        for key, least in (("mean", -math.inf), ("std", MIN_STD))
    )
    x_BTCHW = (m.x_BTCHW.float() - mean) / std
    x_BTCHW = torch.where(m.valid_BTHW[:, :, None], x_BTCHW.clamp(-CLIP, CLIP), 0.0)
    return replace(m, x_BTCHW=x_BTCHW)


def _column(name: str, values: Any, least: float, device: torch.device) -> Tensor:
    bands = MODALITIES[name].bands
    if len(values) != len(bands):
        raise UsageError(
            f"statistics of {name} have {len(values)} bands, the schema has {len(bands)} ({', '.join(bands)})"
        )
    return _constants(tuple(max(float(value), least) for value in values), device)


@functools.lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1] on the device; sent there once."""
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
