"""Which tokens meet in which cell of the ground: the host's plan of a fusion call over several views, from validity alone.

A cell is the ground under one token of the coarsest sensor (40 m for Sentinel). Its sequence is [queries, one per place of the finest
token grid ‖ every valid token of every sensor and date whose centre lies in it]; whatever is missing is left out.

Dimension legend: B sites · T dates · h, w tokens of a sensor · y, x places of the finest grid · X cells that are computed · Q queries of a
cell · J slots of a sequence · R side of the table of query places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.grids import TokenGrid, coarsest, finest, tokens_under
from model.plan import MASKED, Bucket, Sequences, lengths_to_buckets
from model.rows import Take, plan_take, to_device


class Seen(NamedTuple):
    """One sensor of one view: which tokens are valid, and which sites' fusion sees it (None: all)."""

    valid_BThw: np.ndarray
    grid: TokenGrid
    shown_B: np.ndarray | None


@dataclass(frozen=True)
class CellPlan:
    """Attributes:
    num_queries: Q, the most of any cell. sequences: of all cells of all views.
    enter: tokens of all views and sensors, in order, then the queries, to sequences.
    leave: queries of the last block to places of all views, in order; zero where nothing is valid.
    place_XR: per query, weights of the R² entries of the table of query places.
    share_T2: place on the ground of every row as a share of the view's width (row, column); site_T: index of its site.
    ground: per site of the call, which sensor of its view tells how wide the ground is, [sites].
    valid: per view, bool [B, y, x].
    """

    num_queries: int
    sequences: Sequences
    enter: Take
    leave: Take
    place_XR: Tensor
    share_T2: Tensor
    site_T: Tensor
    ground: Tensor
    valid: list[np.ndarray]


def plan_cells(
    views: Sequence[Mapping[str, Seen]], table_side: int, device: torch.device, dtype: torch.dtype
) -> CellPlan:
    parts = [_of_view(view, table_side) for view in views]
    cells_before = np.cumsum([0, *(p.num_cells for p in parts)])
    sites_before = np.cumsum([0, *(len(p.valid) for p in parts)])
    cell_N = np.concatenate([p.token_cell + at for p, at in zip(parts, cells_before)])
    cell_M = np.concatenate([p.query_cell + at for p, at in zip(parts, cells_before)])
    shown_N = np.concatenate([p.token_shown for p in parts])
    wanted_M = np.concatenate([p.valid.reshape(-1) for p in parts])
    if not wanted_M.any():  # one cell is computed all the same: every parameter is part of every graph
        wanted_M = np.arange(len(wanted_M)) == 0
    # tokens and queries by cell, in their order; only cells that somebody asks for
    asked = np.bincount(cell_M[wanted_M], minlength=cells_before[-1]) > 0
    token, query = (np.flatnonzero(keep) for keep in (shown_N & asked[cell_N], wanted_M))
    token, query = token[np.argsort(cell_N[token], kind="stable")], query[np.argsort(cell_M[query], kind="stable")]
    num_tokens = np.bincount(cell_N[token], minlength=cells_before[-1])[asked]
    num_queries = np.bincount(cell_M[query], minlength=cells_before[-1])[asked]
    starts = [np.cumsum(n) - n for n in (num_tokens, num_queries)]
    most = int(num_queries.max())
    slots, buckets = [], []
    for group in lengths_to_buckets(num_tokens):
        query_XQ = _run(query, starts[1][group], num_queries[group], most, len(cell_N))
        token_XL = _run(token, starts[0][group], num_tokens[group], int(num_tokens[group].max()), 0)
        slot_XJ = np.concatenate([query_XQ, token_XL], 1)
        slots.append(slot_XJ)
        see = (slot_XJ >= 0)[:, None, None]
        bias = None if see.all() else to_device(np.where(see, np.float32(0), np.float32(MASKED)), device).to(dtype)
        buckets.append(Bucket(len(group), slot_XJ.shape[1], bias))
    slot_T = np.concatenate([s.reshape(-1) for s in slots])
    leave = np.full(len(cell_M), -1)
    answers = np.concatenate([s[:, :most].reshape(-1) for s in slots])
    leave[answers[answers >= 0] - len(cell_N)] = np.flatnonzero(answers >= 0)
    leave[~np.concatenate([p.valid.reshape(-1) for p in parts])] = -1
    share = np.concatenate([*(p.token_share for p in parts), *(p.query_share for p in parts)])
    site = np.concatenate(
        [p.token_site + at for p, at in zip(parts, sites_before)]
        + [p.query_site + at for p, at in zip(parts, sites_before)]
    )
    there = np.maximum(slot_T, 0)
    return CellPlan(
        most, Sequences((tuple(buckets), tuple(buckets))),
        plan_take(slot_T, len(cell_N) + len(cell_M), device, blanks_matter=False), plan_take(leave, len(answers), device),
        to_device(np.concatenate([p.place for p in parts]), device), to_device(share[there].astype(np.float32), device),
        to_device(site[there], device), to_device(np.concatenate([p.ground for p in parts]), device), [p.valid for p in parts],
    )  # fmt: skip


