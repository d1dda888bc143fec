"""MGCL, multi-granularity contrastive learning (arXiv 2507.13812): which features of u and v are compared.

For each modality and for the fused features, three granularities, summed; each averaged over space and dates:

- pixel: student token of u against the teacher's features of v at the same ground point, bilinear over v's valid tokens;
- object: Sinkhorn-Knopp clusters of one image. Clusters are found on the teacher's features at the paired positions, and the same
  weights pool the student's: object c of u and object c of v are the same ground, so nothing has to be matched (ours);
- image: means over all valid tokens of the two images, overlapping or not.

Dates pair by nearest day of year (`correspondence.match_dates`). Everything about *which* elements count comes from masks,
geometry and the teacher, so `pair_views` runs before the student does.

Legend: B sites · T dates of u · S dates of v · h, w token grid · L = h·w · P chosen positions · C clusters · D feature dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses.correspondence import Grid, bilinear_taps, choose_positions, locate, match_dates
from model.losses.sinkhorn import cluster_weights

LEVELS = ("pixel", "object", "image")
MIN_TAP_WEIGHT = 0.5  # a pair needs at least half of its bilinear weight on valid tokens of v


@dataclass(frozen=True)
class ViewTokens:
    """Tokens of one modality (or the fused ones, T = 1) of one view; `features` is None where only validity is known yet."""

    valid_BThw: Tensor
    doy_BT: Tensor
    grid: Grid
    features_BThwD: Tensor | None = None


@dataclass(frozen=True)
class Pairing:
    """What the teacher side decides for the student side; constants to autograd."""

    index_BTP: Tensor
    valid_BTP: Tensor
    object_BTPC: Tensor
    object_valid_BTC: Tensor
    image_valid_BT: Tensor

    def valid(self, level: str) -> Tensor:
        """Validity of the level's rows, flattened in the order of `Pooled`."""
        return {"pixel": self.valid_BTP, "object": self.object_valid_BTC, "image": self.image_valid_BT}[level].reshape(
            -1
        )


@dataclass(frozen=True)
class Pooled:
    """Features per level, rows flattened: pixel [B·T·P, D], object [B·T·C, D], image [B·T, D]."""

    pixel: Tensor
    object: Tensor
    image: Tensor


def pair_views(
    u: ViewTokens, v: ViewTokens, number_B: Tensor, positions: int, clusters: int, iterations: int = 3
) -> tuple[Pairing, Pooled]:
    """Pairs u's tokens with v's ground and pools the teacher's features of v accordingly.

    Args:
        u: without features; v: with the teacher's.
        number_B: sample numbers, keying the choice of positions.
        positions: at most so many pairs per image.
    """
    assert v.features_BThwD is not None
    present_u_BT, present_v_BS = u.valid_BThw.flatten(2).any(-1), v.valid_BThw.flatten(2).any(-1)
    date_BT, dated_BT = match_dates(u.doy_BT, present_u_BT, v.doy_BT, present_v_BS)
    token_BL2, inside_BL = locate(u.grid, v.grid)
    tap_BL4, weight_BL4 = bilinear_taps(token_BL2, v.grid.hw)

    B, T = date_BT.shape
    cells = v.grid.hw[0] * v.grid.hw[1]
    tap_BTL4 = date_BT[:, :, None, None] * cells + tap_BL4[:, None]  # into v's dates and tokens, flattened
    valid_v_BX = v.valid_BThw.reshape(B, -1)
    seen_BTL4 = torch.gather(valid_v_BX, 1, tap_BTL4.reshape(B, -1)).reshape(tap_BTL4.shape)
    weight_BTL4 = weight_BL4[:, None] * seen_BTL4
    total_BTL = weight_BTL4.sum(-1)
    valid_BTL = u.valid_BThw.flatten(2) & inside_BL[:, None] & dated_BT[..., None] & (total_BTL >= MIN_TAP_WEIGHT)

    index_BTP = choose_positions(valid_BTL, number_B, positions)
    valid_BTP = torch.gather(valid_BTL, 2, index_BTP)
    weight_BTL4 = weight_BTL4 / total_BTL.clamp_min(MIN_TAP_WEIGHT)[..., None]
    index_BTP4 = index_BTP[..., None].expand(*index_BTP.shape, 4)
    features_BThwD = torch.where(v.valid_BThw[..., None], v.features_BThwD, 0)
    pixel_BTPD = _gather_bilinear(
        features_BThwD, torch.gather(tap_BTL4, 2, index_BTP4), torch.gather(weight_BTL4, 2, index_BTP4)
    )

    P = index_BTP.shape[2]
    object_IPC = cluster_weights(pixel_BTPD.reshape(B * T, P, -1), valid_BTP.reshape(B * T, P), clusters, iterations)
    object_BTPC = object_IPC.reshape(B, T, P, clusters)
    image_v_BSD = _image_mean(features_BThwD, v.valid_BThw)
    image_BTD = torch.gather(image_v_BSD, 1, date_BT[..., None].expand(B, T, image_v_BSD.shape[-1]))
    pairing = Pairing(index_BTP, valid_BTP, object_BTPC, object_BTPC.sum(2) > 0.5, dated_BT)
    return pairing, _pool(pixel_BTPD, pairing, image_BTD)


