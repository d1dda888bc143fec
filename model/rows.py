"""Rows of a packed tensor put into another order: the one data movement of the packed trunk, with a backward of the same kind.

Dimension legend: R rows before · T rows after · D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Take:
    """Which row goes where; each row before is used at most once, so that the gradient is a gather too: no scatter-add, whose
    sums have no fixed order on CUDA, and which is slow on a CPU.

    Attributes:
        index_T: row before of each row after (any row where `blank_T`).
        inverse_R: row after of each row before (any where `unused_R`).
        blank_T: rows after that come from nowhere and are zero; None: there are none. unused_R: likewise rows before.
        whole: nothing moves.
    """

    index_T: Tensor
    inverse_R: Tensor
    blank_T: Tensor | None
    unused_R: Tensor | None
    whole: bool


def plan_take(source: np.ndarray, num_before: int, device: torch.device, blanks_matter: bool = True) -> Take:
    """From the row before of every row after, -1 for none. blanks_matter false: what stands in blank rows is never looked at."""
    source = np.ascontiguousarray(source.reshape(-1), dtype=np.int64)
    there = source >= 0
    full = bool(there.all())
    inverse = np.zeros(num_before, np.int64)
    used = np.zeros(num_before, bool)
    places = np.arange(len(source)) if full else np.flatnonzero(there)
    inverse[source[places]] = places
    used[source[places]] = True
    whole = full and len(source) == num_before and bool((source == np.arange(num_before)).all())
    return Take(
        to_device(np.maximum(source, 0), device), to_device(inverse, device),
        None if full or not blanks_matter else to_device(~there[:, None], device),
        None if used.all() else to_device(~used[:, None], device), whole,
    )  # fmt: skip


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a tensor on `device`; queued, never waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def take(x_RD: Tensor, plan: Take) -> Tensor:
    """Rows of `x_RD` as `plan` says, [T, D]."""
    if plan.whole:
        return x_RD
    if not x_RD.shape[0]:  # nothing to take from: blank rows only, which still belong to the graph
        return x_RD.new_zeros(plan.index_T.shape[0], x_RD.shape[1]) + x_RD.sum()
    return _Take.apply(x_RD, plan.index_T, plan.inverse_R, plan.blank_T, plan.unused_R)


def permute(x_TD: Tensor, index_T: Tensor, inverse_T: Tensor) -> Tensor:
    """Row `index_T[i]` at place i, of a permutation known on the device only."""
    return _Take.apply(x_TD, index_T, inverse_T, None, None)


def inverse_of(index_T: Tensor) -> Tensor:
    """The inverse permutation."""
    inverse_T = torch.empty_like(index_T)
    return inverse_T.index_copy_(0, index_T, torch.arange(index_T.shape[0], device=index_T.device))


@dataclass(frozen=True)
class Spread:
    """Which row each place copies; a row may be copied to many places, and its gradient is gathered from all of them.

    Attributes:
        index_T: row of each place. back_RX: places of each row, filled up with any; blank_RX1: where it was filled up, None: nowhere.
        whole: every place has the row of its own number.
    """

    index_T: Tensor
    back_RX: Tensor
    blank_RX1: Tensor | None
    whole: bool


def plan_spread(row: np.ndarray, num_rows: int, device: torch.device) -> Spread:
    """From the row of every place."""
    row = np.ascontiguousarray(row.reshape(-1), dtype=np.int64)
    counts = np.bincount(row, minlength=num_rows)
    order = np.argsort(row, kind="stable")
    step = np.arange(max(int(counts.max(initial=0)), 1))
    blank = step >= counts[:, None]
    at = np.minimum((np.cumsum(counts) - counts)[:, None] + step, max(len(row) - 1, 0))
    back = order[at] if len(row) else np.zeros_like(at)
    whole = len(row) == num_rows and bool((row == np.arange(num_rows)).all())
    return Spread(
        to_device(row, device),
        to_device(back, device),
        to_device(blank[..., None], device) if blank.any() else None,
        whole,
    )


def spread(x_RD: Tensor, plan: Spread) -> Tensor:
    """Rows of `x_RD` at all places, [T, D]."""
    return x_RD if plan.whole else _Spread.apply(x_RD, plan.index_T, plan.back_RX, plan.blank_RX1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, index_T: Tensor, back_RX: Tensor, blank_RX1: Tensor | None) -> Tensor:
        ctx.back_RX, ctx.blank_RX1 = back_RX, blank_RX1
        return x_RD.index_select(0, index_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if not grads[0].shape[0]:  # no place at all
            return grads[0].new_zeros(ctx.back_RX.shape[0], grads[0].shape[1]), None, None, None
        grad_RXD = grads[0].index_select(0, ctx.back_RX.flatten()).unflatten(0, ctx.back_RX.shape)
        if ctx.blank_RX1 is not None:
            grad_RXD = grad_RXD.masked_fill_(ctx.blank_RX1, 0)
        return (grad_RXD[:, 0] if grad_RXD.shape[1] == 1 else grad_RXD.sum(1)), None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, index_T: Tensor, inverse_R: Tensor, blank_T: Tensor | None, unused_R: Tensor | None
    ) -> Tensor:
        ctx.inverse_R, ctx.unused_R = inverse_R, unused_R
        out_TD = x_RD.index_select(0, index_T)
        return out_TD if blank_T is None else out_TD.masked_fill_(blank_T, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if not grads[0].shape[0] and ctx.inverse_R.shape[0]:
            return grads[0].new_zeros(ctx.inverse_R.shape[0], grads[0].shape[1]), None, None, None, None
        grad_RD = grads[0].index_select(0, ctx.inverse_R)
        return grad_RD if ctx.unused_R is None else grad_RD.masked_fill_(ctx.unused_R, 0), None, None, None, None
