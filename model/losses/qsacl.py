"""QSACL, query-based semantic aggregation (arXiv 2507.13812): which query outputs of which views are compared.

    L = 1/(2m) Σ_i [ L_CL(z_i^g, z_i^l') + L_CL(z_i^l, z_i^g') ],   primes: teacher, i: query index

Student: g = u. Teacher: g' = v (ours: the other global view, no extra forward). l, l' = every local view in turn, averaged.
Without local views: student u against teacher v.

Legend: B sites · J local views · m queries · D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def student_rows(global_BmD: Tensor, locals_BmD: list[Tensor]) -> Tensor:
    """Student side of the pairs, rows flattened: [u, l] per local view."""
    if not locals_BmD:
        return global_BmD.flatten(0, 1)
    return torch.cat([x.flatten(0, 1) for local in locals_BmD for x in (global_BmD, local)])


def teacher_rows(global_BmD: Tensor, locals_BmD: list[Tensor]) -> Tensor:
    """Teacher side, in the order of `student_rows`: [l', v] per local view."""
    if not locals_BmD:
        return global_BmD.flatten(0, 1)
    return torch.cat([x.flatten(0, 1) for local in locals_BmD for x in (local, global_BmD)])


def valid_rows(student_B: Tensor, teacher_B: Tensor, locals_B: list[Tensor], queries: int) -> Tensor:
    """Rows whose two sites-in-view both have valid fused tokens; order of `student_rows`."""
    if not locals_B:
        return (student_B & teacher_B).repeat_interleave(queries)
    pairs = [x for local_B in locals_B for x in (student_B & local_B, local_B & teacher_B)]
    return torch.cat([pair_B.repeat_interleave(queries) for pair_B in pairs])
