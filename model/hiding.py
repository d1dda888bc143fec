"""What the student does not see of its view: tokens, dates and whole sensors, hidden by making their pixels invalid.

Hidden is missing: the same masks that keep clouds out of the network keep hidden ground out, in the backbone, the fusion, the
pairs of MGCL and every count. Draws are hashes of (sample number, sensor, date or place), so they do not depend on rank,
micro-batch or device, and nothing has to be saved.

Legend: B sites · M sensors · T dates · H, W pixels · h, w tokens · X draws per site.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.batch import Batch, View
from model.config import ModelConfig, ObjectiveConfig
from model.droppath import mix

# one salt per kind of draw
TOKENS, DATES, SENSORS, FUSION = 11, 12, 13, 14


def uniforms(position_B: Tensor, salt: int, count: int) -> Tensor:
    """float64 [B, X] in [0, 1): a function of sample number, salt and place alone."""
    number_B1 = mix(position_B.to(torch.int64), salt)[:, None]
    place_X = torch.arange(count, device=position_B.device, dtype=torch.int64)
    return mix(number_B1 ^ mix(place_X, salt + 0x100), salt + 0x200).double() / 2.0**32


def hide(model: ModelConfig, objective: ObjectiveConfig, batch: Batch) -> Batch:
    """The batch as the student sees it: u with less valid pixels. Nothing to hide: the batch itself.

    A site of which nothing would be left keeps everything. At least one date of a series, and one sensor of a site, of those
    that are there, stays.
    """
    return replace(batch, u=hide_view(model, objective, batch.u, batch.position_B)) if objective.hides else batch


def hide_view(model: ModelConfig, objective: ObjectiveConfig, view: View, position_B: Tensor) -> View:
    """`hide` of one view."""
    shown = {}
    for m, name in enumerate(model.modalities):
        valid_BTHW = view.modalities[name].valid_BTHW
        B, T, H, W = valid_BTHW.shape
        keep_BTHW = torch.ones_like(valid_BTHW)
        if objective.hide_dates and T > 1:
            draw_BT = uniforms(position_B, DATES + 16 * m, T)
            keep_BTHW = (
                keep_BTHW & keep_some(draw_BT, valid_BTHW.flatten(2).any(2), objective.hide_dates)[..., None, None]
            )
        if objective.hide_tokens:
            stride = model.stride(name)
            h, w = -(-H // stride), -(-W // stride)
            keep_Bhw = (uniforms(position_B, TOKENS + 16 * m, h * w) >= objective.hide_tokens).reshape(B, h, w)
            keep_BHW = keep_Bhw.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, :H, :W]
            keep_BTHW = keep_BTHW & keep_BHW[:, None]
        shown[name] = valid_BTHW & keep_BTHW
    if objective.hide_sensors:
        there_BM = torch.stack([valid.flatten(1).any(1) for valid in shown.values()], 1)
        draw_BM = uniforms(position_B, SENSORS, there_BM.shape[1])
        keep_BM = keep_some(draw_BM, there_BM, objective.hide_sensors)
        shown = {name: valid & keep_BM[:, m, None, None, None] for m, (name, valid) in enumerate(shown.items())}
    left_B = torch.stack([valid.flatten(1).any(1) for valid in shown.values()], 1).any(1)
    parts = {
        name: replace(part, valid_BTHW=torch.where(left_B[:, None, None, None], shown[name], part.valid_BTHW))
        for name, part in view.modalities.items()
    }
    return replace(view, modalities=parts)


def fused_sensors(model: ModelConfig, rate: float, view: View, position_B: Tensor) -> Tensor | None:
    """bool [B, M]: which sensors the student's fusion sees (`modality_dropout`); None: all of them."""
    if not rate:
        return None
    there_BM = torch.stack([view.modalities[m].valid_BTHW.flatten(1).any(1) for m in model.modalities], 1)
    return keep_some(uniforms(position_B, FUSION, there_BM.shape[1]), there_BM, rate)


def keep_some(draw_BX: Tensor, there_BX: Tensor, rate: float) -> Tensor:
    """bool [B, X]: true with probability 1 − rate; of what is there, the one with the largest draw always stays."""
    best_B1 = torch.where(there_BX, draw_BX, -1.0).argmax(1, keepdim=True)
    return (draw_BX >= rate).scatter(1, best_B1, True)
