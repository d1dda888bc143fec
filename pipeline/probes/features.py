"""What is known of sites without their labels: pooled per site and, for segmentation, per 10 m label pixel.

A `Describer` turns one batch of views into named tensors: a frozen network (`network`), or the statistics of the very same pixels
(`pipeline.probes.pixels`). `extract` runs several of them over sites that are read once.
Dimension legend: S sites · D feature dim · P label pixels of a site · h, w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_prep.schema import SiteArrays
from model.batch import View, _map
from model.inputs import normalise
from model.skysense import Features
from pipeline.config import ViewConfig
from pipeline.probes.sites import view_of_sites

FUSED = "fused"
MAX_PIXELS = 4096  # label pixels of one site
ALL_PIXELS = 2**19  # label pixels of all sites together
MIN_VARIANCE = 1e-12
BATCH_PIXELS, MAX_BATCH = 2**23, 32  # canvas pixels of all dates, and sites, of one forward pass
STAGES = (1, 2, 3, 4)

# (normalised view, label raster of the same ground or None, label pixels wanted) → tensors as `SiteFeatures.of` takes them
Describer = Callable[[View, Tensor | None, int], dict[str, Tensor]]


@dataclass
class SiteFeatures:
    """Of all sites, in the order asked for.

    Attributes:
        pooled: per modality and FUSED, float32 [S, D]: over valid tokens and dates, see `ProbeConfig.pool` (means come first).
        present: bool [S]: false where the site has no valid token of it.
        pixels: if asked for, float16 [S, P, D]: feature of the token under each label pixel, mean over its valid dates.
        pixel_valid: bool [S, P].
        classes: int16 [S, P] labels of the pixels, -1 unlabelled.
    """

    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    pixels: dict[str, Tensor]
    pixel_valid: dict[str, Tensor]
    classes: Tensor | None

    @staticmethod
    def of(named: Mapping[str, Tensor]) -> SiteFeatures:
        """From tensors named `pooled:m`, `present:m`, `pixels:m`, `valid:m` and `classes`."""
        kinds = {
            kind: {name.removeprefix(f"{kind}:"): value for name, value in named.items() if name.startswith(f"{kind}:")}
            for kind in ("pooled", "present", "pixels", "valid")
        }
        return SiteFeatures(kinds["pooled"], kinds["present"], kinds["pixels"], kinds["valid"], named.get("classes"))

    @staticmethod
    def joined(parts: Sequence[Mapping[str, Tensor]]) -> SiteFeatures:
        """From what a describer gave for one batch after the other; of label pixels the shorter ones are filled up, unlabelled."""
        merged = {}
        for name in parts[0]:
            tensors = [part[name] for part in parts]
            if name.startswith(("pixels:", "valid:", "classes")):
                most = max(t.shape[1] for t in tensors)
                fill = -1 if name == "classes" else 0
                tensors = [
                    torch.cat([t, t.new_full((len(t), most - t.shape[1], *t.shape[2:]), fill)], 1) for t in tensors
                ]
            merged[name] = torch.cat(tensors)
        return SiteFeatures.of(merged)


ON_THE_WIRE = {torch.bool: torch.uint8, torch.int16: torch.int32}  # gloo gathers neither


def network(skysense: nn.Module, pool: str = "mean_std", stage: str | int = "last") -> Describer:
    """Describes views by a frozen network's features. pool, stage: as `ProbeConfig` has them."""

    def describe(view: View, labels_BHW: Tensor | None, num_pixels: int) -> dict[str, Tensor]:
        dtype = next(skysense.parameters()).dtype
        view = _map(view, lambda t: t)  # a copy: other describers see the view as it was
        for part in view.modalities.values():
            part.x_BTCHW = part.x_BTCHW.to(dtype)
        was_training = skysense.training
        skysense.eval()
        features = skysense(view, stages=stage != "last")
        skysense.train(was_training)
        return features_of(features, view, labels_BHW, num_pixels, pool, stage)

    return describe


