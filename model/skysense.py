"""SkySense V2: backbone and fusion over one view of a batch of sites.

Dimension legend: B sites · T dates · N = B·T images · h, w tokens · D backbone channels · y, x fusion cells · F fusion channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import Images, Tokens, build_backbone
from model.batch import View
from model.cell_fusion import CellFusion
from model.config import ModelConfig
from model.droppath import image_seeds
from model.fusion import FrameFusion, Frames
from model.grids import TokenGrid, finest
from model.moe.balance import MoEStats
from model.transformer import Block


@dataclass
class Features:
    """What the model knows of one view.

    Attributes:
        dense: per modality [B, T, h, w, D]; zero where not valid.
        dense_valid: bool [B, T, h, w].
        stride: pixels of the modality's canvas per token side: token (i, j) covers pixels [i·stride, (i+1)·stride).
        fused: [B, y, x, F]; fused_valid: bool [B, y, x].
        fused_like: the modality whose token grid (and stride) the fused grid is.
        moe: per mixture-of-experts layer, router sums by modality, over all views of the call (on the first of them).
        stages: if asked for, per modality features and validity after each of the four stages, as `dense` and `dense_valid`.
    """

    dense: dict[str, Tensor]
    dense_valid: dict[str, Tensor]
    stride: dict[str, int]
    fused: Tensor
    fused_valid: Tensor
    fused_like: str
    moe: list[MoEStats]
    stages: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class SkySense(nn.Module):
    """Backbone(s) and fusion. Every call runs every configured modality, in config order, also where nothing is valid:
    ranks must meet in the same collectives, and every parameter must be part of every graph.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = build_backbone(cfg)
        self.fusion = CellFusion(cfg) if cfg.fuses_cells else FrameFusion(cfg)

    def reset_parameters(self) -> None:
        """Draws all weights anew, e.g. after `to_empty` of a model built on the meta device."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and module is not self:
                reset()

    def forward(
        self,
        view: View,
        sample_seed_B: Tensor | None = None,
        merges: Mapping[str, tuple[bool, bool, bool]] | None = None,
        fused_BM: Tensor | None = None,
        stages: bool = False,
    ) -> Features:
        """Features of one view of B sites.

        Args:
            view: normalised float pixels; whatever is invalid may be anything, NaN included.
            sample_seed_B: int64 per site (of sample, epoch, view), decides drop-path in training. None in training: drawn
                from the default generator.
            merges: merge or keep at the three transitions, for modalities that shall differ from the configuration.
            fused_BM: bool [B, modalities], which sensors the fusion sees of a site (modality dropout); None: all. A location that
                none of them shows is fused from all that there is, so that validity stays what masks say.
            stages: return the features after every stage too (`Features.stages`).
        """
        return self.views([view], [sample_seed_B], merges, [fused_BM], stages)[0]

    def views(
        self,
        views: Sequence[View],
        seeds: Sequence[Tensor | None],
        merges: Mapping[str, tuple[bool, bool, bool]] | None = None,
        fused_BM: Sequence[Tensor | None] | None = None,
        stages: bool = False,
    ) -> list[Features]:
        """Features of several views in one pass of the network (see `forward`), the router's sums of all of them on the first.

        The same as one view after the other; expert layers are called once, and their weights read once.
        """
        seeds = [self._seeds(view, seed_B) for view, seed_B in zip(views, seeds)]
        images, where = [], []
        for m, name in enumerate(self.cfg.modalities):
            merge = (merges or {}).get(name) or self.cfg.merges(name)
            for number, (view, seed_B) in enumerate(zip(views, seeds)):
                images.append(self._images(m, name, view, seed_B, merge))
                where.append((number, name))
        frames: list[dict[str, Frames]] = [{} for _ in views]
        shown = fused_BM or [None] * len(views)
        after: list[dict[str, list[tuple[Tensor, Tensor]]]] = [{} for _ in views]
        results = self.backbone(images, pyramid=stages)
        for (number, name), tokens in zip(where, results):
            frames[number][name] = self._frames(views[number], name, tokens, shown[number])
            if stages:
                layout = views[number].modalities[name].valid_BTHW.shape[:2]
                after[number][name] = [(f.unflatten(0, layout), v.unflatten(0, layout)) for f, v in tokens.pyramid]
        features = []
        for parts, maps, (fused, fused_valid) in zip(frames, after, self.fusion(frames)):
            grids = {name: item.grid for name, item in parts.items()}
            dense = {name: item.feat_BThwD for name, item in parts.items()}
            valid = {name: item.valid_BThw for name, item in parts.items()}
            stride = {name: grid.stride for name, grid in grids.items()}
            features.append(Features(dense, valid, stride, fused, fused_valid, finest(grids), [], maps))
        features[0].moe = results[0].moe
        return features

    def _images(self, m: int, name: str, view: View, seed_B: Tensor | None, merges: tuple[bool, bool, bool]) -> Images:
        part = view.modalities[name]
        dates = part.valid_BTHW.shape[1]
        seed_N = None if seed_B is None else image_seeds(seed_B, m, dates).flatten()
        gsd_N = part.gsd_B.repeat_interleave(dates)
        return Images(name, part.x_BTCHW.flatten(0, 1), part.valid_BTHW.flatten(0, 1), gsd_N, seed_N, merges)

    def _frames(self, view: View, name: str, tokens: Tokens, fused_BM: Tensor | None) -> Frames:
        part = view.modalities[name]
        layout, canvas = part.valid_BTHW.shape[:2], part.valid_BTHW.shape[2:]
        feat, valid = tokens.feat_NhwD.unflatten(0, layout), tokens.valid_Nhw.unflatten(0, layout)
        grid = TokenGrid((feat.shape[2], feat.shape[3]), (canvas[0], canvas[1]), tokens.stride)
        shown_B = None if fused_BM is None else fused_BM[:, self.cfg.modalities.index(name)]
        host = tokens.host_valid.reshape(valid.shape)
        return Frames(feat, valid, part.doy_BT, grid, host, part.gsd_B, shown_B)

    def _seeds(self, view: View, sample_seed_B: Tensor | None) -> Tensor | None:
        if not self.training or self.cfg.drop_path == 0.0:
            return None
        if sample_seed_B is None:
            return torch.randint(0, 2**62, view.side_m_B.shape, device=view.side_m_B.device)
        return sample_seed_B

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` of every block of backbone and fusion, in place. Blocks of one kind share their compiled code; each kind
        meets several grids (modalities, views), hence the higher limit on recompilations.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.backbone.compile_blocks(**options)
        for block in self.fusion.blocks[:-1]:
            assert isinstance(block, Block)
            block.compile_in_place(**options)