def pool_student(u: ViewTokens, pairing: Pairing) -> Pooled:
    """The student's features of u at the rows `pairing` names; differentiable."""
    features_BThwD = u.features_BThwD
    assert features_BThwD is not None
    features_BThwD = torch.where(u.valid_BThw[..., None], features_BThwD, 0)
    index_BTPD = pairing.index_BTP[..., None].expand(*pairing.index_BTP.shape, features_BThwD.shape[-1])
    pixel_BTPD = torch.gather(features_BThwD.flatten(2, 3), 2, index_BTPD)
    return _pool(pixel_BTPD, pairing, _image_mean(features_BThwD, u.valid_BThw))


def _pool(pixel_BTPD: Tensor, pairing: Pairing, image_BTD: Tensor) -> Pooled:
    pixel_BTPD = torch.where(pairing.valid_BTP[..., None], pixel_BTPD, 0)
    object_BTCD = pairing.object_BTPC.transpose(2, 3).to(pixel_BTPD.dtype) @ pixel_BTPD
    dim = pixel_BTPD.shape[-1]
    return Pooled(pixel_BTPD.reshape(-1, dim), object_BTCD.reshape(-1, dim), image_BTD.reshape(-1, dim))


def _gather_bilinear(features_BThwD: Tensor, tap_BTP4: Tensor, weight_BTP4: Tensor) -> Tensor:
    """[B, T, P, D], summed in float32 at least: a weighted sum of four rows per place in one kernel, which keeps none of them."""
    rows_XD = features_BThwD.to(_sum_dtype(features_BThwD)).flatten(0, 3)
    sites, tokens = features_BThwD.shape[0], features_BThwD.shape[1:4].numel()
    first_B = torch.arange(0, sites * tokens, tokens, device=tap_BTP4.device)
    index_X4 = (tap_BTP4 + first_B[:, None, None, None]).flatten(0, 2)
    weight_X4 = weight_BTP4.to(rows_XD.dtype).flatten(0, 2)
    return F.embedding_bag(index_X4, rows_XD, mode="sum", per_sample_weights=weight_X4).unflatten(0, tap_BTP4.shape[:3])


def _image_mean(features_BThwD: Tensor, valid_BThw: Tensor) -> Tensor:
    """Mean over valid tokens (the others are zero) per image: [B, T, D]; 0 where an image has none."""
    valid_BThw1 = valid_BThw[..., None]
    total_BTD = features_BThwD.sum(dim=(2, 3), dtype=_sum_dtype(features_BThwD))
    return (total_BTD / valid_BThw1.sum(dim=(2, 3)).clamp_min(1)).to(features_BThwD.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
