"""Tokens of a view as the losses see them: validity, dates and place on the ground, with or without features.

A *space* is a modality, or "fused". Legend: B sites · T dates · h, w tokens · D feature dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import View
from model.config import ModelConfig
from model.fusion import fused_tokens
from model.losses.correspondence import Grid
from model.losses.mgcl import ViewTokens
from model.rows import to_device
from model.skysense import Features
from model.validity import Grids, final_tokens


class Validity(NamedTuple):
    """Which tokens will be valid, from the masks alone. fused_like: the modality whose token grid the fused one is."""

    dense: dict[str, Tensor]
    fused: Tensor
    fused_like: str


def view_validity(model: ModelConfig, view: View, first: Grids) -> Validity:
    """first: validity of the view's first-stage tokens on the host (`model.validity.first_tokens`)."""
    final, device = final_tokens(model, first), view.side_m_B.device
    fused, fused_like = fused_tokens(model, view, final)
    dense = {name: to_device(valid_BThw, device) for name, valid_BThw in final.items()}
    return Validity(dense, to_device(fused, device), fused_like)


def features_validity(features: Features) -> Validity:
    """The same of a view that has been through the network."""
    return Validity(features.dense_valid, features.fused_valid, features.fused_like)


def view_tokens(
    model: ModelConfig, view: View, space: str, validity: Validity, features: Features | None = None
) -> ViewTokens:
    """Tokens of one space; the fused ones are one date (of unknown day) on their leader's grid."""
    is_fused = space == "fused"
    name = validity.fused_like if is_fused else space
    m, stride = view.modalities[name], float(model.stride(name))
    valid_BThw = validity.fused[:, None] if is_fused else validity.dense[name]
    doy_BT = torch.zeros_like(m.doy_BT[:, :1]) if is_fused else m.doy_BT
    affine_B23 = view_affine(view, name) if is_fused else m.affine_B23
    canvas = (m.valid_BTHW.shape[2], m.valid_BTHW.shape[3])
    grid = Grid(affine_B23, (valid_BThw.shape[2], valid_BThw.shape[3]), (stride, stride), canvas)
    if features is None:
        return ViewTokens(valid_BThw, doy_BT, grid)
    return ViewTokens(valid_BThw, doy_BT, grid, features.fused[:, None] if is_fused else features.dense[name])


def view_affine(view: View, name: str) -> Tensor:
    """Canvas pixel of modality `name` → site metres, [B, 2, 3], also at sites that lack the modality (affine all zero).

    All modalities of a view show the same ground square, so another one's map serves after scaling to this canvas.
    """
    height, width = view.modalities[name].valid_BTHW.shape[2:]
    affine_B23 = view.modalities[name].affine_B23.to(torch.float64)
    for other in view.modalities.values():
        if other is view.modalities[name]:
            continue
        x_B2, y_B2, shift_B2 = other.affine_B23.to(torch.float64).unbind(-1)
        columns, rows = other.valid_BTHW.shape[3] / width, other.valid_BTHW.shape[2] / height
        scaled_B23 = torch.stack([x_B2 * columns, y_B2 * rows, shift_B2], -1)
        known_B = (affine_B23[:, :, :2] != 0).flatten(1).any(1)
        affine_B23 = torch.where(known_B[:, None, None], affine_B23, scaled_B23)
    return affine_B23