def extract(
    describers: Sequence[Describer],
    modalities: Sequence[str],
    read: Callable[[int], SiteArrays],
    rows: Sequence[int],
    view: ViewConfig,
    statistics: Mapping[str, Mapping[str, object]],
    raster: str | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], Any] = lambda sites: None,
) -> list[SiteFeatures]:
    """What each describer says of `rows`, shared out over all ranks of the job (each reads its own), gathered on every one.

    Every rank makes the same number of forward passes, the last ones with nothing valid in them if it runs out of
    sites: experts may lie on other ranks, and their collectives must meet. batch: sites per pass, by default as many as
    BATCH_PIXELS allows. advance: is told how many of this rank's sites are done.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch = batch or sites_per_pass(view, modalities)
    mine = list(rows[rank::world])
    passes = math.ceil(math.ceil(len(rows) / world) / batch)
    num_pixels = min(MAX_PIXELS, max(16, ALL_PIXELS // len(rows)))
    parts: list[list[dict[str, Tensor]]] = [[] for _ in describers]
    with torch.no_grad():
        for k in range(passes):
            chunk = mine[k * batch : (k + 1) * batch]
            sites = [read(row) for row in chunk]
            blank = SiteArrays("", "", (0, 0, 0, 0), (0.0, 0.0, view.series_px * 10.0, view.series_px * 10.0), {}, "")
            raw = view_of_sites([*sites, *[blank] * (batch - len(sites))], view, modalities, raster)
            seen = normalise(raw.to(device), statistics)
            for described, describe in zip(parts, describers):
                described.append(describe(seen, seen.classes_BHW if raster is not None else None, num_pixels))
            advance(len(sites))
    merged = ({name: torch.cat([part[name] for part in described]) for name in described[0]} for described in parts)
    return [SiteFeatures.of(gathered(named, passes * batch, len(rows))) for named in merged]


def gathered(named: Mapping[str, Tensor], share: int, total: int) -> dict[str, Tensor]:
    """Rows of this rank (every `world`-th of `total`), with those of the others, in order. share: rows that every rank sends, filled up
    where it has fewer; those beyond `total` are cut off."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return {name: value[:total] for name, value in named.items()}
    filled = {
        name: torch.cat([value, value.new_zeros(share - len(value), *value.shape[1:])]) for name, value in named.items()
    }
    return {name: _gather(value, world)[:total] for name, value in filled.items()}


