"""Dense heads on feature maps: one linear layer per map, or UPerNet. Pairs give the head a, b and |a − b|.

Dimension legend: B items · D channels of a map · K classes · h, w cells of a map · H, W label pixels · S test items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate.items import IGNORE

WIDTH = 64  # channels of UPerNet's maps
BINS = (1, 2, 3, 6)  # pooling sizes of its pyramid pooling (Zhao et al. 2017)
RATES = (1e-3, 1e-2)  # AdamW; chosen on validation
STEPS = 200
BATCH = 8
POINTS = 4096  # pixels of an item in one step


class MapNorm(nn.BatchNorm2d):
    """Batch norm without scale and shift. One value per channel (an image alone in its batch whose coarsest map is one cell) has no
    spread: it is normalised by what was seen before, as in evaluation."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """[B, D, h, w] → the same."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(input)


class LinearHead(nn.Module):
    """Per map a batch norm and a linear layer; the scores are brought to the label's size and added: linear in all maps at once
    (interpolation commutes with it), without ever making the large concatenated map."""

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(dim) for dim in dims)
        self.layers = nn.ModuleList(nn.Conv2d(dim, num_classes, 1) for dim in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Score maps [B, K, h, w] of several sizes, whose sum at a place is the score there."""
        return [layer(norm(x)) for norm, layer, x in zip(self.norms, self.layers, maps)]


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path with lateral layers, all levels fused (Xiao et al., 1807.10221, section
    3.1, without the object and material branches), group norm for small batches."""

    def __init__(self, dims: Sequence[int], num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(dim) for dim in dims)
        self.pooled = nn.ModuleList(_block(dims[-1], width, 1) for _ in BINS)
        self.bottleneck = _block(dims[-1] + width * len(BINS), width, 3)
        self.lateral = nn.ModuleList(_block(dim, width, 1) for dim in dims[:-1])
        self.smooth = nn.ModuleList(_block(width, width, 3) for _ in dims[:-1])
        self.fuse = _block(width * len(dims), width, 3)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One score map [B, K, h, w] at the finest map's size."""
        maps = [norm(x) for norm, x in zip(self.norms, maps)]
        top, shape = maps[-1], _shape(maps[-1])
        parts = [_to(layer(F.adaptive_avg_pool2d(top, bins)), shape) for layer, bins in zip(self.pooled, BINS)]
        levels = [self.bottleneck(torch.cat([top, *parts], 1))]
        for i in reversed(range(len(maps) - 1)):
            levels.insert(0, self.lateral[i](maps[i]) + _to(levels[0], _shape(maps[i])))
        levels = [self.smooth[i](level) for i, level in enumerate(levels[:-1])] + levels[-1:]
        finest = max((_shape(level) for level in levels), key=lambda shape: shape[0])
        return [self.classify(self.fuse(torch.cat([_to(level, finest) for level in levels], 1)))]


HEADS: dict[str, type[LinearHead] | type[UPerNet]] = {"linear": LinearHead, "upernet": UPerNet}


def joined(views: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Maps for the head: of one view as they are; of a pair a, b and |a − b| side by side."""
    if len(views) == 1:
        return list(views[0])
    return [torch.cat([a, b, (a - b).abs()], 1) for a, b in zip(views[0], views[1])]


Loader = Callable[[Sequence[int]], tuple[list[Tensor], Tensor]]


def train_head(
    head: nn.Module, load: Loader, rows: Sequence[int], seed: int, rate: float, steps: int = STEPS, batch: int = BATCH
) -> nn.Module:  # fmt: skip
    """AdamW with a cosine to zero, cross-entropy over labelled pixels. The order of items is drawn from the seed."""
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = epochs(rows, seed, batch)
    generator = torch.Generator().manual_seed(seed)
    head.train()
    for _ in range(steps):
        maps, labels_BHW = load(next(order))
        loss = pixel_loss(head(maps), labels_BHW, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def whole(parts: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Scores [B, K, H, W]: the maps brought to the label's size (bilinear) and added."""
    return torch.stack([_to(part, size) for part in parts]).sum(0)


def pixel_loss(parts: Sequence[Tensor], labels_BHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy over POINTS pixels of each item, drawn anew at every step; those without a label count nothing.

    The scores are read at those pixels only, by the very interpolation of `whole`: a tenth of its time at 256 pixels a side.
    """
    items, height, width = labels_BHW.shape
    at_BP = torch.randint(height * width, (items, min(POINTS, height * width)), generator=generator)
    rows, columns = at_BP // width, at_BP % width
    xy_B1P2 = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1)[:, None] * 2 - 1
    read = [F.grid_sample(part, xy_B1P2, "bilinear", "border", align_corners=False)[:, :, 0] for part in parts]
    labels_BP = labels_BHW.flatten(1).gather(1, at_BP)
    known = (labels_BP != IGNORE).sum().clamp_min(1)
    return F.cross_entropy(torch.stack(read).sum(0), labels_BP, ignore_index=IGNORE, reduction="sum") / known


def epochs(rows: Sequence[int], seed: int, batch: int) -> Iterator[list[int]]:
    """Endless batches: every epoch all rows once, in an order drawn from (seed, epoch); at least two a batch where there are."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for start in range(0, len(order), batch):
            picked = [rows[i] for i in order[start : start + batch]]
            yield picked if len(picked) > 1 or batch == 1 or len(rows) == 1 else [*picked, rows[order[0]]]
        epoch += 1


def _block(dim: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, width, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(8, width), nn.ReLU()
    )


def _shape(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])


def _to(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if _shape(x) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
