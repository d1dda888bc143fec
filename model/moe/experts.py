"""The experts of a layer: feed-forward networks of equal shape, their parameters stacked along the expert dimension.

Dimension legend: T tokens · D channels · F hidden channels · E experts (those held here; all of them without expert
parallelism, a contiguous slice of the global ones with it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import initial
from model.precision import autocast_dtype, no_autocast


class Experts(nn.Module):
    """E two-layer GELU networks; row ranges of the input belong to consecutive experts.

    Parameters `w1_EDF`, `b1_EF`, `w2_EFD`, `b2_ED` keep the expert first, so that a slice `[first:last]` of each is what
    one expert-parallel rank holds.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, grouped: bool | None = None) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden, self.grouped = num_experts, dim, hidden, grouped
        self.w1_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2_EFD = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b2_ED = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert gets its own draw: equal experts would stay equal until the router tells them apart."""
        initial.trunc_normal_(self.w1_EDF, std=0.02)
        initial.trunc_normal_(self.w2_EFD, std=0.02)
        initial.zeros_(self.b1_EF)
        initial.zeros_(self.b2_ED)

    def forward(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        """Args: x_TD rows sorted by expert; counts_E int64 rows per expert, summing to T. Returns y_TD."""
        if self.grouped or (self.grouped is None and can_group(x_TD)):
            return experts_grouped(x_TD, counts_E, self.w1_EDF, self.b1_EF, self.w2_EFD, self.b2_ED)
        return experts_loop(x_TD, counts_E, self.w1_EDF, self.b1_EF, self.w2_EFD, self.b2_ED)


def can_group(x_TD: Tensor) -> bool:
    """Where torch's grouped matrix product is a kernel of its own: bfloat16, rows of whole 16 bytes (hidden dims are multiples of
    the row's).
    """
    bf16 = torch.bfloat16 in (x_TD.dtype, autocast_dtype(x_TD.device))
    return bf16 and x_TD.shape[-1] % 8 == 0 and hasattr(F, "grouped_mm")


def experts_loop(
    x_TD: Tensor, counts_E: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor
) -> Tensor:
    """One product per expert. `unbind`, not indexing: indexing a stacked parameter makes backward E times as dear.

    An expert without rows still takes part (with zero rows), so that its gradient is zero rather than absent.
    """
    parts = x_TD.split(counts_E.tolist())
    params = zip(w1_EDF.unbind(0), b1_EF.unbind(0), w2_EFD.unbind(0), b2_ED.unbind(0))
    outs = []
    for x, (w1, b1, w2, b2) in zip(parts, params):
        h = F.gelu(F.linear(x, w1.t(), b1))
        outs.append(F.linear(h, w2.t(), b2))
    return torch.cat(outs)


def experts_grouped(
    x_TD: Tensor, counts_E: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor
) -> Tensor:
    """The same with `grouped_mm`: two kernels whatever the number of experts, no synchronisation with the host."""
    dtype = autocast_dtype(x_TD.device) or x_TD.dtype
    ends_E = counts_E.cumsum(0).to(torch.int32)
    num_rows = x_TD.shape[0]
    if not num_rows:  # no kernel takes an empty product; the graph still reaches every parameter, with zero gradient
        nothing = w1_EDF.sum() + b1_EF.sum() + w2_EFD.sum() + b2_ED.sum()
        return x_TD.to(dtype) + (0.0 * nothing).to(dtype)
    member_TE = members(ends_E, num_rows, dtype)
    with no_autocast(x_TD.device):
        h_TF = F.gelu(F.grouped_mm(x_TD.to(dtype), w1_EDF.to(dtype), offs=ends_E) + member_TE @ b1_EF.to(dtype))
        return F.grouped_mm(h_TF, w2_EFD.to(dtype), offs=ends_E) + member_TE @ b2_ED.to(dtype)


def members(ends_E: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """One-hot [T, E]: the expert of every row. A product with it hands each row its expert's bias exactly, and the gradient of the
    bias is a matrix product, which sums in a fixed order; the scatter-add behind `repeat_interleave` does not on CUDA.
    """
    row_T1 = torch.arange(num_rows, device=ends_E.device, dtype=ends_E.dtype)[:, None]
    return ((row_T1 < ends_E) & (row_T1 >= F.pad(ends_E, (1, -1)))).to(dtype)
