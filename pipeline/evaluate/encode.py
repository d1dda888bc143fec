"""Samples to features: a network (trained or not) or pixel statistics, both over the very same normalised pixels.

Dimension legend: B items · T dates · C bands · H, W pixels · D features · h, w cells of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UsageError
from model.batch import ModalityView, View
from model.pretrained import Pretrained
from pipeline.evaluate.bands import to_model
from pipeline.evaluate.items import Item, Sample
from pipeline.evaluate.registry import Row
from pipeline.probes.features import FUSED, date_mean, tokens_of

LAYERS = ("last", "stage1", "stage2", "stage3", "stage4", "concat", "fused")
POOLS = ("mean", "mean+std")
CELLS = (
    4,
    8,
    16,
    32,
)  # pixels per side of the windows of pixel statistics: the strides of the network's own pyramid on hr
QUANTILES = (0.1, 0.9)


@dataclass
class Batch:
    """Items of one shape. views: one, or two for pairs (before, after); normalised as the model takes them."""

    views: list[View]
    samples: list[Sample]


@dataclass
class Encoded:
    """pooled: [B, D] of each view. maps: per view the feature maps, each [B, D, h, w], fine to coarse; empty if not asked for."""

    pooled: list[Tensor]
    maps: list[list[Tensor]]


class Encoder(Protocol):
    name: str

    def __call__(self, batch: Batch, dense: bool) -> Encoded: ...


def batches(model: Pretrained, row: Row, items: Sequence[Item], size: int) -> Iterator[Batch]:
    """Items in order, consecutive ones of equal shape together, at most `size`."""
    held: list[Sample] = []
    shapes: tuple[object, ...] = ()
    for item in items:
        sample = item.read()
        found = tuple((name, images.shape) for name, images in sample.images.items())
        if held and (found != shapes or len(held) == size):
            yield make_batch(model, row, held)
            held = []
        held.append(sample)
        shapes = found
    if held:
        yield make_batch(model, row, held)


def make_batch(model: Pretrained, row: Row, samples: list[Sample]) -> Batch:
    """Raises UsageError where the pixels are not in the declared order or unit."""
    pair = bool(samples[0].after)
    views = [_view(model, row, samples, False)]
    return Batch([*views, _view(model, row, samples, True)] if pair else views, samples)


def _view(model: Pretrained, row: Row, samples: Sequence[Sample], after: bool) -> View:
    images, valid, doy, gsd_m = {}, {}, {}, {}
    for bands in row.bands:
        name = bands.sensor
        raw = [(sample.after if after else sample.images)[name] for sample in samples]
        parts = [to_model(bands, x, row.name) for x in raw]
        ok = np.stack([ok for _, ok in parts])
        for i, sample in enumerate(samples):
            if sample.inside is not None:
                ok[i, :, sample.inside[0] :], ok[i, :, :, sample.inside[1] :] = False, False
        images[name] = torch.from_numpy(np.stack([x for x, _ in parts]).astype(np.float32))
        valid[name] = torch.from_numpy(ok)
        days = [sample.doy.get(name, np.zeros(2 * raw[0].shape[0], int)) for sample in samples]
        dates = raw[0].shape[0]
        doy[name] = torch.from_numpy(np.stack([d[dates:] if after else d[:dates] for d in days]).astype(np.int16))
        gsd_m[name] = bands.gsd_m
    return model.view(images, valid, doy, gsd_m)


class Network:
    """Features of a `Pretrained`.

    Args:
        layer: `last` (final stage, normalised), `stage1` … `stage4`, `concat` (all four), or `fused` (the model's own fusion of
            sensors and dates; the only choice for rows with several of either).
        pool: over valid tokens: mean, or mean and standard deviation.
        merges: as `Pretrained.pyramid`, for hr.
    """

    def __init__(
        self, name: str, model: Pretrained, row: Row, layer: str, pool: str, merges: tuple[bool, bool, bool] | None
    ) -> None:  # fmt: skip
        if layer not in LAYERS or pool not in POOLS:
            raise UsageError(f"layer {layer!r} or pool {pool!r}: known are {', '.join(LAYERS)} and {', '.join(POOLS)}")
        missing = [sensor for sensor in row.sensors if sensor not in model.cfg.modalities]
        if missing:
            raise UsageError(
                f"{row.name} needs {', '.join(row.sensors)}, this checkpoint reads {', '.join(model.cfg.modalities)}: "
                f"leave {missing[0]} out with --sensors, or take another row"
            )
        self.name, self.model, self.row, self.layer, self.pool, self.merges = name, model, row, layer, pool, merges

    def __call__(self, batch: Batch, dense: bool) -> Encoded:
        found = [self._maps(view) for view in batch.views]
        pooled = [torch.cat([_pooled(x, ok, self.pool) for x, ok in maps], 1) for maps in found]
        maps = [[_blank(x, ok) for x, ok in maps] for maps in found] if dense else []
        return Encoded(pooled, maps)

    def _maps(self, view: View) -> list[tuple[Tensor, Tensor]]:
        """(features [B, D, h, w], valid [B, h, w]) of the chosen layers."""
        if self.layer in ("last", FUSED):
            kept = {"hr": self.merges} if self.merges and "hr" in self.row.sensors else None
            features = self.model.skysense(view, merges=kept)
            names = [FUSED] if self.layer == FUSED else list(self.row.sensors)
            parts = [date_mean(*tokens_of(features, name)) for name in names]
            return [(x.permute(0, 3, 1, 2), ok) for x, ok in parts]
        (sensor,) = self.row.sensors  # several go through fusion
        part = view.modalities[sensor]
        merges = self.merges if sensor == "hr" else None
        dates = part.valid_BTHW.shape[1]
        tokens = self.model.skysense.backbone(
            sensor, part.x_BTCHW.flatten(0, 1), part.valid_BTHW.flatten(0, 1), part.gsd_B.repeat_interleave(dates),
            merges=merges, pyramid=True,
        )  # fmt: skip
        stages = range(4) if self.layer == "concat" else [int(self.layer[-1]) - 1]
        return [(tokens.pyramid[s][0].permute(0, 3, 1, 2), tokens.pyramid[s][1]) for s in stages]


class PixelStatistics:
    """Mean, standard deviation, 10th and 90th percentile per band of the valid normalised pixels, all dates together."""

    name = "pixels"

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, batch: Batch, dense: bool) -> Encoded:
        pooled, maps = [], []
        for view in batch.views:
            parts = [view.modalities[name] for name in self.row.sensors]
            pooled.append(torch.cat([_statistics(part, None)[:, :, 0, 0] for part in parts], 1))
            if dense:
                maps.append(
                    [_statistics(part, cell) for part in parts for cell in CELLS if cell <= part.valid_BTHW.shape[2]]
                )
        return Encoded(pooled, maps)


def _statistics(part: ModalityView, cell: int | None) -> Tensor:
    """[B, 4 C, h, w]; cell None: one cell, the whole image. A cell without a valid pixel is zero."""
    x_BTCHW = torch.where(part.valid_BTHW[:, :, None], part.x_BTCHW, torch.nan)
    if cell is None:
        x_BCP = x_BTCHW.permute(0, 2, 1, 3, 4).flatten(2)
        return _moments(x_BCP)[..., None, None]
    height, width = x_BTCHW.shape[3:]
    x_BTCHW = F.pad(x_BTCHW, (0, -width % cell, 0, -height % cell), value=torch.nan)
    x = x_BTCHW.unflatten(4, (-1, cell)).unflatten(3, (-1, cell))  # B T C h c w c
    x_BChwP = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
    return _moments(x_BChwP).contiguous()


def _moments(x: Tensor) -> Tensor:
    """[B, C, …, P] with NaN for invalid → [B, 4 C, …]."""
    known = torch.isfinite(x)
    count = known.sum(-1).clamp_min(1)
    mean = torch.where(known, x, 0.0).sum(-1) / count
    spread = (torch.where(known, x - mean[..., None], 0.0).square().sum(-1) / count).sqrt()
    low, high = (_quantile(x, known, q) for q in QUANTILES)
    return torch.cat([mean, spread, low, high], 1)


def _quantile(x: Tensor, known: Tensor, q: float) -> Tensor:
    """The nearest of the valid numbers (no interpolation); 0 where there is none."""
    ordered = torch.where(known, x, torch.inf).sort(-1).values
    count = known.sum(-1)
    at = ((count - 1).clamp_min(0) * q).round().long()
    picked = ordered.gather(-1, at[..., None])[..., 0]
    return torch.where(count > 0, picked, 0.0)


def _pooled(x_BDhw: Tensor, ok_Bhw: Tensor, pool: str) -> Tensor:
    weight = ok_Bhw[:, None].float()
    count = weight.sum((2, 3)).clamp_min(1)
    mean_BD = torch.where(weight > 0, x_BDhw.float(), 0.0).sum((2, 3)) / count
    if pool == "mean":
        return mean_BD
    apart = torch.where(weight > 0, x_BDhw.float() - mean_BD[:, :, None, None], 0.0)
    return torch.cat([mean_BD, (apart.square().sum((2, 3)) / count).sqrt()], 1)


def _blank(x_BDhw: Tensor, ok_Bhw: Tensor) -> Tensor:
    return torch.where(ok_Bhw[:, None], x_BDhw, 0)
