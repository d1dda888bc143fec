"""Oriented boxes: the part of a Faster R-CNN that reads which way an object lies, and the overlap of turned boxes.

Proposals stay upright, around the object's hull (FR-O of Xia et al. 2018, 1711.10398). Of each the head reads the centre, the two
sides and the direction of the long one as (sin 2θ, cos 2θ): a rectangle turned by half a turn is itself.

Dimension legend: P proposals · K classes · n, m boxes · 4 corners in cyclic order · 6 cx, cy, long, short, sin 2θ, cos 2θ.
"""

from __future__ import annotations

import numpy as np
import shapely
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

WEIGHTS = (10.0, 10.0, 5.0, 5.0, 5.0, 5.0)  # four are torchvision's; a tenth in sin 2θ weighs as a tenth of a side
LARGEST = float(np.log(1000 / 16))  # of a side over the proposal's, as in torchvision: an exponential cannot overflow
SHORTEST = 1e-2  # pixels
NMS = 0.1  # turned boxes of one class lie side by side, seldom over each other


def rotated_iou(a_n42: np.ndarray, b_m42: np.ndarray) -> np.ndarray:
    """[n, m] float64 intersection over union of the convex hulls of corners, exact (GEOS clips the polygons)."""
    ours, theirs = _hulls(a_n42), _hulls(b_m42)
    found = np.zeros((len(ours), len(theirs)))
    if not found.size:
        return found
    i, j = shapely.STRtree(theirs).query(ours, predicate="intersects")
    shared = shapely.area(shapely.intersection(ours[i], theirs[j]))
    union = shapely.area(ours)[i] + shapely.area(theirs)[j] - shared
    found[i, j] = np.where(union > 0, shared / np.maximum(union, 1e-300), 0.0)
    return found


def _hulls(corners_n42: np.ndarray) -> np.ndarray:
    """Boxes without area become lines or points, which share none."""
    rings = np.asarray(corners_n42, np.float64).reshape(-1, 4, 2)
    return np.asarray(shapely.convex_hull(shapely.polygons(rings))).reshape(-1)


def rotated_nms(corners_n42: np.ndarray, scores_n: np.ndarray, labels_n: np.ndarray, threshold: float) -> np.ndarray:
    """Places of the boxes that no better one of their class overlaps by more than `threshold`, best first."""
    order = np.argsort(-scores_n, kind="stable")
    keep = np.zeros(len(order), bool)
    for k in np.unique(labels_n):
        mine = order[labels_n[order] == k]
        overlaps = rotated_iou(corners_n42[mine], corners_n42[mine]) > threshold
        free = np.ones(len(mine), bool)
        for place in range(len(mine)):
            if free[place]:
                keep[mine[place]] = True
                free &= ~overlaps[place]
    return order[keep[order]]


def turned_of(corners_n42: Tensor) -> Tensor:
    """Boxes [n, 6] of corners: exact for rectangles; of other quadrilaterals opposite sides are averaged."""
    c0, c1, c2, c3 = corners_n42.unbind(1)
    a, b = (c1 - c0 + c2 - c3) / 2, (c2 - c1 + c3 - c0) / 2
    length_a, length_b = a.norm(dim=1), b.norm(dim=1)
    side = torch.where((length_a >= length_b)[:, None], a, b)
    twice = 2 * torch.atan2(side[:, 1], side[:, 0])
    sides = torch.stack([torch.maximum(length_a, length_b), torch.minimum(length_a, length_b)], 1)
    return torch.cat([corners_n42.mean(1), sides.clamp_min(SHORTEST), torch.stack([twice.sin(), twice.cos()], 1)], 1)


