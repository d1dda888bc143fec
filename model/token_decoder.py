"""Masked tokens: every token of every sensor of the whole view, read out of the fused features of what the student saw.

A query says which sensor, which day of the year and which place; it looks at the fused cell under it and attends to all others.
What the student did not see (`model.hiding`) it can only infer: from other sensors, other dates, other places.

Targets, by `objective.masked_target`: *pixels*: means (and, where a block has several pixels, deviations) of BLOCKS x BLOCKS
blocks of the token's normalised pixels; *projection*: those pixels through a frozen random matrix (as OlmoEarth and Galileo use a
frozen random tokenizer: a target that cannot collapse); *teacher*: the teacher's final features of the token. All but pixels are
layer-normalised.

Legend: B sites · T dates · h, w tokens · N = T·h·w tokens of one sensor · P stride · C bands · F fused dim · X hidden dim · Q target dim.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.batch import ModalityView, View
from model.config import ModelConfig, ObjectiveConfig
from model.decoder import Attention
from model.losses.sinkhorn import work_dtype
from model.objective_plan import BLOCKS, DAY_WAVES, DECODER_HEADS, PLACE_WAVES, PROJECTION_DIM, masked_targets
from model.restore import VARIANCE_FLOOR
from model.skysense import Features


def patches(part: ModalityView, stride: int) -> tuple[Tensor, Tensor]:
    """Pixels of each token: x [B, T, h, w, C, P, P], 0 where invalid, and validity [B, T, h, w, P, P]; padding is invalid."""
    height, width = part.valid_BTHW.shape[2:]
    pad = (0, -width % stride, 0, -height % stride)
    valid = F.pad(part.valid_BTHW, pad)
    x = F.pad(torch.where(part.valid_BTHW[:, :, None], part.x_BTCHW, 0), pad)
    x = x.unflatten(3, (-1, stride)).unflatten(5, (-1, stride)).permute(0, 1, 3, 5, 2, 4, 6)
    return x, valid.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).permute(0, 1, 2, 4, 3, 5)


def pixel_targets(part: ModalityView, stride: int) -> tuple[Tensor, Tensor]:
    """(y [B, T, h, w, Q], ok [B, T, h, w, Q]): block means, then block deviations where a block has several pixels."""
    x, valid = patches(part, stride)
    side = stride // BLOCKS if stride % BLOCKS == 0 else stride
    x = x.unflatten(5, (-1, side)).unflatten(7, (-1, side))  # …, C, blocks, side, blocks, side
    weight = valid[..., None, :, :].unflatten(5, (-1, side)).unflatten(7, (-1, side)).to(x.dtype)
    count = weight.sum((6, 8))
    mean = (x * weight).sum((6, 8)) / count.clamp_min(1)
    ok = (count > 0).expand_as(mean)
    parts, oks = [mean], [ok]
    if side > 1:
        spread = (x.square() * weight).sum((6, 8)) / count.clamp_min(1) - mean.square()
        parts.append(spread.clamp_min(0).add(VARIANCE_FLOOR).sqrt())
        oks.append(ok)
    return torch.cat([p.flatten(4) for p in parts], -1), torch.cat([o.flatten(4) for o in oks], -1)


def waves(x: Tensor, count: int) -> Tensor:
    """sin and cos of 2π·k·x for k = 1 … count, last dimension 2·count."""
    angle = 2 * math.pi * x[..., None] * torch.arange(1, count + 1, device=x.device, dtype=x.dtype)
    return torch.cat([angle.sin(), angle.cos()], -1)


@functools.lru_cache(maxsize=32)
def frozen_projection(rows: int, out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The random matrix of `masked_target: projection`: the same on every rank and in every run, so no checkpoint holds it."""
    draw = torch.randn(rows, out, generator=torch.Generator().manual_seed(rows), device="cpu") / math.sqrt(rows)
    return draw.to(device, dtype)