def sites_per_pass(view: ViewConfig, modalities: Sequence[str]) -> int:
    """As many sites as a forward pass takes without much memory; the same on every rank."""
    pixels = {"hr": view.hr_px**2, "s2": view.s2_dates * view.series_px**2, "s1": view.s1_dates * view.series_px**2}
    return max(1, min(MAX_BATCH, BATCH_PIXELS // max(1, sum(pixels.get(name, 0) for name in modalities))))


def features_of(
    features: Features, view: View, labels_BHW: Tensor | None = None, num_pixels: int = MAX_PIXELS,
    pool: str = "mean_std", stage: str | int = "last",
) -> dict[str, Tensor]:  # fmt: skip
    """One batch as named tensors on the CPU, see `SiteFeatures.of`.

    labels_BHW: label raster over the same ground as the view; of its pixels at most `num_pixels` evenly spread ones are taken,
    each with the token that covers its centre.
    """
    out: dict[str, Tensor] = {}
    picked = None
    if labels_BHW is not None:
        picked = pick_pixels(labels_BHW, num_pixels)
        out["classes"] = labels_BHW.flatten(1)[:, picked.to(labels_BHW.device)].cpu()
    for name in [*features.dense, FUSED]:
        maps = maps_of(features, name, stage)
        moments = [pooled_moments(feat, valid) for feat, valid, _ in maps]
        wanted = (0, 1) if pool == "mean_std" else (0,)
        out[f"pooled:{name}"] = torch.cat([moment[which] for which in wanted for moment in moments], 1).cpu()
        out[f"present:{name}"] = maps[-1][1].flatten(1).any(1).cpu()
        if picked is not None and labels_BHW is not None:
            like = features.fused_like if name == FUSED else name
            canvas = view.modalities[like].valid_BTHW.shape[2:]
            under = [_under(m, picked, labels_BHW.shape[1:], canvas) for m in maps]
            out[f"pixels:{name}"] = torch.cat([feat for feat, _ in under], -1).half().cpu()
            out[f"valid:{name}"] = torch.stack([valid for _, valid in under]).all(0).cpu()
    return out


def pick_pixels(labels_BHW: Tensor, num_pixels: int) -> Tensor:
    """int64 [P]: evenly spread pixels of the flattened label raster, at most so many."""
    size = labels_BHW.shape[1] * labels_BHW.shape[2]
    return torch.linspace(0, size - 1, min(size, num_pixels), dtype=torch.float64).round().long()


def pooled_moments(feat_BThwD: Tensor, valid_BThw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, D] over the valid tokens of all dates; zero where there is none."""
    weight = valid_BThw.flatten(1)[..., None].float()
    x_BLD = torch.where(weight > 0, feat_BThwD.float().flatten(1, 3), 0.0)
    count_B1 = weight.sum(1).clamp_min(1)
    mean_BD = x_BLD.sum(1) / count_B1
    spread = torch.where(weight > 0, x_BLD - mean_BD[:, None], 0.0)
    variance_BD = spread.square().sum(1) / count_B1
    # where nothing varies (one token, none) a root would have an infinite slope: those who train through this need a finite one
    return mean_BD, torch.where(variance_BD > MIN_VARIANCE, variance_BD.clamp_min(MIN_VARIANCE).sqrt(), 0.0)


def maps_of(features: Features, name: str, stage: str | int) -> list[tuple[Tensor, Tensor, int]]:
    """(tokens [B, T, h, w, D], validity, canvas pixels per token side) of a modality at one or all stages; of the fused features
    there is one stage only."""
    if name == FUSED:
        return [(*tokens_of(features, FUSED), features.stride[features.fused_like])]
    if stage == "last":
        return [(features.dense[name], features.dense_valid[name], features.stride[name])]
    stride, after = features.stride[name], features.stages[name]
    maps: list[tuple[Tensor, Tensor, int]] = []
    for i in reversed(range(len(after))):
        if i + 1 < len(after) and after[i][1].shape[-1] > after[i + 1][1].shape[-1]:
            stride //= 2  # the grid was merged behind this stage
        maps.insert(0, (*after[i], stride))
    return maps if stage == "all" else [maps[int(stage) - 1]]


def tokens_of(features: Features, name: str) -> tuple[Tensor, Tensor]:
    """[B, T, h, w, D] and validity [B, T, h, w] of a modality, or of the fused features (T = 1)."""
    if name == FUSED:
        return features.fused[:, None], features.fused_valid[:, None]
    return features.dense[name], features.dense_valid[name]


def date_mean(feat_BThwD: Tensor, valid_BThw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, h, w, D] mean over the valid dates of each token, and whether it has any."""
    weight = valid_BThw[..., None].float()
    total = torch.where(weight > 0, feat_BThwD.float(), 0.0).sum(1)
    return total / weight.sum(1).clamp_min(1), valid_BThw.any(1)


def _under(
    tokens: tuple[Tensor, Tensor, int], picked_P: Tensor, label_hw: Sequence[int], canvas_hw: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """[B, P, D] and validity [B, P]: the token, mean over dates, that covers the centre of each label pixel."""
    feat, valid, stride = tokens
    grid, ok = date_mean(feat, valid)
    places = (picked_P // label_hw[1], picked_P % label_hw[1])
    rows, columns = (
        ((at.double() + 0.5) * canvas / size / stride).long().clamp_max(count - 1).to(grid.device)
        for at, size, canvas, count in zip(places, label_hw, canvas_hw, grid.shape[1:3])
    )
    return grid[:, rows, columns], ok[:, rows, columns]


def _gather(local: Tensor, world: int) -> Tensor:
    """Rows of all ranks, interleaved back into the order before `rows[rank::world]`."""
    sent = local.to(ON_THE_WIRE.get(local.dtype, local.dtype)).contiguous()
    backend_on_cuda = dist.get_backend() == "nccl"
    sent = sent.cuda() if backend_on_cuda else sent
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent)
    whole = torch.stack(parts, 1).flatten(0, 1).cpu()
    return whole.to(local.dtype)


def as_numpy(x: Tensor) -> np.ndarray:
    return x.float().numpy()
