"""Raw views to what the network takes: float32, normalised per band, zero where invalid; and token validity from masks.

Legend: B sites · T dates · C bands · H, W canvas · h, w tokens · y, x fused cells · L layers with experts · M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from model.batch import ModalityView, View
from model.config import ModelConfig
from model.fusion import cell_under

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
    mean, std = (_column(name, statistics[name][key], m.x_BTCHW.device) for key in ("mean", "std"))
    x_BTCHW = (m.x_BTCHW.float() - mean) / std.clamp_min(MIN_STD)
    x_BTCHW = torch.where(m.valid_BTHW[:, :, None], x_BTCHW.clamp(-CLIP, CLIP), 0.0)
    return replace(m, x_BTCHW=x_BTCHW)


def _column(name: str, values: Any, device: torch.device) -> Tensor:
    bands = MODALITIES[name].bands
    if len(values) != len(bands):
        raise UsageError(
            f"statistics of {name} have {len(values)} bands, the schema has {len(bands)} ({', '.join(bands)})"
        )
    return torch.tensor(list(values), dtype=torch.float32).to(device)[:, None, None]


@dataclass(frozen=True)
class Validity:
    """Which tokens of a view will be valid, known before the network runs (the normalisers of a whole step come first).

    Attributes:
        dense: final-stage tokens by modality, [B, T, h, w]; the same as `Features.dense_valid`.
        fused: [B, y, x], as `Features.fused_valid`; fused_like: the modality whose token grid it is.
        routed_LM: tokens that each layer with experts will see, prompts included.
    """

    dense: dict[str, Tensor]
    fused: Tensor
    fused_like: str
    routed_LM: Tensor


def view_validity(view: View, model: ModelConfig) -> Validity:
    """Token validity from the masks alone, by the rules of tokenizer, merging, prompts and fusion."""
    stages = {name: token_validity(m.valid_BTHW, name, model) for name, m in view.modalities.items()}
    dense = {name: by_stage[4] for name, by_stage in stages.items()}
    leader = max(dense, key=lambda name: dense[name].shape[2] * dense[name].shape[3])
    placed = [_on_grid(name, leader, dense, view, model) for name in dense]
    fused = torch.stack([valid.any(1) for valid in placed]).any(0)
    return Validity(dense, fused, leader, _routed(stages, model))


def token_validity(valid_BTHW: Tensor, modality: str, model: ModelConfig) -> dict[int, Tensor]:
    """Valid tokens after stages 3 and 4, [B, T, h, w].

    A token is valid if more than `token_min_valid` of its pixels are; a merged one if any of its four is.
    """
    P = model.patch
    cells = _pad(valid_BTHW, P).unflatten(2, (-1, P)).unflatten(4, (-1, P))
    valid = cells.sum((3, 5)) > model.token_min_valid * P * P
    stages: dict[int, Tensor] = {}
    for stage, merge in zip((2, 3, 4), model.merges(modality)):
        if merge:
            valid = _pad(valid, 2).unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).any(5).any(3)
        stages[stage] = valid
    return {3: stages[3], 4: stages[4]}


def router_layers(model: ModelConfig) -> list[tuple[int, str | None]]:
    """(stage, its modality or None for all) of every layer with experts, in the order of `Features.moe`."""
    placed = sorted(model.moe.placed(model.depths[2] + model.depths[3]))
    stages = [3 if block < model.depths[2] else 4 for block in placed]
    if not model.separate:
        return [(stage, None) for stage in stages]
    return [(stage, name) for name in model.modalities for stage in stages]


def _routed(stages: dict[str, dict[int, Tensor]], model: ModelConfig) -> Tensor:
    """Valid tokens, and the prompts of images that have any, per layer and modality: int64 [L, M]."""
    count = {
        (name, stage): valid.sum() + valid.flatten(2).any(-1).sum() * model.prompts
        for name, by_stage in stages.items()
        for stage, valid in by_stage.items()
    }
    zero = torch.zeros((), dtype=torch.int64, device=next(iter(count.values())).device)
    rows = [
        torch.stack([count[name, stage] if only in (None, name) else zero for name in stages])
        for stage, only in router_layers(model)
    ]
    return torch.stack(rows) if rows else zero.new_zeros(0, len(stages))


def _on_grid(name: str, leader: str, dense: dict[str, Tensor], view: View, model: ModelConfig) -> Tensor:
    """Validity of one modality on the fused grid [B, T, y, x]: of the token under each cell's centre."""
    r, valid = model.upscale(name), dense[name]
    valid = valid.repeat_interleave(r, 2).repeat_interleave(r, 3)
    for axis in (2, 3):
        canvas, lead_canvas = (view.modalities[m].valid_BTHW.shape[axis] for m in (name, leader))
        cells = cell_under(dense[leader].shape[axis], model.stride(leader), lead_canvas, r, model.stride(name), canvas)
        valid = valid.index_select(axis, torch.tensor(cells, device=valid.device))
    return valid


def _pad(valid: Tensor, multiple: int) -> Tensor:
    return F.pad(valid, (0, -valid.shape[-1] % multiple, 0, -valid.shape[-2] % multiple))
