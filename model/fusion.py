"""Multi-modal temporal fusion as the predecessor has it (`fusion.kind: frames`; the default is `model.cell_fusion`): all frames of all
modalities on one token grid, and per ground location a transformer over [extra token ‖ every frame]; the extra token's output is the
fused feature.

The order of the two linear steps is ours: project to the fusion dim first, then unfold (the predecessor unfolded at full width, four
times the parameters for the same grid).

Dimension legend: B sites · T dates · h, w tokens of a modality · y, x cells of the fusion grid · D backbone channels · F fusion
channels · S frames of all modalities · X ground locations of all sites · J = 1 + S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import initial
from model.batch import View
from model.config import ModelConfig
from model.grids import TokenGrid, cell_under, finest, tokens_under
from model.plan import MASKED, Sequences
from model.transformer import Block, FeedForward

NUM_DAYS = 367  # 1-366, and 0 for a date that is unknown


@dataclass
class Frames:
    """Final-stage tokens of one modality of one view. host_valid: `valid_BThw` on the host; gsd_B: metres per pixel; shown_B: sites
    whose fusion sees this modality, None: all; host_shown: the same on the host.
    """

    feat_BThwD: Tensor
    valid_BThw: Tensor
    doy_BT: Tensor
    grid: TokenGrid
    host_valid: np.ndarray
    gsd_B: Tensor
    shown_B: Tensor | None = None
    host_shown: np.ndarray | None = None


class FrameFusion(nn.Module):
    """Fusion of the configured modalities. Missing dates, modalities and cloudy tokens are masked keys, never numbers."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, self.dim, self.checkpointing = cfg.dims[3], cfg.fusion_dim, cfg.activation_checkpointing
        self.factors = {name: cfg.upscale(name) for name in cfg.modalities}
        self.project = nn.Linear(dim, self.dim)
        self.unfold = nn.ModuleDict(
            {name: nn.Linear(self.dim, self.dim * r * r) for name, r in self.factors.items() if r > 1}
        )
        self.blocks = nn.ModuleList()
        if cfg.fusion_depth:
            self.day = nn.Embedding(NUM_DAYS, self.dim)
            self.extra_F = nn.Parameter(torch.empty(self.dim))
            self.blocks.extend(
                Block(self.dim, cfg.fusion_heads, FeedForward(self.dim)) for _ in range(cfg.fusion_depth)
            )
        self.norm = nn.LayerNorm(self.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The blocks reset themselves."""
        for linear in (self.project, *self.unfold.values()):
            assert isinstance(linear, nn.Linear)
            initial.trunc_normal_(linear.weight, std=0.02)
            initial.zeros_(linear.bias)
        if len(self.blocks):
            initial.trunc_normal_(self.day.weight, std=0.02)
            initial.trunc_normal_(self.extra_F, std=0.02)
        self.norm.reset_parameters()

    def forward(self, views: Sequence[dict[str, Frames]]) -> list[tuple[Tensor, Tensor]]:
        return [self.fuse(frames) for frames in views]

    def fuse(self, frames: dict[str, Frames]) -> tuple[Tensor, Tensor]:
        """Returns fused_ByxF and fused_valid_Byx: a location is valid if any frame is valid there."""
        cells = fusion_cells({name: item.grid for name, item in frames.items()}, self.factors)
        x_BSyxF = torch.cat([self._place(name, item, cells[name]) for name, item in frames.items()], dim=1)
        valid_BSyx = place_validity({name: item.valid_BThw for name, item in frames.items()}, cells, self.factors)
        valid_BSyx = only_shown(valid_BSyx, frames)
        grid = x_BSyxF.shape[2:4]
        num_sites = x_BSyxF.shape[0]
        x_XSF = x_BSyxF.permute(0, 2, 3, 1, 4).flatten(0, 2)
        valid_XS = valid_BSyx.permute(0, 2, 3, 1).flatten(0, 2)
        fused_XF = self.norm(self._average(x_XSF, valid_XS) if not len(self.blocks) else self._attend(x_XSF, valid_XS))
        any_X = valid_XS.any(1)
        fused_XF = torch.where(any_X[:, None], fused_XF, 0)
        return fused_XF.unflatten(0, (num_sites, *grid)), any_X.unflatten(0, (num_sites, *grid))

    def _place(self, name: str, item: Frames, cells: tuple[list[int], list[int]]) -> Tensor:
        """Frames of one modality on the fusion grid: project, unfold, then the cell under each location's centre.

        The unfolding is by the configured factor on any canvas: its weights are part of every graph (ranks must agree), and a
        canvas of another resolution only reads it more or less densely.
        """
        x, r = self.project(item.feat_BThwD), self.factors[name]
        if r > 1:
            x = self.unfold[name](x).unflatten(-1, (r, r, self.dim))
            x = x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        x = read_cells(x, cells)
        if len(self.blocks):
            x = x + self.day(item.doy_BT.long().clamp(0, NUM_DAYS - 1))[:, :, None, None, :].to(x.dtype)
        return x

    def _average(self, x_XSF: Tensor, valid_XS: Tensor) -> Tensor:
        total_XF = torch.where(valid_XS[..., None], x_XSF, 0).sum(1)
        return total_XF / valid_XS.sum(1, keepdim=True).clamp_min(1).to(x_XSF.dtype)

    def _attend(self, x_XSF: Tensor, valid_XS: Tensor) -> Tensor:
        """Only locations that have a frame, and only frames that exist somewhere, are worth their computation."""
        num_locations = x_XSF.shape[0]
        rows, columns = at_least_one(valid_XS.any(1)), at_least_one(valid_XS.any(0))
        if rows is not None:
            x_XSF, valid_XS = x_XSF.index_select(0, rows), valid_XS.index_select(0, rows)
        if columns is not None:
            x_XSF, valid_XS = x_XSF.index_select(1, columns), valid_XS.index_select(1, columns)
        x_XJF = torch.cat([self.extra_F.to(x_XSF.dtype).expand(x_XSF.shape[0], 1, -1), x_XSF], dim=1)
        bias = None if bool(valid_XS.all()) else key_bias(F.pad(valid_XS, (1, 0), value=True), x_XJF.dtype)
        sequences = Sequences.dense(x_XJF.shape[0], x_XJF.shape[1], bias)
        x_TF = x_XJF.flatten(0, 1)
        for block in self.blocks[:-1]:
            x_TF, _ = self._run(block, x_TF, sequences)
        fused_XF = self._run(block_of_queries, self.blocks[-1], x_TF, sequences)
        if rows is not None:
            fused_XF = fused_XF.new_zeros(num_locations, self.dim).index_copy(0, rows, fused_XF)
        return fused_XF

    def _run(self, function: Any, *args: Any) -> Any:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def only_shown(valid_BSyx: Tensor, frames: Mapping[str, Frames]) -> Tensor:
    """Hides the frames of modalities that a site's fusion shall not see, except where no other frame shows the location."""
    items = list(frames.values())
    if all(item.shown_B is None for item in items):
        return valid_BSyx
    every_B = torch.ones(len(valid_BSyx), dtype=torch.bool, device=valid_BSyx.device)
    shown_BS = torch.cat(
        [
            (every_B if i.shown_B is None else i.shown_B)[:, None].expand(-1, i.valid_BThw.shape[1])
            for i in items
        ], 1,
    )  # fmt: skip
    left_BSyx = valid_BSyx & shown_BS[:, :, None, None]
    return torch.where(left_BSyx.any(1, keepdim=True), left_BSyx, valid_BSyx)


def key_bias(valid_XJ: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for valid keys, MASKED for others, [X, 1, 1, J]."""
    zero = torch.zeros((), dtype=dtype, device=valid_XJ.device)
    return torch.where(valid_XJ, zero, MASKED)[:, None, None, :]


def block_of_queries(block: Block, x_TF: Tensor, sequences: Sequences, num: int = 1) -> Tensor:
    """The last block, for the queries alone: nobody reads the other outputs."""
    return block.of_queries(x_TF, sequences, num)


def fusion_cells(grids: Mapping[str, TokenGrid], factors: Mapping[str, int]) -> dict[str, tuple[list[int], list[int]]]:
    """Per modality, rows and columns of its unfolded grid that lie under the fusion grid's cells."""
    leader = grids[finest(grids)]
    found = {}
    for name, grid in grids.items():
        rows, columns = (
            cell_under(leader.hw[i], leader.stride, leader.canvas[i], factors[name], grid.stride, grid.canvas[i])
            for i in (0, 1)
        )
        found[name] = (rows, columns)
    return found


def read_cells(x_BTyx: Tensor, cells: tuple[list[int], list[int]]) -> Tensor:
    """Picks rows and columns (dimensions 2 and 3); nothing is copied where they are all of them in order."""
    for dim, wanted in zip((2, 3), cells):
        if wanted != list(range(x_BTyx.shape[dim])):
            x_BTyx = x_BTyx.index_select(dim, torch.tensor(wanted, device=x_BTyx.device))
    return x_BTyx


def place_validity(
    valid: Mapping[str, Tensor], cells: Mapping[str, tuple[list[int], list[int]]], factors: Mapping[str, int]
) -> Tensor:
    """Validity of every frame of every modality on the fusion grid, bool [B, S, y, x]."""
    placed = []
    for name, valid_BThw in valid.items():
        rows, columns = ([cell // factors[name] for cell in axis] for axis in cells[name])
        placed.append(read_cells(valid_BThw, (rows, columns)))
    return torch.cat(placed, dim=1)


def fused_tokens(cfg: ModelConfig, view: View, final: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """`Features.fused_valid` (on the host) and `.fused_like` of a view, from its final tokens' validity."""
    grids = {}
    for name, valid_BThw in final.items():
        height, width = view.modalities[name].valid_BTHW.shape[2:]
        grids[name] = TokenGrid((valid_BThw.shape[2], valid_BThw.shape[3]), (height, width), cfg.stride(name))
    lead = grids[finest(grids)]
    covered = np.zeros((len(next(iter(final.values()))), *lead.hw), bool)
    for name, valid_BThw in final.items():
        rows, columns = (tokens_under(lead, grids[name], axis) for axis in (0, 1))
        covered |= np.asarray(valid_BThw.any(1))[:, rows][:, :, columns]
    return covered, finest(grids)


def at_least_one(keep_X: Tensor) -> Tensor | None:
    """Indices of the kept rows, None if all are; the first row if none is, so that the graph stays connected."""
    if bool(keep_X.all()):
        return None
    index = keep_X.nonzero()[:, 0]
    return index if index.numel() else index.new_zeros(1)
