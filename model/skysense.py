"""SkySense V2: backbone and fusion over one view of a batch of sites.

Dimension legend: B sites · T dates · N = B·T images · h, w tokens · D backbone channels · y, x fusion cells · F fusion channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from model.rows import to_device
from model.transformer import Block
from model.validity import HostView


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
        known: Sequence[HostView] | None = None,
    ) -> list[Features]:
        """Features of several views in one pass of the network (see `forward`), the router's sums of all of them on the first.

        The same as one view after the other; expert layers are called once, and their weights read once. known: what
        the host knows of each view already; without it the host has to wait for it.
        """
        images = self._images(views, [self._seeds(view, seed_B) for view, seed_B in zip(views, seeds)], merges or {})
        where = [(number, name) for name in self.cfg.modalities for number in range(len(views))]
        shown = list(fused_BM or [None] * len(views))
        if known is None:
            hosts = [None if shown_BM is None else shown_BM.cpu().numpy() for shown_BM in shown]
        else:
            hosts = [item.fused_BM for item in known]
            firsts = [known[number].first[name] for number, name in where]
            images = [part._replace(host_Nhw=h.reshape(-1, *h.shape[2:])) for part, h in zip(images, firsts)]
        frames: list[dict[str, Frames]] = [{} for _ in views]
        after: list[dict[str, list[tuple[Tensor, Tensor]]]] = [{} for _ in views]
        results = self.backbone(images, pyramid=stages)
        for (number, name), tokens in zip(where, results):
            frames[number][name] = self._frames(views[number], name, tokens, shown[number], hosts[number])
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

    def _images(
        self, views: Sequence[View], seeds: Sequence[Tensor | None], merges: Mapping[str, tuple[bool, bool, bool]]
    ) -> list[Images]:
        """One set per modality and view, modality by modality. What each image has of its site is gathered for all sets at once."""
        names = [name for name in self.cfg.modalities for _ in views]
        parts = [view.modalities[name] for name in self.cfg.modalities for view in views]
        layouts = [part.valid_BTHW.shape[:2] for part in parts]
        sites_before = np.cumsum([0, *(len(view.side_m_B) for view in views)])
        row_before = np.cumsum([0, *(b for b, _ in layouts)])
        site = [np.repeat(np.arange(b), t) for b, t in layouts]
        device, counts = parts[0].valid_BTHW.device, [b * t for b, t in layouts]
        row_N = to_device(np.concatenate([own + at for own, at in zip(site, row_before)]), device)
        gsd = torch.cat([part.gsd_B for part in parts]).index_select(0, row_N).split(counts)
        seed: Sequence[Tensor | None] = [None] * len(parts)
        given = [seed_B for seed_B in seeds if seed_B is not None]
        if len(given) == len(views):
            first = np.concatenate([own + sites_before[i % len(views)] for i, own in enumerate(site)])
            seed_N = torch.cat(given).index_select(0, to_device(first, device))
            modality_N = np.repeat(np.arange(len(parts)) // len(views), counts)
            date_N = np.concatenate([np.tile(np.arange(t), b) for b, t in layouts])
            seed = image_seeds(seed_N, modality_N, date_N).split(counts)
        return [
            Images(
                name, part.x_BTCHW.flatten(0, 1), part.valid_BTHW.flatten(0, 1), gsd_N, seed_N,
                merges.get(name) or self.cfg.merges(name),
            )
            for name, part, gsd_N, seed_N in zip(names, parts, gsd, seed)
        ]  # fmt: skip

    def _frames(
        self, view: View, name: str, tokens: Tokens, fused_BM: Tensor | None, host_BM: np.ndarray | None
    ) -> Frames:
        part = view.modalities[name]
        layout, canvas = part.valid_BTHW.shape[:2], part.valid_BTHW.shape[2:]
        feat, valid = tokens.feat_NhwD.unflatten(0, layout), tokens.valid_Nhw.unflatten(0, layout)
        grid = TokenGrid((feat.shape[2], feat.shape[3]), (canvas[0], canvas[1]), tokens.stride)
        m = self.cfg.modalities.index(name)
        shown_B, host_shown = None if fused_BM is None else fused_BM[:, m], None if host_BM is None else host_BM[:, m]
        host = tokens.host_valid.reshape(valid.shape)
        return Frames(feat, valid, part.doy_BT, grid, host, part.gsd_B, shown_B, host_shown)

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
