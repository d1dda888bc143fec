"""SkySense V2: backbone and fusion over one view of a batch of sites.

Dimension legend: B sites · T dates · N = B·T images · h, w tokens · D backbone channels · y, x fusion cells · F fusion channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import SeparateBackbones, Tokens, build_backbone
from model.batch import ModalityView, View
from model.config import ModelConfig
from model.droppath import image_seeds
from model.fusion import Frames, Fusion, TokenGrid, at_least_one, fusion_leader
from model.moe.balance import CallStats, MoEStats, stack_modalities
from model.transformer import Block


@dataclass
class Features:
    """What the model knows of one view.

    Attributes:
        dense: per modality [B, T, h, w, D]; zero where a whole image is invalid, meaningless at other invalid tokens.
        dense_valid: bool [B, T, h, w].
        stride: pixels of the modality's canvas per token side: token (i, j) covers pixels [i·stride, (i+1)·stride).
        fused: [B, y, x, F]; fused_valid: bool [B, y, x].
        fused_like: the modality whose token grid (and stride) the fused grid is.
        moe: per mixture-of-experts layer, router sums by modality.
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
        self.fusion = Fusion(cfg)

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
        seed_B = self._seeds(view, sample_seed_B)
        dense, dense_valid, stride, grids, frames, calls = {}, {}, {}, {}, {}, []
        after: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for m, name in enumerate(self.cfg.modalities):
            part = view.modalities[name]
            num_dates = part.valid_BTHW.shape[1]
            seeds_BT = None if seed_B is None else image_seeds(seed_B, m, num_dates)
            tokens = self._images(name, part, seeds_BT, (merges or {}).get(name), stages)
            dense[name], dense_valid[name], stride[name] = tokens.feat_NhwD, tokens.valid_Nhw, tokens.stride
            hw, canvas = tokens.valid_Nhw.shape[2:], part.valid_BTHW.shape[2:]
            grids[name] = TokenGrid((hw[0], hw[1]), (canvas[0], canvas[1]), tokens.stride)
            shown_B = None if fused_BM is None else fused_BM[:, m]
            frames[name] = Frames(tokens.feat_NhwD, tokens.valid_Nhw, part.doy_BT, grids[name], shown_B)
            calls.append(tokens.moe)
            if stages:
                after[name] = tokens.pyramid
        fused, fused_valid = self.fusion(frames)
        return Features(dense, dense_valid, stride, fused, fused_valid, fusion_leader(grids), self._stats(calls), after)

    def _seeds(self, view: View, sample_seed_B: Tensor | None) -> Tensor | None:
        if not self.training or self.cfg.drop_path == 0.0:
            return None
        if sample_seed_B is None:
            return torch.randint(0, 2**62, view.side_m_B.shape, device=view.side_m_B.device)
        return sample_seed_B

    def _images(
        self, name: str, part: ModalityView, seeds_BT: Tensor | None, merges: tuple[bool, bool, bool] | None,
        pyramid: bool = False,
    ) -> Tokens:  # fmt: skip
        """Runs the images that have any valid pixel (at least one image, see the class) and lays the results out as
        [B, T, h, w, …]; the others are zero and invalid.
        """
        sites, dates = part.valid_BTHW.shape[:2]
        x_NCHW, valid_NHW = part.x_BTCHW.flatten(0, 1), part.valid_BTHW.flatten(0, 1)
        gsd_N = part.gsd_B.repeat_interleave(dates)
        seed_N = None if seeds_BT is None else seeds_BT.flatten()
        kept = None if valid_NHW.is_meta else at_least_one(valid_NHW.flatten(1).any(1))
        if kept is not None:
            x_NCHW, valid_NHW, gsd_N = x_NCHW[kept], valid_NHW[kept], gsd_N[kept]
            seed_N = None if seed_N is None else seed_N[kept]
        tokens = self.backbone(name, x_NCHW, valid_NHW, gsd_N, seed_N, merges, pyramid)

        def laid_out(of_images: Tensor) -> Tensor:
            if kept is not None:
                of_images = of_images.new_zeros(sites * dates, *of_images.shape[1:]).index_copy(0, kept, of_images)
            return of_images.unflatten(0, (sites, dates))

        maps = [(laid_out(feat), laid_out(valid)) for feat, valid in tokens.pyramid]
        return Tokens(laid_out(tokens.feat_NhwD), laid_out(tokens.valid_Nhw), tokens.stride, tokens.moe, maps)

    def _stats(self, calls: list[list[CallStats]]) -> list[MoEStats]:
        """By layer and modality. With separate backbones each layer belongs to one modality; it is padded with zeros
        so that all layers have the same form."""
        if not isinstance(self.backbone, SeparateBackbones):
            return [stack_modalities(list(layer)) for layer in zip(*calls)]
        layers = []
        for m, own in enumerate(calls):
            for stats in own:
                zeros = CallStats(*(torch.zeros_like(t) for t in stats))
                layers.append(stack_modalities([stats if i == m else zeros for i in range(len(calls))]))
        return layers

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` of every block of backbone and fusion, in place. Blocks of one kind share their compiled code; each kind
        meets several grids (modalities, views), hence the higher limit on recompilations.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.backbone.compile_blocks(**options)
        for block in self.fusion.blocks[:-1]:
            assert isinstance(block, Block)
            block.compile_in_place(**options)