def _run(items: np.ndarray, start_X: np.ndarray, count_X: np.ndarray, longest: int, offset: int) -> np.ndarray:
    """[X, longest]: each cell's items, from `offset` on; -1 past their end."""
    step_XL = np.broadcast_to(np.arange(longest), (len(start_X), longest))
    at_XL = np.minimum(start_X[:, None] + step_XL, max(len(items) - 1, 0))
    found = items[at_XL] + offset if len(items) else np.zeros_like(step_XL)
    return np.where(step_XL < count_X[:, None], found, -1)


class _View(NamedTuple):
    num_cells: int
    valid: np.ndarray
    token_cell: np.ndarray
    token_shown: np.ndarray
    token_share: np.ndarray
    token_site: np.ndarray
    query_cell: np.ndarray
    query_share: np.ndarray
    query_site: np.ndarray
    place: np.ndarray
    ground: np.ndarray


def _of_view(view: Mapping[str, Seen], table_side: int) -> _View:
    grids = {name: item.grid for name, item in view.items()}
    lead, coarse = grids[finest(grids)], grids[coarsest(grids)]
    sites = len(next(iter(view.values())).valid_BThw)
    num_cells = coarse.hw[0] * coarse.hw[1]
    cell, valid, shown, share, site = [], [], [], [], []
    covered = np.zeros((sites, *lead.hw), bool)
    for item in view.values():
        shape = item.valid_BThw.shape
        number = np.arange(sites)[:, None, None, None]
        cell.append(np.broadcast_to(number * num_cells + _cell_of(item.grid, coarse), shape).reshape(-1))
        site.append(np.broadcast_to(number, shape).reshape(-1))
        share.append(np.broadcast_to(_share(item.grid)[None, None], (*shape, 2)).reshape(-1, 2))
        valid.append(item.valid_BThw.reshape(-1))
        hidden = item.shown_B is not None and ~item.shown_B[:, None, None, None]
        shown.append((item.valid_BThw & ~np.broadcast_to(hidden, shape)).reshape(-1))
        rows, columns = (tokens_under(lead, item.grid, axis) for axis in (0, 1))
        covered |= np.asarray(item.valid_BThw.any(1))[:, rows][:, :, columns]
    token_cell, token_valid, token_shown = (np.concatenate(part) for part in (cell, valid, shown))
    left = np.bincount(token_cell[token_shown], minlength=sites * num_cells) > 0
    # a cell that no shown sensor sees is fused from all that there is: validity stays what masks say
    token_shown = np.where(left[token_cell], token_shown, token_valid)
    lead_cell = _cell_of(lead, coarse)
    first = np.argmax([item.valid_BThw.reshape(sites, -1).any(1) for item in view.values()], axis=0)
    return _View(
        sites * num_cells, covered, token_cell, token_shown, np.concatenate(share), np.concatenate(site),
        (np.arange(sites)[:, None, None] * num_cells + lead_cell).reshape(-1), np.tile(_share(lead).reshape(-1, 2), (sites, 1)),
        np.repeat(np.arange(sites), lead.hw[0] * lead.hw[1]), np.tile(_place_weights(lead, coarse, table_side), (sites, 1)), first,
    )  # fmt: skip


def _cell_of(grid: TokenGrid, coarse: TokenGrid) -> np.ndarray:
    """[h, w]: the cell under every token's centre."""
    rows, columns = (np.array(tokens_under(grid, coarse, axis)) for axis in (0, 1))
    return rows[:, None] * coarse.hw[1] + columns


def _share(grid: TokenGrid) -> np.ndarray:
    """[h, w, 2]: centres of tokens (row, column), as shares of the canvas's width."""
    rows, columns = ((np.arange(n) + 0.5) * grid.stride / grid.canvas[1] for n in grid.hw)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _place_weights(lead: TokenGrid, coarse: TokenGrid, side: int) -> np.ndarray:
    """float32 [y·x, R²]: bilinear weights of each place in its cell, between the centres of R x R parts of the cell."""
    axes = []
    for axis in (0, 1):
        cell = np.array(tokens_under(lead, coarse, axis))
        centre = (
            (np.arange(lead.hw[axis]) + 0.5) * lead.stride / lead.canvas[axis] * coarse.canvas[axis] / coarse.stride
        )
        where = np.clip((centre - cell) * side - 0.5, 0, side - 1)
        axes.append(np.maximum(0, 1 - np.abs(where[:, None] - np.arange(side))))
    return np.einsum("yr,xs->yxrs", *axes).reshape(-1, side * side).astype(np.float32)
