"""QSACL's decoder: learnable queries cross-attend to one view's fused features in one transformer decoder layer.

Legend: B sites · m queries · N fused tokens · F dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial


class Attention(nn.Module):
    """Multi-head attention of queries over a masked memory, by the fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x_BmF: Tensor, memory_BNF: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        q = self._split(self.q(x_BmF))
        k, v = (self._split(part) for part in self.kv(memory_BNF).chunk(2, dim=-1))
        mask = None if valid_BN is None else valid_BN[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x_BnF: Tensor) -> Tensor:
        return x_BnF.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QueryDecoder(nn.Module):
    """m learnable queries and one pre-norm decoder layer: self-attention, cross-attention, FFN ×4 (arXiv 2507.13812).

    No positions in the memory: a query gathers what is there, not where (ours; the paper does not say).
    """

    def __init__(self, dim: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        initial.trunc_normal_(self.queries, std=1.0)  # distinct from the start: equal queries would stay equal
        self.norm_self, self.norm_cross = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_memory, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention, self.cross_attention = Attention(dim, heads), Attention(dim, heads)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, fused_BhwF: Tensor, valid_Bhw: Tensor) -> Tensor:
        """z_BmF. A site without valid tokens attends to zeros and gives finite output that nobody may use."""
        dtype = self.queries.dtype
        valid_BN = valid_Bhw.flatten(1)
        memory_BNF = torch.where(valid_BN[..., None], fused_BhwF.flatten(1, 2), 0).to(dtype)
        attend_BN = valid_BN | ~valid_BN.any(dim=1, keepdim=True)  # an all-masked softmax would be NaN
        memory_BNF = self.norm_memory(memory_BNF)
        x_BmF = self.queries.expand(fused_BhwF.shape[0], -1, -1)
        normed = self.norm_self(x_BmF)
        x_BmF = x_BmF + self.self_attention(normed, normed)
        x_BmF = x_BmF + self.cross_attention(self.norm_cross(x_BmF), memory_BNF, attend_BN)
        return x_BmF + self.ffn(self.norm_ffn(x_BmF))