def corners_of(turned_n6: Tensor) -> Tensor:
    """Corners [n, 4, 2] of boxes; the last two numbers need not lie on the unit circle."""
    angle = torch.atan2(turned_n6[:, 4], turned_n6[:, 5]) / 2
    along = torch.stack([angle.cos(), angle.sin()], 1) * turned_n6[:, 2:3] / 2
    across = torch.stack([-angle.sin(), angle.cos()], 1) * turned_n6[:, 3:4] / 2
    centre = turned_n6[:, :2]
    return torch.stack([centre - along - across, centre + along - across, centre + along + across, centre - along + across], 1)  # fmt: skip


def encode(turned_P6: Tensor, proposals_P4: Tensor) -> Tensor:
    """What the head is to say [P, 6] of boxes seen from upright proposals (xyxy)."""
    centre, size = _upright(proposals_P4)
    middle = size.prod(1, keepdim=True).sqrt()
    parts = [(turned_P6[:, :2] - centre) / size, (turned_P6[:, 2:4] / middle).log(), turned_P6[:, 4:]]
    return torch.cat(parts, 1) * turned_P6.new_tensor(WEIGHTS)


def decode(deltas_P6: Tensor, proposals_P4: Tensor) -> Tensor:
    """Boxes [P, 6]: the inverse of `encode`."""
    centre, size = _upright(proposals_P4)
    middle = size.prod(1, keepdim=True).sqrt()
    deltas = deltas_P6 / deltas_P6.new_tensor(WEIGHTS)
    return torch.cat(
        [centre + deltas[:, :2] * size, deltas[:, 2:4].clamp(max=LARGEST).exp() * middle, deltas[:, 4:]], 1
    )


def _upright(proposals_P4: Tensor) -> tuple[Tensor, Tensor]:
    low, high = proposals_P4[:, :2], proposals_P4[:, 2:]
    return (low + high) / 2, (high - low).clamp_min(SHORTEST)


class OrientedPredictor(nn.Module):
    """Class scores [P, K + 1] and one oriented box [P, 6] for all classes, of features [P, dim]."""

    def __init__(self, dim: int, num_scores: int) -> None:
        super().__init__()
        self.score, self.box = nn.Linear(dim, num_scores), nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(x), self.box(x)


class OrientedHeads(RoIHeads):
    """torchvision's region heads with oriented boxes: its pooling, sampling and matching (on hulls), our regression. One image."""

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:  # fmt: skip
        """targets: boxes (hulls, xyxy), labels (1 … K), turned [n, 6]. Returns what `RoIHeads` does, with corners [n, 4, 2] beside boxes."""
        labels = matched = None
        if targets is not None:
            proposals, (matched,), (labels,), _ = self.select_training_samples(proposals, targets)
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        if targets is None or labels is None or matched is None:
            return [self._found(scores, deltas, proposals[0])], {}
        some = torch.where(labels > 0)[0]
        turned = targets[0]["turned"][matched[some]]
        wanted = encode(turned, proposals[0][some])
        # The nearer to a square, the less the angle decides: a square turned by 45° still overlaps by 0.71, and has no long side.
        weight = torch.ones_like(wanted)
        weight[:, 4:] = (1 - turned[:, 3] / turned[:, 2])[:, None]
        apart = F.smooth_l1_loss(deltas[some], wanted, beta=1 / 9, reduction="none")
        losses = {
            "loss_classifier": F.cross_entropy(scores, labels),
            "loss_box_reg": (apart * weight).sum() / labels.numel(),
        }
        return [], losses

    def _found(self, scores: Tensor, deltas: Tensor, proposals: Tensor) -> dict[str, Tensor]:
        chances = scores.softmax(1)[:, 1:]
        at, k = torch.where(chances > self.score_thresh)
        corners, chances = corners_of(decode(deltas, proposals))[at].detach(), chances[at, k].detach()
        kept = rotated_nms(corners.numpy(), chances.numpy(), k.numpy(), self.nms_thresh)
        keep = torch.from_numpy(kept[: self.detections_per_img])
        corners = corners[keep]
        hulls = torch.cat([corners.amin(1), corners.amax(1)], 1)
        return {"boxes": hulls, "corners": corners, "labels": k[keep] + 1, "scores": chances[keep]}
