"""Boxes head: torchvision's Faster R-CNN parts on our feature pyramid, trained on cached maps.

Dimension legend: D channels of a map · h, w cells · n boxes.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from pipeline.evaluate.dense import MapNorm, epochs
from pipeline.evaluate.items import Boxes
from pipeline.evaluate.metrics import match_boxes

WIDTH = 64
EPOCHS = 8
FIRST_MAP = 1  # the finest map (4 pixels a cell) costs three quarters of the time and serves objects under 16 pixels
RATE = 2e-3


class Detector(nn.Module):
    """Feature pyramid network over the given maps, region proposals, and a box head (Ren et al. 2015, Lin et al. 2017).

    Args:
        dims: channels of the maps, fine to coarse; those from FIRST_MAP on are used. side: rows of the image. heights: rows of the
            maps. Anchors are 4 and 6 cells wide. oriented: boxes have an angle (`pipeline.evaluate.oriented`).
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, side: int, heights: Sequence[int], oriented: bool = False, width: int = WIDTH
    ) -> None:  # fmt: skip
        super().__init__()
        try:
            from torchvision.models.detection.anchor_utils import AnchorGenerator
            from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
            from torchvision.models.detection.roi_heads import RoIHeads
            from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
            from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
            from torchvision.ops.poolers import initLevelMapper

            from pipeline.evaluate.oriented import NMS, OrientedHeads, OrientedPredictor
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                f"boxes need torchvision beside this torch ({error}): pip install -r requirements.txt"
            ) from None
        self.first = min(FIRST_MAP, len(dims) - 1)
        dims = dims[self.first :]
        cells = [
            2 ** math.ceil(math.log2(max(1.0, side / height))) for height in heights[self.first :]
        ]  # pixels per cell
        self.norms = nn.ModuleList(MapNorm(dim) for dim in dims)
        self.fpn = FeaturePyramidNetwork(list(dims), width)
        names = [str(i) for i in range(len(dims))]
        sizes = tuple((4 * cell, 6 * cell) for cell in cells)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(dims))
        # torchvision divides the image's side by the map's and forgets the rest: of 1,175 pixels in 147 cells it makes cells of 7
        # pixels, and anchors that lie 147 pixels off at the end. The cells are known here, for the anchors and for the pooling.
        anchors.forward = functools.partial(_anchors, anchors, cells)
        self.rpn = RegionProposalNetwork(
            anchors, RPNHead(width, anchors.num_anchors_per_location()[0]), 0.7, 0.3, 256, 0.5,
            {"training": 600, "testing": 300}, {"training": 300, "testing": 200}, 0.7,
        )  # fmt: skip
        align = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
        align.scales = [1 / cell for cell in cells]
        align.map_levels = initLevelMapper(int(math.log2(min(cells))), int(math.log2(max(cells))))
        self.oriented = oriented
        kind, predictor, nms = (
            (OrientedHeads, OrientedPredictor, NMS) if oriented else (RoIHeads, FastRCNNPredictor, 0.5)
        )
        self.roi_heads = kind(
            align, TwoMLPHead(width * 49, 256), predictor(256, num_classes + 1), 0.5, 0.5, 128, 0.25, None, 0.05, nms, 100
        )  # fmt: skip

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int], truth: Boxes | None = None
    ) -> dict[str, Tensor]:  # fmt: skip
        """One image (a batch of one). With `truth`: losses by name; without: boxes xyxy, labels (0 … K-1), scores, and the corners
        [n, 4, 2] of oriented boxes."""
        from torchvision.models.detection.image_list import ImageList

        maps = maps[self.first :]
        features = self.fpn(OrderedDict((str(i), norm(x)) for i, (norm, x) in enumerate(zip(self.norms, maps))))
        blank = maps[0].new_zeros(()).expand(1, 3, *size)  # only its shape is looked at
        targets = None
        if truth is not None:
            targets = [{"boxes": torch.from_numpy(truth.xyxy), "labels": torch.from_numpy(truth.labels) + 1}]
            if self.oriented:
                from pipeline.evaluate.oriented import turned_of

                assert truth.corners is not None
                targets[0]["turned"] = turned_of(torch.from_numpy(truth.corners))
        proposals, rpn_losses = self.rpn(ImageList(blank, [size]), features, targets)
        found, losses = self.roi_heads(features, proposals, [size], targets)
        if truth is not None:
            return {**rpn_losses, **losses}
        return {**found[0], "labels": found[0]["labels"] - 1}


def _anchors(generator: Any, cells: Sequence[int], images: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    """Anchors [n, 4] of one image: those of the generator, a cell apart."""
    generator.set_cell_anchors(maps[0].dtype, maps[0].device)
    grids = [[int(m.shape[-2]), int(m.shape[-1])] for m in maps]
    return [torch.cat(generator.grid_anchors(grids, [[torch.tensor(cell)] * 2 for cell in cells]))]


Load = Callable[[int], tuple[list[Tensor], tuple[int, int], Boxes]]


def train_detector(
    detector: Detector, load: Load, rows: Sequence[int], seed: int, num_epochs: int = EPOCHS
) -> Detector:
    """AdamW, one image a step, warm-up of a tenth and a cosine to zero. torch's generator is seeded: proposals are sampled."""
    optimizer = torch.optim.AdamW(detector.parameters(), RATE, weight_decay=1e-3)
    steps = num_epochs * len(rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    order = epochs(list(rows), seed, 1)
    detector.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            maps, size, truth = load(next(order)[0])
            loss = torch.stack(list(detector(maps, size, truth).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return detector.eval()


@torch.no_grad()
def records_of(detector: Detector, load: Load, rows: Sequence[int], num_classes: int) -> dict[str, np.ndarray]:
    """Arrays of `Records` of metric map50, or map50_rotated if the boxes are oriented."""
    from torchvision.ops import box_iou

    from pipeline.evaluate.oriented import rotated_iou

    parts, owners = [], []
    for place, row in enumerate(rows):
        maps, size, truth = load(row)
        found = detector(maps, size)
        if detector.oriented:
            assert truth.corners is not None
            iou = rotated_iou(found["corners"].numpy(), truth.corners)
        else:
            iou = box_iou(found["boxes"], torch.from_numpy(truth.xyxy)).numpy()
        one = match_boxes(
            found["boxes"].numpy(),
            found["labels"].numpy(),
            found["scores"].numpy(),
            truth.xyxy,
            truth.labels,
            iou,
            num_classes,
        )
        parts.append(one)
        owners.append(np.full(len(one["label"]), place, np.int64))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("label", "score", "hit")}
    return {**arrays, "item": np.concatenate(owners), "truth": np.stack([part["truth"] for part in parts])}
