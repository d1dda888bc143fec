"""Stages 3-4 and fusion: pre-norm transformer blocks on packed sequences, FFN dense or mixture of experts.

Dimension legend: T rows of all sequences · N sequences of a bucket · J slots of a sequence · Q its queries · D channels · A heads · H head
channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.droppath import drop
from model.moe.balance import MoEStats
from model.moe.layer import MoELayer
from model.plan import Bucket, Routed, Sequences
from model.positions import rotate

Rotary = tuple[Tensor, Tensor]  # cosines and sines of the rows' angles (`model.positions.rotary_table`)


class Attention(nn.Module):
    """Multi-head attention within sequences; queries and keys are rotated by their place on the ground."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_TD: Tensor, buckets: tuple[Bucket, ...], rotary: Rotary | None = None) -> Tensor:
        qkv_TAH = self.qkv(x_TD).unflatten(-1, (3 * self.heads, -1))
        qk_TAH, v_TAH = qkv_TAH.split([2 * self.heads, self.heads], dim=1)
        if rotary is not None:
            qk_TAH = rotate(qk_TAH, rotary)
        outs, sizes = [], [bucket.count * bucket.length for bucket in buckets]
        for bucket, qk, v in zip(buckets, qk_TAH.split(sizes), v_TAH.split(sizes)):
            qk, v = (t.unflatten(0, (bucket.count, bucket.length)).transpose(1, 2) for t in (qk, v))
            q, k = qk.split(self.heads, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.bias_N1JJ)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(outs[0] if len(outs) == 1 else torch.cat(outs))

    def of_queries(self, x_TD: Tensor, buckets: tuple[Bucket, ...], num_queries: int, rotary: Rotary | None) -> Tensor:
        """The same for the first `num_queries` slots of every sequence alone, [sequences · Q, D]."""
        dim, heads = x_TD.shape[-1], self.heads
        weight, bias = self.qkv.weight, self.qkv.bias
        kv_TAH = F.linear(x_TD, weight[dim:], bias[dim:]).unflatten(-1, (2 * heads, -1))
        q_TAH = F.linear(first_slots(x_TD, buckets, num_queries), weight[:dim], bias[:dim]).unflatten(-1, (heads, -1))
        k_TAH, v_TAH = kv_TAH.split(heads, dim=1)
        if rotary is not None:
            k_TAH = rotate(k_TAH, rotary)
            cos, sin = (first_slots(t, buckets, num_queries) for t in rotary)
            q_TAH = rotate(q_TAH, (cos, sin))
        outs, sizes = [], [bucket.count * bucket.length for bucket in buckets]
        parts = zip(
            buckets, q_TAH.split([b.count * num_queries for b in buckets]), k_TAH.split(sizes), v_TAH.split(sizes)
        )
        for bucket, *qkv in parts:
            q, k, v = (t.unflatten(0, (bucket.count, -1)).transpose(1, 2) for t in qkv)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.bias_N1JJ)
            outs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(outs[0] if len(outs) == 1 else torch.cat(outs))


def first_slots(x_TD: Tensor, buckets: tuple[Bucket, ...], num: int) -> Tensor:
    """Rows of the first `num` slots of every sequence, in order."""
    parts = x_TD.split([bucket.count * bucket.length for bucket in buckets])
    outs = [part.unflatten(0, (b.count, -1))[:, :num].flatten(0, 1) for b, part in zip(buckets, parts)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class FeedForward(nn.Module):
    """Linear D → 4D, GELU, linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def call_experts(ffn: nn.Module, x_TD: Tensor, routed: Routed) -> tuple[Tensor, MoEStats]:
    return ffn(x_TD, routed)


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
            initial.trunc_normal_(linear.weight, std=0.02)
            initial.zeros_(linear.bias)
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def compile_in_place(self, **options: Any) -> None:
        """`nn.Module.compile`, experts excepted: their shapes follow the data, and expert parallelism waits for other ranks inside.

        The exception is a function of the layer, not a bound method, so that a copy of the block calls its own experts.
        """
        if not isinstance(self.ffn, FeedForward):
            self.call_experts = torch.compiler.disable(call_experts)
        self.compile(**options)

    def forward(
        self, x_TD: Tensor, sequences: Sequences, rotary: Rotary | None = None, keep_2T: Tensor | None = None
    ) -> tuple[Tensor, MoEStats | None]:
        """keep_2T: drop-path factors of the two branches (`model.droppath`). Also the router's sums, where there is a router."""
        x_TD = x_TD + drop(self.attention(self.norm1(x_TD), sequences.buckets[self.shifted], rotary), keep_2T, 0)
        stats = None
        if isinstance(self.ffn, FeedForward):
            y_TD = self.ffn(self.norm2(x_TD))
        else:  # a MoELayer, or what expert parallelism put in its place
            assert sequences.routed is not None
            y_TD, stats = self.call_experts(self.ffn, self.norm2(x_TD), sequences.routed)
        return x_TD + drop(y_TD, keep_2T, 1), stats

    def of_queries(self, x_TD: Tensor, sequences: Sequences, num: int, rotary: Rotary | None = None) -> Tensor:
        """The block for the first `num` slots of every sequence alone, where nobody reads the others: [sequences · num, D]."""
        buckets = sequences.buckets[self.shifted]
        out_QD = self.attention.of_queries(self.norm1(x_TD), buckets, num, rotary)
        x_QD = first_slots(x_TD, buckets, num) + out_QD
        return x_QD + self.ffn(self.norm2(x_QD))


def build_block(dim: int, heads: int, moe: tuple[int, int, bool | None] | None, shifted: bool) -> Block:
    """moe: (experts, top_k, grouped), None for a dense FFN."""
    ffn = FeedForward(dim) if moe is None else MoELayer(dim, 4 * dim, *moe)
    return Block(dim, heads, ffn, shifted)
