"""Stages 3-4: pre-norm transformer blocks, attention over the whole image (or, as an ablation, over windows), FFN dense or
mixture of experts.

Dimension legend: N images · P prompt tokens · L image tokens · J = P + L · D channels · A heads · H head channels · X windows of
all images · S tokens per window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.droppath import drop
from model.moe.balance import CallStats
from model.moe.layer import MoELayer
from model.positions import MASKED, WindowLayout, from_windows, rotate, to_windows


@dataclass
class Layout:
    """What the blocks of a stage share in one call.

    Attributes:
        grid: rows, columns of image tokens. prompts: P.
        valid_NJ: prompts are valid where the image has any valid token. all_valid: nothing is masked.
        rotary: cosines and sines of the tokens' angles (`model.positions.rotary_table`), None without rotary positions.
        windows: layouts of unshifted and shifted blocks; None: attention is global.
    """

    grid: tuple[int, int]
    prompts: int
    valid_NJ: Tensor
    all_valid: bool
    rotary: tuple[Tensor, Tensor] | None = None
    windows: tuple[WindowLayout, WindowLayout] | None = None


class Attention(nn.Module):
    """Multi-head attention; queries and keys of image tokens are rotated by their place on the ground."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_NJD: Tensor, layout: Layout, shifted: bool = False) -> Tensor:
        q, k, v = self.qkv(x_NJD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if layout.rotary is not None:
            q, k = rotate(q, layout.rotary), rotate(k, layout.rotary)
        if layout.windows is not None:
            out_NAJH = windowed_attention(q, k, v, layout, layout.windows[shifted])
        else:
            mask = None if layout.all_valid else key_bias(layout.valid_NJ, q.dtype)
            out_NAJH = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out_NAJH.transpose(1, 2).flatten(2))


def key_bias(valid_NJ: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for valid keys, MASKED for others, [N, 1, 1, J]; finite, so that an image without valid keys gives no NaN."""
    zero = torch.zeros((), dtype=dtype, device=valid_NJ.device)
    return torch.where(valid_NJ, zero, MASKED)[:, None, None, :]


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, windowed: WindowLayout) -> Tensor:
    """q, k, v [N, A, J, H]. An image token sees the prompts and its (shifted) window; a prompt sees everything."""
    p, (height, width) = layout.prompts, layout.grid
    n, heads = q.shape[:2]
    plan, see = windowed
    parts = []
    for t in (q, k, v):
        grid = t[:, :, p:].transpose(1, 2).flatten(2).unflatten(1, (height, width))
        parts.append(to_windows(grid, plan).unflatten(-1, (heads, -1)).transpose(1, 2))
    q_XASH, k_XASH, v_XASH = parts
    per_image = q_XASH.shape[0] // n
    if p:
        k_XASH, v_XASH = (
            torch.cat([t[:, :, :p].repeat_interleave(per_image, 0), w], 2) for t, w in ((k, k_XASH), (v, v_XASH))
        )
    bias = None
    if see is not None:
        see = see.repeat(q_XASH.shape[0] // see.shape[0], 1, 1, 1)
        bias = F.pad(torch.where(see, torch.zeros((), dtype=q.dtype, device=q.device), MASKED), (p, 0))
    image = F.scaled_dot_product_attention(q_XASH, k_XASH, v_XASH, attn_mask=bias)
    image = from_windows(image.transpose(1, 2).flatten(2), plan, height, width).flatten(1, 2)
    image_NALH = image.unflatten(-1, (heads, -1)).transpose(1, 2)
    if not p:
        return image_NALH
    mask = None if layout.all_valid else key_bias(layout.valid_NJ, q.dtype)
    front_NAPH = F.scaled_dot_product_attention(q[:, :, :p], k, v, attn_mask=mask)
    return torch.cat([front_NAPH, image_NALH], dim=2)


class FeedForward(nn.Module):
    """Linear D → 4D, GELU, linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def call_experts(ffn: nn.Module, x_NJD: Tensor, valid_NJ: Tensor) -> tuple[Tensor, CallStats]:
    return ffn(x_NJD, valid_NJ)


class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)). `ffn` is a FeedForward or a MoELayer."""

    def __init__(self, dim: int, heads: int, ffn: nn.Module, shifted: bool = False) -> None:
        super().__init__()
        self.shifted = shifted
        self.call_experts = call_experts
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linears = [self.attention.qkv, self.attention.proj]
        if isinstance(self.ffn, FeedForward):
            linears += [self.ffn.fc1, self.ffn.fc2]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def compile_in_place(self, **options: Any) -> None:
        """`nn.Module.compile`, experts excepted: their shapes follow the data, and expert parallelism waits for other ranks inside.

        The exception is a function of the layer, not a bound method, so that a copy of the block calls its own experts.
        """
        if not isinstance(self.ffn, FeedForward):
            self.call_experts = torch.compiler.disable(call_experts)
        self.compile(**options)

    def forward(self, x_NJD: Tensor, layout: Layout, keep_N2: Tensor | None = None) -> tuple[Tensor, CallStats | None]:
        """Returns the tokens and, of a mixture of experts, the router's sums over the valid tokens."""
        x_NJD = x_NJD + drop(self.attention(self.norm1(x_NJD), layout, self.shifted), keep_N2, 0)
        stats = None
        if isinstance(self.ffn, FeedForward):
            y_NJD = self.ffn(self.norm2(x_NJD))
        else:  # a MoELayer, or what expert parallelism put in its place
            y_NJD, stats = self.call_experts(self.ffn, self.norm2(x_NJD), layout.valid_NJ)
        return x_NJD + drop(y_NJD, keep_N2, 1), stats


def build_block(dim: int, heads: int, moe: tuple[int, int, bool | None] | None, shifted: bool) -> Block:
    """moe: (experts, top_k, grouped), None for a dense FFN."""
    ffn = FeedForward(dim) if moe is None else MoELayer(dim, 4 * dim, *moe)
    return Block(dim, heads, ffn, shifted)
