"""L_CL: cross-entropy between centred teacher and student prototype scores (DINO, arXiv 2104.14294; DINOv2, 2304.07193).

Legend: N rows · D bottleneck dim · K prototypes · G centring groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.losses.sinkhorn import chunk_rows, work_dtype


def teacher_temperature(samples_seen: int, limits: tuple[float, float], warmup_samples: float) -> float:
    """Linear from limits[0] to limits[1] over `warmup_samples` samples, then constant. A function of samples, not steps."""
    if warmup_samples <= 0:
        return limits[1]
    return limits[0] + (limits[1] - limits[0]) * min(1.0, samples_seen / warmup_samples)


def target_log_probabilities(
    z_ND: Tensor, prototypes_KD: Tensor, log_v_GK: Tensor, group_N: Tensor, temperature: float
) -> Tensor:
    """log q_NK of the teacher's distribution q = softmax_k(z·w_k / τ + log v_gk); see `sinkhorn.prototype_scaling`."""
    scaling_NK = log_v_GK.index_select(0, group_N)
    return torch.log_softmax(scaling_NK.add_(((z_ND / temperature) @ prototypes_KD.T).to(log_v_GK.dtype)), dim=-1)


def prototype_cross_entropy(
    student_ND: Tensor, student_prototypes_KD: Tensor, teacher_ND: Tensor, teacher_prototypes_KD: Tensor,
    log_v_GK: Tensor, group_N: Tensor, weight_N: Tensor, student_temperature: float, temperature: float,
    chunk: int | None = None,
) -> CrossEntropy:  # fmt: skip
    """(Σ_n weight_n · ce_n, ce_N, entropy_N, best_N) with ce_n = −Σ_k q_nk log softmax_k(z_n·w_k / τ_s).

    Only the first output carries gradients, to `student_ND` and `student_prototypes_KD`. The K-wide rows live one chunk at a
    time: the gradient ∂ce/∂logits = p − q is known in the forward, so N×K logits are never kept for the backward.
    A row with weight 0 contributes exactly 0 (its ce is still returned). entropy_N: of q, so ce − entropy is the divergence
    that training can remove; best_N: the student's nearest prototype.
    """
    return CrossEntropy(*_FusedCrossEntropy.apply(
        student_ND, student_prototypes_KD, teacher_ND, teacher_prototypes_KD, log_v_GK, group_N, weight_N,
        student_temperature, temperature, chunk or chunk_rows(student_prototypes_KD.shape[0]),
    ))  # fmt: skip


class CrossEntropy(NamedTuple):
    """What `prototype_cross_entropy` returns; only `loss` carries gradients."""

    loss: Tensor
    ce_N: Tensor
    entropy_N: Tensor
    best_N: Tensor


class _FusedCrossEntropy(torch.autograd.Function):
    """Chunked cross-entropy whose gradients are made in the forward (see `prototype_cross_entropy`)."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, student_prototypes_KD: Tensor, teacher_ND: Tensor, teacher_prototypes_KD: Tensor,
        log_v_GK: Tensor, group_N: Tensor, weight_N: Tensor, student_temperature: float, temperature: float, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = work_dtype(student_ND)
        weight_N = weight_N.to(dtype)
        sharp_ND = student_ND / student_temperature
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        grad_KD: Tensor | None = None
        for start in range(0, student_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logit_nK = (sharp_ND[part] @ student_prototypes_KD.T).to(dtype)
            best_n = logit_nK.argmax(dim=-1)
            logp_nK = torch.log_softmax(logit_nK, dim=-1)
            logq_nK = target_log_probabilities(
                teacher_ND[part], teacher_prototypes_KD, log_v_GK, group_N[part], temperature
            )
            q_nK = logq_nK.exp()
            entropy_n, ce_n = -_row_dot(q_nK, logq_nK), -_row_dot(q_nK, logp_nK)
            # ∂ce/∂logits, in the place of log p
            delta_nK = logp_nK.exp_().sub_(q_nK).mul_((weight_N[part] / student_temperature)[:, None])
            found.append((ce_n, entropy_n, best_n, delta_nK.to(student_prototypes_KD.dtype) @ student_prototypes_KD))
            more_KD = delta_nK.T @ student_ND[part].to(dtype)
            grad_KD = more_KD if grad_KD is None else grad_KD.add_(more_KD)
        if grad_KD is None:  # no rows
            grad_KD = torch.zeros_like(student_prototypes_KD, dtype=dtype)
            found.append((weight_N, weight_N, group_N, torch.zeros_like(student_ND)))
        ce_N, entropy_N, best_N, grad_ND = found[0] if len(found) == 1 else map(torch.cat, zip(*found))
        ctx.save_for_backward(grad_ND.to(student_ND.dtype), grad_KD.to(student_prototypes_KD.dtype))
        ctx.mark_non_differentiable(ce_N, entropy_N, best_N)
        ctx.set_materialize_grads(False)
        return torch.dot(weight_N, ce_N), ce_N, entropy_N, best_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        upstream = grad_outputs[0]
        if upstream is None:  # not part of what is differentiated
            return (None,) * 10
        grad_ND, grad_KD = ctx.saved_tensors
        return upstream.to(grad_ND.dtype) * grad_ND, upstream.to(grad_KD.dtype) * grad_KD, *([None] * 8)


def _row_dot(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Σ_k a_nk b_nk of every row, in one pass."""
    return torch.bmm(a_NK[:, None], b_NK[..., None])[:, 0, 0]
