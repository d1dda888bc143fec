"""Multi-modal temporal fusion by cells of the ground: one transformer over [queries ‖ all tokens of all sensors and dates] of a cell; a
query's output is the fused feature at its place. Beside it runs a short way: the mean over dates of every sensor's tokens at the place, through
a linear layer per sensor, added before the last norm. Without it the fused features of a young network know less than the sensors beside one
another (`LOG.md`: ridge .54 against .63; with it .66 and .67). The predecessor unfolds every frame to the finest grid and runs one sequence per
place (`model.fusion`): sixteen times the frames for the same answers.

Dimension legend: B sites · T dates · h, w tokens of a sensor · y, x places · D backbone channels · F fusion channels · N tokens of all views ·
X queries · T rows of all sequences · R side of the table of query places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import initial
from model.cells import CellPlan, Seen, plan_cells
from model.config import ModelConfig
from model.fusion import NUM_DAYS, Frames
from model.grids import finest, tokens_under
from model.positions import rotary_table
from model.rows import plan_spread, spread, take, to_device
from model.transformer import Block, FeedForward


class CellFusion(nn.Module):
    """Fusion of the configured modalities. Missing sensors, dates and tokens are not there, never numbers."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.dim = cfg, cfg.fusion_dim
        self.project = nn.Linear(cfg.dims[3], self.dim)
        self.day = nn.Embedding(NUM_DAYS, self.dim)
        self.query_RF = nn.Parameter(torch.empty(cfg.query_side**2, self.dim))
        self.blocks = nn.ModuleList(
            Block(self.dim, cfg.fusion_heads, FeedForward(self.dim)) for _ in range(cfg.fusion_depth)
        )
        self.skip = nn.ModuleDict()
        if cfg.fusion.skip:
            self.skip.update({name: nn.Linear(cfg.dims[3], self.dim) for name in cfg.modalities})
        self.norm = nn.LayerNorm(self.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The blocks reset themselves."""
        initial.trunc_normal_(self.project.weight, std=0.02)
        initial.zeros_(self.project.bias)
        initial.trunc_normal_(self.day.weight, std=0.02)
        initial.trunc_normal_(self.query_RF, std=0.02)
        for linear in self.skip.values():
            assert isinstance(linear, nn.Linear)
            initial.trunc_normal_(
                linear.weight, std=linear.in_features**-0.5
            )  # tokens are normalised: as large as they are
            initial.zeros_(linear.bias)
        self.norm.reset_parameters()

    def forward(self, views: Sequence[dict[str, Frames]]) -> list[tuple[Tensor, Tensor]]:
        """Per view fused_ByxF, zero where not valid, and fused_valid_Byx: a place is valid if any token over it is."""
        frames = [item for view in views for item in view.values()]
        feat_ND = torch.cat([item.feat_BThwD.flatten(0, 3) for item in frames])
        plan = self.plan_of(views, feat_ND.dtype)
        x_NF = self._with_days(self.project(feat_ND), frames)
        query_XF = plan.place_XR.to(x_NF.dtype) @ self.query_RF.to(x_NF.dtype)
        x_TF = take(torch.cat([x_NF, query_XF]), plan.enter)
        rotary = self._rotary(views, plan)
        for block in self.blocks[:-1]:
            x_TF, _ = self._run(block, x_TF, plan.sequences, rotary)
        fused_XF = self._run(of_queries, self.blocks[-1], x_TF, plan.sequences, plan.num_queries, rotary)
        fused_XF = take(fused_XF if self.skip else self.norm(fused_XF), plan.leave)
        if self.skip:
            good_P1 = to_device(np.concatenate([valid.reshape(-1) for valid in plan.valid])[:, None], fused_XF.device)
            fused_XF = torch.where(good_P1, self.norm(fused_XF + self._short_way(views)), 0)
        masks = [to_device(valid, fused_XF.device) for valid in plan.valid]
        parts = fused_XF.split([valid.size for valid in plan.valid])
        return [(part.unflatten(0, mask.shape), mask) for part, mask in zip(parts, masks)]

    def _short_way(self, views: Sequence[dict[str, Frames]]) -> Tensor:
        """Σ over sensors of linear(mean over valid dates) at each place of all views, [P, F]. A sensor that is not there adds nothing;
        nor does one that the fusion shall not see, but where no other shows the place. Who is there the host knows.
        """
        total_PF: Tensor | float = 0.0
        used = [used_places(view) for view in views]
        for name in views[0]:
            items = [view[name] for view in views]
            rows_RD = torch.cat([_mean_of_dates(item).flatten(0, 2) for item in items])
            row, at = [], 0
            for view, item in zip(views, items):
                lead, (sites, h, w) = view[finest({n: i.grid for n, i in view.items()})].grid, _places(item)
                rows, columns = (np.array(tokens_under(lead, item.grid, axis)) for axis in (0, 1))
                cell = (rows[:, None] * w + columns).reshape(-1)
                row.append((at + np.arange(sites)[:, None] * h * w + cell).reshape(-1))
                at += sites * h * w
            plan = plan_spread(np.concatenate(row), at, rows_RD.device)
            weight = np.concatenate([part[name].reshape(-1) for part in used]).astype(np.float32)
            x_PF = spread(self.skip[name](rows_RD), plan)
            if not weight.all():
                x_PF = x_PF * to_device(weight[:, None], x_PF.device).to(x_PF.dtype)
            total_PF = total_PF + x_PF
        assert isinstance(total_PF, Tensor)
        return total_PF

    def plan_of(self, views: Sequence[dict[str, Frames]], dtype: torch.dtype) -> CellPlan:
        first = next(iter(views[0].values()))
        seen = [
            {name: Seen(item.host_valid, item.grid, item.host_shown) for name, item in view.items()} for view in views
        ]
        return plan_cells(seen, self.cfg.query_side, first.feat_BThwD.device, dtype)

    def _with_days(self, x_NF: Tensor, frames: list[Frames]) -> Tensor:
        """Adds to every token the embedding of its date's day of the year."""
        doy_I = torch.cat([item.doy_BT.flatten() for item in frames]).long().clamp(0, NUM_DAYS - 1)
        day_IF = self.day(doy_I).to(x_NF.dtype)
        dates, tokens = ([n(item) for item in frames] for n in (_num_dates, _num_tokens))
        rows = x_NF.split([d * t for d, t in zip(dates, tokens)])
        parts = zip(rows, dates, tokens, day_IF.split(dates))
        return torch.cat([(x.unflatten(0, (d, t)) + day[:, None]).flatten(0, 1) for x, d, t, day in parts])

    def _rotary(self, views: Sequence[dict[str, Frames]], plan: CellPlan) -> tuple[Tensor, Tensor]:
        """Places in metres: all sensors of a view show the same ground, a share of which is a place on all of them."""
        width_MB = torch.cat(
            [torch.stack([item.gsd_B.float() * item.grid.canvas[1] for item in view.values()]) for view in views], 1
        )
        ground_B = width_MB.gather(0, plan.ground[None])[0]
        metres_T2 = plan.share_T2 * ground_B.index_select(0, plan.site_T)[:, None]
        return rotary_table(metres_T2, self.dim // self.cfg.fusion_heads, self.cfg.rotary_base, self.cfg.reference_m)

    def _run(self, function: Any, *args: Any) -> Any:
        if self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


def of_queries(block: Block, *args: Any) -> Tensor:
    """The last block, for the queries alone: nobody reads the other outputs."""
    return block.of_queries(*args)


def used_places(view: dict[str, Frames]) -> dict[str, np.ndarray]:
    """Per sensor, bool [B, y, x]: the short way counts it at this place."""
    lead = view[finest({name: item.grid for name, item in view.items()})].grid
    there, shown = {}, {}
    for name, item in view.items():
        rows, columns = (tokens_under(lead, item.grid, axis) for axis in (0, 1))
        there[name] = np.asarray(item.host_valid.any(1))[:, rows][:, :, columns]
        shown[name] = there[name] if item.host_shown is None else there[name] & item.host_shown[:, None, None]
    any_Byx = np.any(list(shown.values()), axis=0)
    return {name: np.where(any_Byx, shown[name], there[name]) for name in view}


def _num_dates(item: Frames) -> int:
    return item.doy_BT.numel()


def _num_tokens(item: Frames) -> int:
    return item.host_valid.shape[2] * item.host_valid.shape[3]


def _places(item: Frames) -> tuple[int, int, int]:
    sites, _, h, w = item.host_valid.shape
    return sites, h, w


def _mean_of_dates(item: Frames) -> Tensor:
    """[B, h, w, D]: mean over the dates on which a token is valid; tokens are zero where they are not."""
    if item.host_valid.shape[1] == 1:
        return item.feat_BThwD[:, 0]
    share = item.host_valid / np.maximum(item.host_valid.sum(1, keepdims=True), 1)
    feat_BThwD = item.feat_BThwD
    exact = share if feat_BThwD.dtype == torch.float64 else share.astype(np.float32)
    return (feat_BThwD * to_device(exact[..., None], feat_BThwD.device).to(feat_BThwD.dtype)).sum(1)
