"""Stages 1-2: Swin Transformer V2 blocks (arXiv 2111.09883) on grids of any size with per-token validity.

Dimension legend: T tokens of all images · C channels · A heads · H head channels · X windows, or all their slots · S slots of a
window · R offsets of the bias table.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.droppath import drop
from model.plan import MASKED, WindowPlan
from model.precision import no_autocast
from model.rows import take
from model.windows import bias_coordinates


class PositionBias(nn.Module):
    """Continuous position bias: 16 · sigmoid(MLP(log-spaced offsets)), MLP 2 → 512 → heads (eq. 3), less its middle.

    The constant 8 is the same for all keys of a query, so softmax does not see it; without it the values lie round 0, where
    bfloat16 is finer: half the rounding error.
    """

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 512)
        self.out = nn.Linear(512, heads, bias=False)
        self.window = window

    def forward(self) -> Tensor:
        """[R, A], float32 at least: the biases of all (2w-1)² offsets, which the windows of a call pick from."""
        weight = self.hidden.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with no_autocast(weight.device):
            offsets_R2 = coordinates(self.window, weight.device).to(dtype)
            h = F.linear(offsets_R2, weight.to(dtype), self.hidden.bias.to(dtype))
            return 16.0 * torch.sigmoid(F.linear(F.relu(h), self.out.weight.to(dtype))) - 8.0


@functools.lru_cache(maxsize=16)
def coordinates(window: int, device: torch.device) -> Tensor:
    """`bias_coordinates` on a device, float64; made once."""
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        return torch.from_numpy(bias_coordinates(window)).to(device)


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows; learned logit scale per head, clamped at ln 100. Keys have no bias."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale_A = nn.Parameter(torch.full((heads,), math.log(10.0)))
        self.bias = PositionBias(heads, window)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TC: Tensor, plan: WindowPlan) -> Tensor:
        bias_3C = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_XC = take(F.linear(x_TC, self.qkv.weight, bias_3C), plan.enter).unflatten(-1, (3, self.heads, -1))
        v_XAH = qkv_XC[:, 2]
        scale_A = self.logit_scale_A.clamp(max=math.log(100.0)).exp()
        scale_2A1 = torch.stack([scale_A, torch.ones_like(scale_A)])[..., None]
        qk_X2AH = (F.normalize(qkv_XC[:, :2], dim=-1) * scale_2A1).to(v_XAH.dtype)
        table_RA = self.bias()
        outs, at = [], 0
        for bucket in plan.buckets:
            count, span, see_X1SS = bucket.count, bucket.span, bucket.see_X1SS
            rows = slice(at, at + count * span)
            at = rows.stop
            q, k, v = (t[rows].unflatten(0, (count, span)).transpose(1, 2) for t in (*qk_X2AH.unbind(1), v_XAH))
            bias_XASS = table_RA.T[:, bucket.bias_index_SS].view(1, self.heads, span, span).to(v.dtype)
            if see_X1SS is not None:
                bias_XASS = torch.where(see_X1SS, bias_XASS, MASKED)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_XASS, scale=1.0)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(take(outs[0] if len(outs) == 1 else torch.cat(outs), plan.leave))


class SwinBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(FFN(x)): residual-post-norm."""

    def __init__(self, dim: int, heads: int, shifted: bool, window: int) -> None:
        super().__init__()
        self.shifted = shifted
        self.attention = WindowAttention(dim, heads, window)
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        attention = self.attention
        for linear in (attention.qkv, attention.proj, attention.bias.hidden, attention.bias.out, self.fc1, self.fc2):
            initial.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                initial.zeros_(linear.bias)
        initial.zeros_(attention.q_bias)
        initial.zeros_(attention.v_bias)
        initial.constant_(attention.logit_scale_A, math.log(10.0))
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def forward(self, x_TC: Tensor, plans: tuple[WindowPlan, WindowPlan], keep_2T: Tensor | None = None) -> Tensor:
        """plans: of the stage, unshifted and shifted. keep_2T: drop-path factors of the two branches (`model.droppath`)."""
        x_TC = x_TC + drop(self.norm1(self.attention(x_TC, plans[self.shifted])), keep_2T, 0)
        return x_TC + drop(self.norm2(self.fc2(F.gelu(self.fc1(x_TC)))), keep_2T, 1)
