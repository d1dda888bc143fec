"""The backbone: tokenizers, two SwinV2 stages, two transformer stages, adaptive merging between them, one set of weights for all
modalities. All images of a call, of whatever modality, view and size, go through it together (`model.plan`).

Dimension legend: N images of a set · C bands · H, W pixels · h, w tokens · T packed rows · R tokens of all grids · D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from model.config import ModelConfig
from model.droppath import keep_factors
from model.merging import AdaptivePatchMerging
from model.moe.balance import MoEStats
from model.plan import ImageSet, Stage, TrunkPlan, plan_trunk, present
from model.positions import LearnedPosition, rotary_table
from model.precision import autocast_dtype
from model.prompts import Prompts
from model.rows import take
from model.swin import SwinBlock
from model.tokenizers import Tokenizer
from model.transformer import Block, build_block
from model.validity import on_host, patch_validity


class Images(NamedTuple):
    """N images of one modality. x_NCHW: normalised pixels; where not valid they may be anything, NaN included. gsd_N: metres per
    pixel. seed_N: int64, drop-path seed per image (`model.droppath.image_seeds`); None: no drop-path. merges: merge or keep at
    the three transitions, whatever it was trained with: no other weights are involved. host_Nhw: validity of the first-stage tokens on
    the host, where it is known already.
    """

    modality: str
    x_NCHW: Tensor
    valid_NHW: Tensor
    gsd_N: Tensor
    seed_N: Tensor | None
    merges: tuple[bool, bool, bool]
    host_Nhw: np.ndarray | None = None


@dataclass
class Tokens:
    """Result for one set of images.

    Attributes:
        feat_NhwD: final-stage tokens, normalised, zero where not valid. valid_Nhw: bool; host_valid: the same on the host.
        stride: pixels per token side.
        moe: router sums per mixture-of-experts block, in order, of the whole call.
        pyramid: (features, validity) after each of the four stages, if asked for.
    """

    feat_NhwD: Tensor
    valid_Nhw: Tensor
    stride: int
    moe: list[MoEStats]
    host_valid: np.ndarray
    pyramid: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Backbone(nn.Module):
    """One network for `modalities` (all of the config's, or one of them where backbones are separate)."""

    def __init__(self, cfg: ModelConfig, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        names = cfg.modalities if modalities is None else modalities
        dims, depths = cfg.dims, cfg.depths
        self.tokenizers = nn.ModuleDict(
            {name: Tokenizer(name, dims[0], cfg.patch, cfg.tokenizer_bias) for name in names}
        )
        self.embed_norm = nn.LayerNorm(dims[0])
        experts = cfg.moe.placed(depths[2] + depths[3])
        stages: list[nn.ModuleList] = []
        for s in range(4):
            blocks: list[nn.Module] = []
            for i in range(depths[s]):
                shifted = i % 2 == 1
                heads = dims[s] // cfg.head_dim
                if s < 2:
                    blocks.append(SwinBlock(dims[s], heads, shifted, cfg.window))
                    continue
                place = i if s == 2 else depths[2] + i
                moe = (cfg.moe.experts, cfg.moe.top_k, cfg.moe.grouped) if place in experts else None
                blocks.append(build_block(dims[s], heads, moe, shifted))
            stages.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(stages)
        self.merges = nn.ModuleList([AdaptivePatchMerging(dims[s]) for s in range(3)])
        self.prompts = nn.ModuleList([Prompts(names, cfg.prompts, dims[s]) for s in (2, 3)])
        self.positions = nn.ModuleList()
        if cfg.position == "learned":
            extent_m = cfg.learned_grid * cfg.learned_cell_m
            self.positions.extend(LearnedPosition(cfg.learned_grid, dims[s], extent_m) for s in (2, 3))
        self.norm = nn.LayerNorm(dims[3])

    def forward(self, images: Sequence[Images], plan: TrunkPlan | None = None, pyramid: bool = False) -> list[Tokens]:
        """Features of several sets of images in one pass, one result per set.

        plan: `plan_of` these images, if it is known already.
        """
        plan = self.plan_of(images) if plan is None else plan
        x_TC = self.embed_norm(self._tokenize(images, plan))
        keep, moe, maps = self._keep(images, plan), [], []
        gsd_N = torch.cat([part.gsd_N for part in images]).float()
        for s, stage in enumerate(plan.stages):
            if s:
                x_TC = self.merges[s - 1](x_TC, plan.transitions[s - 1])
            if s < 2:
                x_TC = self._swin(s, x_TC, stage, keep[s])
            else:
                x_TC, stats = self._transform(s, x_TC, stage, keep[s], gsd_N, present(self.cfg, plan.sets))
                moe.extend(stats)
            if pyramid:
                maps.append(take(x_TC, plan.dense(s)))
        final_RD = take(self.norm(x_TC), plan.dense(3))
        return _unpack(self.cfg, plan, final_RD, maps, moe)

    def plan_of(self, images: Sequence[Images]) -> TrunkPlan:
        """Where every token of these images stands; the host asks the device for their validity, once, if it has to."""
        grids = [part.host_Nhw for part in images if part.host_Nhw is not None]
        if len(grids) < len(images):
            grids = on_host([patch_validity(p.valid_NHW, self.cfg.patch, self.cfg.token_min_valid) for p in images])
        sets = [ImageSet(p.modality, grid, p.merges) for p, grid in zip(images, grids)]
        weight = self.norm.weight
        dtype = autocast_dtype(weight.device) or weight.dtype
        return plan_trunk(self.cfg, sets, images[0].valid_NHW.device, dtype)

    def _tokenize(self, images: Sequence[Images], plan: TrunkPlan) -> Tensor:
        """Rows of the first stage, set by set; sets of one modality (they are neighbours) share a product."""
        rows: list[Tensor] = []
        for name in dict.fromkeys(part.modality for part in images):
            wanted = []
            for part, kept, members in zip(images, plan.kept, plan.members):
                if part.modality == name:
                    x, valid = part.x_NCHW, part.valid_NHW
                    if kept is not None:
                        x, valid = x.index_select(0, kept), valid.index_select(0, kept)
                    wanted.append((x, valid, members))
            rows.append(self.tokenizers[name](wanted))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _swin(self, s: int, x_TC: Tensor, stage: Stage, keep: Tensor | None) -> Tensor:
        for i, block in enumerate(self._blocks(s)):
            x_TC = self._run(block, x_TC, stage.windows, None if keep is None else keep[i])
        return x_TC

    def _transform(
        self, s: int, x_TC: Tensor, stage: Stage, keep: Tensor | None, gsd_N: Tensor, names: list[str]
    ) -> tuple[Tensor, list[MoEStats]]:
        cfg, enter, sequences = self.cfg, stage.enter, stage.sequences
        assert enter is not None
        assert stage.centre_T2 is not None
        if cfg.position == "learned":
            assert stage.entry_centre_E2 is not None
            assert stage.entry_image_E is not None
            metres_E2 = stage.entry_centre_E2 * gsd_N.index_select(0, stage.entry_image_E)[:, None]
            x_TC = x_TC + self.positions[s - 2](metres_E2).to(x_TC.dtype)
        if cfg.prompts:
            x_TC = torch.cat([x_TC, self.prompts[s - 2](stage.prompt_KM, names).to(x_TC.dtype)])
        rotary = None
        if cfg.position == "rotary_m":
            metres_T2 = stage.centre_T2 * gsd_N.index_select(0, stage.image_T)[:, None]
            rotary = rotary_table(metres_T2, cfg.head_dim, cfg.rotary_base, cfg.reference_m)
        x_TC, found = take(x_TC, enter), []
        for i, block in enumerate(self._blocks(s)):
            x_TC, stats = self._run(block, x_TC, sequences, rotary, None if keep is None else keep[i])
            if stats is not None:
                found.append(stats)
        return x_TC, found

    def _keep(self, images: Sequence[Images], plan: TrunkPlan) -> list[Tensor | None]:
        """Drop-path factors by stage, [blocks, 2, T]; the rate grows linearly with depth from 0 to `drop_path`."""
        depths = self.cfg.depths
        seeds = [part.seed_N for part in images if part.seed_N is not None]
        if self.cfg.drop_path == 0.0 or len(seeds) < len(images):
            return [None] * 4
        rates = [self.cfg.drop_path * layer / max(sum(depths) - 1, 1) for layer in range(sum(depths))]
        by_stage = keep_factors(torch.cat(seeds), rates).split(depths)
        return [table.index_select(2, stage.image_T) for table, stage in zip(by_stage, plan.stages)]

    def _blocks(self, s: int) -> list[nn.Module]:
        return list(self.stages[s].children())

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if not (self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*args)
        # No early stop: a recomputation must repeat every collective of expert parallelism, on every rank alike.
        with set_checkpoint_early_stop(False):
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block in place (`nn.Module.compile`): parameter names and checkpoints stay as they are.

        Call it last, after expert parallelism was applied.
        """
        for s in range(4):
            for block in self._blocks(s):
                block.compile_in_place(**options) if isinstance(block, Block) else block.compile(**options)


def _unpack(
    cfg: ModelConfig, plan: TrunkPlan, final_RD: Tensor, maps: list[Tensor], moe: list[MoEStats]
) -> list[Tokens]:
    """All tokens of all grids to one result per set."""
    found = []
    stages = [*range(4), 3] if maps else [3]
    tables = [
        rows.split([valid[s].size for valid in plan.valid]) for s, rows in zip(stages, [*maps, final_RD], strict=True)
    ]
    for images, valid, *parts in zip(plan.sets, plan.valid, *tables):
        levels = [part.unflatten(0, valid[s].shape) for s, part in zip(stages, parts)]
        masks = [torch.from_numpy(v).to(final_RD.device, non_blocking=True) for v in (valid if maps else valid[3:])]
        stride = cfg.patch * 2 ** sum(images.merges)
        found.append(Tokens(levels[-1], masks[-1], stride, moe, valid[3], list(zip(levels[:-1], masks))))
    return found


class SeparateBackbones(nn.Module):
    """The predecessor's design, as a baseline: a backbone of its own for every modality."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.each = nn.ModuleDict({name: Backbone(cfg, (name,)) for name in cfg.modalities})

    def forward(self, images: Sequence[Images], plan: None = None, pyramid: bool = False) -> list[Tokens]:
        found: dict[int, Tokens] = {}
        moe: list[MoEStats] = []
        for name, backbone in self.each.items():
            mine = [i for i, part in enumerate(images) if part.modality == name]
            if mine:
                results = backbone([images[i] for i in mine], pyramid=pyramid)
                moe.extend(results[0].moe)
                found.update(zip(mine, results))
        for tokens in found.values():
            tokens.moe = moe
        return [found[i] for i in range(len(images))]

    def compile_blocks(self, **options: Any) -> None:
        for backbone in self.each.values():
            assert isinstance(backbone, Backbone)
            backbone.compile_blocks(**options)


def build_backbone(cfg: ModelConfig) -> Backbone | SeparateBackbones:
    return SeparateBackbones(cfg) if cfg.separate else Backbone(cfg)