class TokenDecoder(nn.Module):
    """Query embedding, one cross-attention block over the fused cells, one linear layer per sensor."""

    def __init__(self, model: ModelConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        hidden = objective.predictor_hidden
        self.sensor = nn.Embedding(len(model.modalities), hidden)
        self.day = nn.Linear(2 * DAY_WAVES, hidden)
        self.place = nn.Linear(4 * PLACE_WAVES, hidden)
        self.norm_memory, self.memory = nn.LayerNorm(model.fusion_dim), nn.Linear(model.fusion_dim, hidden)
        self.norm_query, self.norm_ffn = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, DECODER_HEADS)
        self.ffn = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.out = nn.ModuleDict({m: nn.Linear(hidden, q) for m, q in masked_targets(model, objective).items()})
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                initial.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
                initial.zeros_(layer.bias)
        initial.normal_(self.sensor.weight)

    def targets(self, name: str, part: ModalityView, latent_BThwD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(y [B, T, h, w, Q], which of its numbers count, or None: all). part: normalised, whole."""
        if self.objective.masked_target == "pixels":
            return pixel_targets(part, self.model.stride(name))
        if self.objective.masked_target == "projection":
            x, _ = patches(part, self.model.stride(name))
            x = x.flatten(4)
            latent_BThwD = x @ frozen_projection(x.shape[-1], PROJECTION_DIM, x.dtype, x.device)
        assert latent_BThwD is not None
        return F.layer_norm(latent_BThwD, latent_BThwD.shape[-1:]), None

    def forward(
        self, whole: View, u: Features, weights: dict[str, Tensor], scale: dict[str, Tensor],
        latent: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Loss per sensor: a weighted mean over its tokens of the whole step.

        Args:
            whole: normalised, nothing hidden.
            weights: [B, T, h, w], what a token counts; 0 where it is not valid. scale: W·A / Σ weights of the step.
            latent: the teacher's features per sensor, for that target.
        """
        dtype = self.memory.weight.dtype
        cells = (u.fused_valid.shape[1], u.fused_valid.shape[2])
        valid_BK = u.fused_valid.flatten(1)
        x_BKF = torch.where(u.fused_valid[..., None], u.fused, 0).flatten(1, 2).to(dtype)
        content_BKX = self.memory(self.norm_memory(x_BKF)) * valid_BK[..., None]
        memory_BKX = content_BKX + self.place(_centres(cells, dtype, x_BKF.device))
        attend_BK = valid_BK | ~valid_BK.any(1, keepdim=True)
        found = {}
        for m, name in enumerate(self.out):
            part = whole.modalities[name]
            with torch.no_grad():
                y_BThwQ, ok_BThwQ = self.targets(name, part, None if latent is None else latent[name])
            query_BNX = self._query(m, part, y_BThwQ.shape[1:4], content_BKX, cells)
            query_BNX = query_BNX + self.attention(self.norm_query(query_BNX), memory_BKX, attend_BK)
            query_BNX = query_BNX + self.ffn(self.norm_ffn(query_BNX))
            predicted_BNQ = self.out[name](query_BNX)
            weight_BN = weights[name].flatten(1)
            found[name] = self._compare(predicted_BNQ, y_BThwQ, ok_BThwQ, weight_BN) * scale[name].to(
                predicted_BNQ.dtype
            )
        return found

    def _query(
        self, m: int, part: ModalityView, tokens: torch.Size, content_BKX: Tensor, cells: tuple[int, int]
    ) -> Tensor:
        """Sensor + day + place + the fused cell under the token: [B, N, X]."""
        height, width = tokens[1:]
        dtype = content_BKX.dtype
        known_BT1 = (part.doy_BT > 0)[..., None].to(dtype)
        day_BTX = self.day(waves(part.doy_BT.to(dtype) / 365.25, DAY_WAVES) * known_BT1)
        place_LX = self.place(_centres((height, width), dtype, content_BKX.device))
        row, column = (
            (2 * torch.arange(n, device=content_BKX.device) + 1) * k // (2 * n) for n, k in zip((height, width), cells)
        )
        under_L = (row[:, None] * cells[1] + column).flatten()
        local_BLX = place_LX + content_BKX[:, under_L]
        sensor_X = self.sensor(torch.tensor(m, device=content_BKX.device))
        return (day_BTX[:, :, None] + local_BLX[:, None] + sensor_X).flatten(1, 2)

    def _compare(self, predicted_BNQ: Tensor, y_BThwQ: Tensor, ok_BThwQ: Tensor | None, weight_BN: Tensor) -> Tensor:
        y_BNQ, dtype = y_BThwQ.flatten(1, 3), work_dtype(predicted_BNQ)
        if self.objective.masked_loss == "discrimination":
            z_BNQ, y_BNQ = F.normalize(predicted_BNQ.to(dtype), dim=-1), F.normalize(y_BNQ.to(dtype), dim=-1)
            logits_BNN = z_BNQ @ y_BNQ.transpose(1, 2) / self.objective.masked_temperature
            logits_BNN = logits_BNN.masked_fill(~(weight_BN > 0)[:, None], -1e4)
            off_BN = torch.logsumexp(logits_BNN, -1) - logits_BNN.diagonal(dim1=1, dim2=2)
        else:
            off_BNQ = F.smooth_l1_loss(predicted_BNQ.to(dtype), y_BNQ.to(dtype), reduction="none")
            if ok_BThwQ is None:
                off_BN = off_BNQ.mean(-1)
            else:
                ok_BNQ = ok_BThwQ.flatten(1, 3).to(dtype)
                off_BN = (off_BNQ * ok_BNQ).sum(-1) / ok_BNQ.sum(-1).clamp_min(1)
        return torch.where(weight_BN > 0, off_BN * weight_BN.to(dtype), 0).sum()


def _centres(cells: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Waves of the cell centres as shares of the view's side: [h·w, 4·PLACE_WAVES]."""
    row, column = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in cells)
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)
    return waves(grid, PLACE_WAVES).flatten(1)
