"""Multi-modal temporal fusion: all frames of all modalities on one token grid, and per ground location a transformer over
[extra token ‖ every frame]; the extra token's output is the fused feature.

The order of the two linear steps is ours: project to the fusion dim first, then unfold (the predecessor unfolded at full width, four
times the parameters for the same grid).

Dimension legend: B sites · T dates · h, w tokens of a modality · y, x cells of the fusion grid · D backbone channels · F fusion
channels · S frames of all modalities · X ground locations of all sites · J = 1 + S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.transformer import Block, FeedForward, Layout, key_bias

NUM_DAYS = 367  # 1-366, and 0 for a date that is unknown


@dataclass
class Frames:
    """Final-stage tokens of one modality of one view. canvas: pixel rows, columns; stride: pixels per token side."""

    feat_BThwD: Tensor
    valid_BThw: Tensor
    doy_BT: Tensor
    canvas: tuple[int, int]
    stride: int


class Fusion(nn.Module):
    """Fusion of the configured modalities. Missing dates, modalities and cloudy tokens are masked keys, never numbers."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, self.dim, self.checkpointing = cfg.dims[3], cfg.fusion_dim, cfg.activation_checkpointing
        self.factors = {name: cfg.upscale(name) for name in cfg.modalities}
        self.project = nn.Linear(dim, self.dim)
        self.unfold = nn.ModuleDict(
            {name: nn.Linear(self.dim, self.dim * r * r) for name, r in self.factors.items() if r > 1}
        )
        self.blocks = nn.ModuleList()
        if cfg.fusion_depth:
            self.day = nn.Embedding(NUM_DAYS, self.dim)
            self.extra_F = nn.Parameter(torch.empty(self.dim))
            self.blocks.extend(
                Block(self.dim, cfg.fusion_heads, FeedForward(self.dim)) for _ in range(cfg.fusion_depth)
            )
        self.norm = nn.LayerNorm(self.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The blocks reset themselves."""
        for linear in (self.project, *self.unfold.values()):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if len(self.blocks):
            nn.init.trunc_normal_(self.day.weight, std=0.02)
            nn.init.trunc_normal_(self.extra_F, std=0.02)
        self.norm.reset_parameters()

    def forward(self, frames: dict[str, Frames]) -> tuple[Tensor, Tensor]:
        """Returns fused_ByxF and fused_valid_Byx: a location is valid if any frame is valid there."""
        leader = frames[fusion_leader(frames)]
        grid = (leader.feat_BThwD.shape[2], leader.feat_BThwD.shape[3])
        placed = [self._place(name, item, leader, grid) for name, item in frames.items()]
        x_BSyxF = torch.cat([x for x, _ in placed], dim=1)
        valid_BSyx = torch.cat([v for _, v in placed], dim=1)
        num_sites = x_BSyxF.shape[0]
        x_XSF = x_BSyxF.permute(0, 2, 3, 1, 4).flatten(0, 2)
        valid_XS = valid_BSyx.permute(0, 2, 3, 1).flatten(0, 2)
        fused_XF = self.norm(self._average(x_XSF, valid_XS) if not len(self.blocks) else self._attend(x_XSF, valid_XS))
        any_X = valid_XS.any(1)
        fused_XF = torch.where(any_X[:, None], fused_XF, 0)
        return fused_XF.unflatten(0, (num_sites, *grid)), any_X.unflatten(0, (num_sites, *grid))

    def _place(self, name: str, item: Frames, leader: Frames, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Frames of one modality on the fusion grid: project, unfold, then the cell under each location's centre.

        The unfolding is by the configured factor on any canvas: its weights are part of every graph (ranks must agree), and a
        canvas of another resolution only reads it more or less densely.
        """
        x, valid, r = self.project(item.feat_BThwD), item.valid_BThw, self.factors[name]
        if r > 1:
            x = self.unfold[name](x).unflatten(-1, (r, r, self.dim))
            x = x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
            valid = valid.repeat_interleave(r, 2).repeat_interleave(r, 3)
        if x.shape[2:4] != grid or item.canvas != leader.canvas:
            for axis in (0, 1):
                cells = cell_under(grid[axis], leader.stride, leader.canvas[axis], r, item.stride, item.canvas[axis])
                if cells != list(range(x.shape[2 + axis])):
                    index = torch.tensor(cells, device=x.device)
                    x, valid = x.index_select(2 + axis, index), valid.index_select(2 + axis, index)
        if len(self.blocks):
            x = x + self.day(item.doy_BT.long().clamp(0, NUM_DAYS - 1))[:, :, None, None, :].to(x.dtype)
        return x, valid

    def _average(self, x_XSF: Tensor, valid_XS: Tensor) -> Tensor:
        total_XF = torch.where(valid_XS[..., None], x_XSF, 0).sum(1)
        return total_XF / valid_XS.sum(1, keepdim=True).clamp_min(1).to(x_XSF.dtype)

    def _attend(self, x_XSF: Tensor, valid_XS: Tensor) -> Tensor:
        """Only locations that have a frame, and only frames that exist somewhere, are worth their computation."""
        num_locations = x_XSF.shape[0]
        rows, columns = at_least_one(valid_XS.any(1)), at_least_one(valid_XS.any(0))
        if rows is not None:
            x_XSF, valid_XS = x_XSF.index_select(0, rows), valid_XS.index_select(0, rows)
        if columns is not None:
            x_XSF, valid_XS = x_XSF.index_select(1, columns), valid_XS.index_select(1, columns)
        x_XJF = torch.cat([self.extra_F.to(x_XSF.dtype).expand(x_XSF.shape[0], 1, -1), x_XSF], dim=1)
        valid_XJ = F.pad(valid_XS, (1, 0), value=True)
        layout = Layout((0, 0), 1, valid_XJ, bool(valid_XS.all()), None)
        for block in self.blocks[:-1]:
            x_XJF, _ = self._run(block, x_XJF, layout)
        fused_XF = self._run(first_token_block, self.blocks[-1], x_XJF, layout)
        if rows is not None:
            fused_XF = fused_XF.new_zeros(num_locations, self.dim).index_copy(0, rows, fused_XF)
        return fused_XF

    def _run(self, function: Any, *args: Any) -> Any:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def first_token_block(block: Block, x_XJF: Tensor, layout: Layout) -> Tensor:
    """The last block, computed for the extra token alone: nobody reads the other outputs."""
    attention, dim = block.attention, x_XJF.shape[-1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    n_XJF = block.norm1(x_XJF)
    q = F.linear(n_XJF[:, :1], weight[:dim], bias[:dim]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    k, v = F.linear(n_XJF, weight[dim:], bias[dim:]).unflatten(-1, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    mask = None if layout.all_valid else key_bias(layout.valid_NJ, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(1)
    x_XF = x_XJF[:, 0] + attention.proj(out)
    return x_XF + block.ffn(block.norm2(x_XF))


def fusion_leader(frames: dict[str, Frames]) -> str:
    """The modality whose token grid is the fusion grid: the finest; among equals the first configured."""
    return max(frames, key=lambda name: frames[name].feat_BThwD.shape[2] * frames[name].feat_BThwD.shape[3])


def cell_under(count: int, lead_stride: int, lead_canvas: int, r: int, stride: int, canvas: int) -> list[int]:
    """For each of `count` fusion cells along an axis, the cell of another modality (tokens unfolded r-fold) under its centre.

    All canvases show the same ground, so the fraction of the canvas is the common measure; whole numbers, no rounding.
    Centre of cell i: (2i + 1) · lead_stride / (2 · lead_canvas) of the canvas; cells of the other are stride / (r · canvas) of it.
    Centres beyond the canvas (padding) are held at its last cell; the leader has no valid token of its own only there.
    """
    last = -(-canvas // stride) * r - 1
    return [min((2 * i + 1) * lead_stride * r * canvas // (2 * lead_canvas * stride), last) for i in range(count)]


def at_least_one(keep_X: Tensor) -> Tensor | None:
    """Indices of the kept rows, None if all are; the first row if none is, so that the graph stays connected."""
    if bool(keep_X.all()):
        return None
    index = keep_X.nonzero()[:, 0]
    return index if index.numel() else index.new_zeros(1)
