"""Stages 1-2: Swin Transformer V2 blocks (arXiv 2111.09883) on grids of any size with per-token validity.

Dimension legend: N images · H, W tokens · C channels · A heads · K windows per image · S tokens per window · X = N·K.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.droppath import drop
from model.positions import MASKED, WindowLayout, Windows, from_windows, to_windows


class PositionBias(nn.Module):
    """Continuous position bias: 16 · sigmoid(MLP(log-spaced offsets)), MLP 2 → 512 → heads (eq. 3), less its middle.

    The constant 8 is the same for all keys of a query, so softmax does not see it; without it the values lie round 0, where
    bfloat16 is finer: half the rounding error.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 512)
        self.out = nn.Linear(512, heads, bias=False)

    def forward(self, windows: Windows) -> Tensor:
        """[A, S, S], float32 at least: one pass over the (2w-1)² offsets, shared by all windows of the call."""
        dtype = torch.promote_types(self.hidden.weight.dtype, torch.float32)
        with torch.autocast(windows.index_SS.device.type, enabled=False):
            h = F.linear(windows.coordinates_R2.to(dtype), self.hidden.weight.to(dtype), self.hidden.bias.to(dtype))
            table_RA = 16.0 * torch.sigmoid(F.linear(F.relu(h), self.out.weight.to(dtype))) - 8.0
        return table_RA[windows.index_SS.flatten()].unflatten(0, windows.index_SS.shape).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows; learned logit scale per head, clamped at ln 100. Keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale_A = nn.Parameter(torch.full((heads,), math.log(10.0)))
        self.bias = PositionBias(heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_NHWC: Tensor, layout: WindowLayout) -> Tensor:
        windows, see_X1SS = layout
        height, width = x_NHWC.shape[1:3]
        bias_3C = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_XSC = to_windows(F.linear(x_NHWC, self.qkv.weight, bias_3C), windows)
        q_XASD, k_XASD, v_XASD = qkv_XSC.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale_A11 = self.logit_scale_A.clamp(max=math.log(100.0)).exp()[:, None, None]
        q_XASD = (F.normalize(q_XASD, dim=-1) * scale_A11).to(v_XASD.dtype)
        k_XASD = F.normalize(k_XASD, dim=-1).to(v_XASD.dtype)
        bias_XASS = self.bias(windows)[None].to(v_XASD.dtype)
        if see_X1SS is not None:
            bias_XASS = torch.where(see_X1SS, bias_XASS, MASKED)
        out_XASD = _attend(q_XASD, k_XASD, v_XASD, bias_XASS)
        return self.proj(from_windows(out_XASD.transpose(1, 2).flatten(2), windows, height, width))


def _attend(q_XASD: Tensor, k_XASD: Tensor, v_XASD: Tensor, bias_XASS: Tensor) -> Tensor:
    """Fused attention with the combined bias and mask. A bias that repeats every K windows (cyclic shift, all tokens valid)
    is not copied for every image: the K windows become heads of one image, and the bias broadcasts over images.
    """
    period = bias_XASS.shape[0]
    if period in (1, q_XASD.shape[0]):
        return F.scaled_dot_product_attention(q_XASD, k_XASD, v_XASD, attn_mask=bias_XASS, scale=1.0)
    heads = q_XASD.shape[1]
    q, k, v = (t.unflatten(0, (-1, period)).flatten(1, 2) for t in (q_XASD, k_XASD, v_XASD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_XASS.flatten(0, 1)[None], scale=1.0)
    return out.unflatten(1, (period, heads)).flatten(0, 1)


class SwinBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(FFN(x)): residual-post-norm."""

    def __init__(self, dim: int, heads: int, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.attention = WindowAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        attention = self.attention
        for linear in (attention.qkv, attention.proj, attention.bias.hidden, attention.bias.out, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(attention.q_bias)
        nn.init.zeros_(attention.v_bias)
        nn.init.constant_(attention.logit_scale_A, math.log(10.0))
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def forward(
        self, x_NHWC: Tensor, layouts: tuple[WindowLayout, WindowLayout], keep_N2: Tensor | None = None
    ) -> Tensor:
        """layouts: of the stage, unshifted and shifted. keep_N2: drop-path factors of the two branches (`model.droppath`)."""
        x_NHWC = x_NHWC + drop(self.norm1(self.attention(x_NHWC, layouts[self.shifted])), keep_N2, 0)
        return x_NHWC + drop(self.norm2(self.fc2(F.gelu(self.fc1(x_NHWC)))), keep_N2, 1)
