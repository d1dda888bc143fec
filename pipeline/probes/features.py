"""Frozen features of sites: pooled per site and, for segmentation, per 10 m label pixel.

Dimension legend: S sites · D feature dim · P label pixels of a site · h, w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass
class SiteFeatures:
    """Of all sites, in the order asked for.

    Attributes:
        pooled: per modality and FUSED, float32 [S, D]: mean over valid tokens and dates.
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


ON_THE_WIRE = {torch.bool: torch.uint8, torch.int16: torch.int32}  # gloo gathers neither


def extract(
    skysense: nn.Module,
    read: Callable[[int], SiteArrays],
    rows: Sequence[int],
    view: ViewConfig,
    statistics: Mapping[str, Mapping[str, object]],
    raster: str | None = None,
    batch: int = 8,
    device: torch.device | str = "cpu",
) -> SiteFeatures:
    """Features of `rows`, shared out over all ranks of the job (each reads its own), gathered on every one.

    Every rank makes the same number of forward passes, the last ones with nothing valid in them if it runs out of
    sites: experts may lie on other ranks, and their collectives must meet.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    modalities: tuple[str, ...] = skysense.cfg.modalities  # type: ignore[union-attr,assignment]
    mine = list(rows[rank::world])
    passes = math.ceil(math.ceil(len(rows) / world) / batch)
    was_training = skysense.training
    skysense.eval()
    parts = []
    with torch.no_grad():
        for k in range(passes):
            chunk = mine[k * batch : (k + 1) * batch]
            sites = [read(row) for row in chunk]
            blank = SiteArrays("", "", (0, 0, 0, 0), (0.0, 0.0, view.series_px * 10.0, view.series_px * 10.0), {}, "")
            seen = view_of_sites([*sites, *[blank] * (batch - len(sites))], view, modalities, raster)
            parts.append(_of_batch(skysense, seen, statistics, raster is not None, device))
    skysense.train(was_training)
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if world > 1:
        merged = {name: _gather(value, world) for name, value in merged.items()}
    merged = {name: value[: len(rows)] for name, value in merged.items()}
    return SiteFeatures.of(merged)


def _of_batch(
    skysense: nn.Module,
    raw: View,
    statistics: Mapping[str, Mapping[str, object]],
    dense: bool,
    device: torch.device | str,
) -> dict[str, Tensor]:
    dtype = next(skysense.parameters()).dtype
    view = normalise(_map(raw, lambda t: t.to(device)), statistics)
    for part in view.modalities.values():
        part.x_BTCHW = part.x_BTCHW.to(dtype)
    return features_of(skysense(view), view, raw.classes_BHW if dense else None)


def features_of(
    features: Features, view: View, labels_BHW: Tensor | None = None, num_pixels: int | None = None
) -> dict[str, Tensor]:
    """One batch as named tensors on the CPU, see `SiteFeatures.of`.

    labels_BHW: label raster over the same ground as the view; of its pixels `num_pixels` (default: all, at most MAX_PIXELS)
    evenly spread ones are taken, each with the token that covers its centre.
    """
    out: dict[str, Tensor] = {}
    picked = None
    if labels_BHW is not None:
        height, width = labels_BHW.shape[1:]
        count = min(height * width, MAX_PIXELS) if num_pixels is None else num_pixels
        picked = torch.linspace(0, height * width - 1, count, dtype=torch.float64).round().long()
        out["classes"] = labels_BHW.flatten(1)[:, picked]
    for name in [*features.dense, FUSED]:
        feat, valid = tokens_of(features, name)
        weight = valid[..., None].float()
        total, count_B1 = torch.where(weight > 0, feat.float(), 0.0).flatten(1, -2).sum(1), weight.flatten(1, -2).sum(1)
        out[f"pooled:{name}"] = (total / count_B1.clamp_min(1)).cpu()
        out[f"present:{name}"] = (count_B1[:, 0] > 0).cpu()
        if picked is not None:
            like = features.fused_like if name == FUSED else name
            grid, ok = date_mean(feat, valid)
            rows, columns = (
                ((at.double() + 0.5) * canvas / size / features.stride[like])
                .long()
                .clamp_max(tokens - 1)
                .to(grid.device)
                for at, size, canvas, tokens in zip(
                    (picked // width, picked % width),
                    (height, width),
                    view.modalities[like].valid_BTHW.shape[2:],
                    grid.shape[1:3],
                )
            )
            out[f"pixels:{name}"] = grid[:, rows, columns].half().cpu()
            out[f"valid:{name}"] = ok[:, rows, columns].cpu()
    return out


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
