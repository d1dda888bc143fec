"""The backbone: tokenizers, two SwinV2 stages, two transformer stages, adaptive merging between them, one set of weights for all
modalities.

Dimension legend: N images (dates folded in) · C bands · H, W pixels · h, w tokens · L = h·w · P prompts · J = P + L · D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from model.config import ModelConfig
from model.droppath import keep_factors
from model.merging import AdaptivePatchMerging
from model.moe.balance import CallStats
from model.positions import LearnedPosition, rotary_table, token_centres_m, window_layouts
from model.prompts import Prompts
from model.swin import SwinBlock
from model.tokenizers import Tokenizer
from model.transformer import Block, Layout, build_block


@dataclass
class Tokens:
    """Result of one backbone call.

    Attributes:
        feat_NhwD: final-stage tokens, normalised. valid_Nhw: bool.
        stride: pixels per token side.
        moe: router sums per mixture-of-experts block, in order.
        pyramid: (features, validity) after each of the four stages, if asked for.
    """

    feat_NhwD: Tensor
    valid_Nhw: Tensor
    stride: int
    moe: list[CallStats]
    pyramid: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Backbone(nn.Module):
    """One network for `modalities` (all of the config's, or one of them where backbones are separate)."""

    def __init__(self, cfg: ModelConfig, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        names = cfg.modalities if modalities is None else modalities
        dims, depths = cfg.dims, cfg.depths
        self.tokenizers = nn.ModuleDict(
            {name: Tokenizer(name, dims[0], cfg.patch, cfg.token_min_valid, cfg.tokenizer_bias) for name in names}
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
                    blocks.append(SwinBlock(dims[s], heads, shifted))
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

    def forward(
        self,
        modality: str,
        x_NCHW: Tensor,
        valid_NHW: Tensor,
        gsd_N: Tensor,
        seed_N: Tensor | None = None,
        merges: tuple[bool, bool, bool] | None = None,
        pyramid: bool = False,
    ) -> Tokens:
        """Features of N images of one modality.

        Args:
            x_NCHW: normalised pixels; where not valid they may be anything, NaN included.
            gsd_N: metres per pixel, for rotary positions.
            seed_N: int64, drop-path seed per image (`model.droppath.image_seeds`); None: no drop-path.
            merges: merge or keep at the three transitions; None: as configured. No other weights are involved.
        """
        merges = self.cfg.merges(modality) if merges is None else merges
        x_NHWD, valid_NHW = self.tokenizers[modality](x_NCHW, valid_NHW)
        x_NHWD = self.embed_norm(x_NHWD)
        # One look at the data per call instead of one mask per block: most crops are wholly valid.
        all_valid = not torch.compiler.is_compiling() and not valid_NHW.is_meta and bool(valid_NHW.all())
        tokens = Tokens(x_NHWD, valid_NHW, self.cfg.patch, [])
        for s in range(4):
            if s:
                merge = merges[s - 1]
                tokens.feat_NhwD, tokens.valid_Nhw = self.merges[s - 1](tokens.feat_NhwD, tokens.valid_Nhw, merge)
                tokens.stride *= 2 if merge else 1
            if s < 2:
                self._swin_stage(s, tokens, all_valid, seed_N)
            else:
                self._transformer_stage(s, modality, tokens, all_valid, gsd_N, seed_N)
            if pyramid:
                tokens.pyramid.append((tokens.feat_NhwD, tokens.valid_Nhw))
        tokens.feat_NhwD = self.norm(tokens.feat_NhwD)
        return tokens

    def _swin_stage(self, s: int, tokens: Tokens, all_valid: bool, seed_N: Tensor | None) -> None:
        layouts = window_layouts(tokens.valid_Nhw, all_valid, self.cfg.window)
        for i, block in enumerate(self._blocks(s)):
            tokens.feat_NhwD = self._run(block, tokens.feat_NhwD, layouts, self._keep(s, i, seed_N))

    def _transformer_stage(
        self, s: int, modality: str, tokens: Tokens, all_valid: bool, gsd_N: Tensor, seed_N: Tensor | None
    ) -> None:
        height, width = tokens.feat_NhwD.shape[1:3]
        x_NLD, valid_NL = tokens.feat_NhwD.flatten(1, 2), tokens.valid_Nhw.flatten(1, 2)
        num_prompts = self.cfg.prompts
        centres_NL2 = token_centres_m(height, width, tokens.stride, gsd_N)
        if self.cfg.position == "learned":
            x_NLD = x_NLD + self.positions[s - 2](centres_NL2).to(x_NLD.dtype)
        rotary = None
        if self.cfg.position == "rotary_m":
            cfg = self.cfg
            rotary = rotary_table(centres_NL2, cfg.head_dim, cfg.rotary_base, cfg.reference_m, num_prompts)
        any_N1 = valid_NL.any(1, keepdim=True)
        valid_NJ = torch.cat([any_N1.expand(-1, num_prompts), valid_NL], dim=1)
        windows = None
        if self.cfg.attention == "window":
            windows = window_layouts(tokens.valid_Nhw, all_valid, self.cfg.window)
        layout = Layout((height, width), num_prompts, valid_NJ, all_valid, rotary, windows)
        x_NJD = self.prompts[s - 2](modality, x_NLD)
        for i, block in enumerate(self._blocks(s)):
            x_NJD, stats = self._run(block, x_NJD, layout, self._keep(s, i, seed_N))
            if stats is not None:
                tokens.moe.append(stats)
        tokens.feat_NhwD = x_NJD[:, num_prompts:].unflatten(1, (height, width))

    def _blocks(self, s: int) -> list[nn.Module]:
        return list(self.stages[s].children())

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if not (self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*args)
        # No early stop: a recomputation must repeat every collective of expert parallelism, on every rank alike.
        with set_checkpoint_early_stop(False):
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    def _keep(self, s: int, i: int, seed_N: Tensor | None) -> Tensor | None:
        """Drop-path factors of block i of stage s; the rate grows linearly with depth from 0 to `drop_path`."""
        depths = self.cfg.depths
        layer = sum(depths[:s]) + i
        rate = self.cfg.drop_path * layer / max(sum(depths) - 1, 1)
        if seed_N is None or rate == 0.0:
            return None
        return keep_factors(seed_N, layer, rate)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block in place (`nn.Module.compile`): parameter names and checkpoints stay as they are.

        Call it last, after expert parallelism was applied.
        """
        for s in range(4):
            for block in self._blocks(s):
                block.compile_in_place(**options) if isinstance(block, Block) else block.compile(**options)


class SeparateBackbones(nn.Module):
    """The predecessor's design, as a baseline: a backbone of its own for every modality."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.each = nn.ModuleDict({name: Backbone(cfg, (name,)) for name in cfg.modalities})

    def forward(self, modality: str, *args: Any, **kwargs: Any) -> Tokens:
        return self.each[modality](modality, *args, **kwargs)

    def compile_blocks(self, **options: Any) -> None:
        for backbone in self.each.values():
            assert isinstance(backbone, Backbone)
            backbone.compile_blocks(**options)


def build_backbone(cfg: ModelConfig) -> Backbone | SeparateBackbones:
    return SeparateBackbones(cfg) if cfg.separate else Backbone(cfg)
