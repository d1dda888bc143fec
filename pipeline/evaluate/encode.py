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
from model.backbone import Images
from model.batch import ModalityView, View
from model.pretrained import Pretrained
from pipeline.evaluate.bands import to_model
from pipeline.evaluate.items import Item, Sample
from pipeline.evaluate.registry import Row
from pipeline.probes.features import FUSED, date_mean, tokens_of
from pipeline.probes.pixels import masked_statistics, site_statistics

LAYERS = ("last", "stage1", "stage2", "stage3", "stage4", "concat", "fused")
POOLS = ("mean", "mean+std")
CELLS = (
    4,
    8,
    16,
    32,
)  # pixels per side of the windows of pixel statistics: the strides of the network's own pyramid on hr


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
        merges = (self.merges if sensor == "hr" else None) or self.model.cfg.merges(sensor)
        gsd_N = part.gsd_B.repeat_interleave(part.valid_BTHW.shape[1])
        images = Images(sensor, part.x_BTCHW.flatten(0, 1), part.valid_BTHW.flatten(0, 1), gsd_N, None, merges)
        [tokens] = self.model.skysense.backbone([images], pyramid=True)
        stages = range(4) if self.layer == "concat" else [int(self.layer[-1]) - 1]
        return [(tokens.pyramid[s][0].permute(0, 3, 1, 2), tokens.pyramid[s][1]) for s in stages]


class PixelStatistics:
    """`pipeline.probes.pixels` of the very pixels that the network sees: mean, standard deviation, 10th and 90th percentile per band of
    the valid ones, all dates together (for hr with its texture); maps: the same of square windows, at the strides of a pyramid."""

    name = "pixels"

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, batch: Batch, dense: bool) -> Encoded:
        pooled, maps = [], []
        for view in batch.views:
            parts = [view.modalities[name] for name in self.row.sensors]
            pooled.append(torch.cat([site_statistics(name, view.modalities[name]) for name in self.row.sensors], 1))
            if dense:
                maps.append(
                    [_cells(part, cell) for part in parts for cell in CELLS if cell <= part.valid_BTHW.shape[2]]
                )
        return Encoded(pooled, maps)


def _cells(part: ModalityView, cell: int) -> Tensor:
    """[B, 4 C, h, w]: statistics of every window of `cell` pixels a side, all dates together; zero where nothing is valid."""
    height, width = part.valid_BTHW.shape[2:]
    pad = (0, -width % cell, 0, -height % cell)
    x = F.pad(part.x_BTCHW.float(), pad).unflatten(4, (-1, cell)).unflatten(3, (-1, cell))  # B T C h c w c
    ok = F.pad(part.valid_BTHW, pad, value=False).unflatten(3, (-1, cell)).unflatten(2, (-1, cell))  # B T h c w c
    x_BChwN = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
    ok_BChwN = ok.permute(0, 2, 4, 1, 3, 5).flatten(3)[:, None].expand(x_BChwN.shape)
    shape = x_BChwN.shape[:4]
    found = masked_statistics(x_BChwN.flatten(0, 3), ok_BChwN.flatten(0, 3)).view(4, *shape)
    return found.transpose(0, 1).flatten(1, 2)


def _pooled(x_BDhw: Tensor, ok_Bhw: Tensor, pool: str) -> Tensor:
    weight = ok_Bhw[:, None].float()
    count = weight.sum((2, 3)).clamp_min(1)
    mean_BD = torch.where(weight > 0, x_BDhw.float(), 0.0).sum((2, 3)) / count
    if pool == "mean":
        return mean_BD
    apart = torch.where(weight > 0, x_BDhw.float() - mean_BD[:, :, None, None], 0.0)
    spread_BD = (apart.square().sum((2, 3)) / count).clamp_min(1e-12)  # of one token: a root of 0 has no gradient
    return torch.cat([mean_BD, spread_BD.sqrt()], 1)


def _blank(x_BDhw: Tensor, ok_Bhw: Tensor) -> Tensor:
    return torch.where(ok_Bhw[:, None], x_BDhw, 0)
