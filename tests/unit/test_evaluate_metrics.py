"""Scores equal the reference implementations on random inputs, for plain and for repeated items."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate.frozen import change_records
from pipeline.evaluate.metrics import Records, confusion, difference_of, draws, match_boxes, score_of, scorer, value_of
from pipeline.evaluate.oriented import rotated_iou
from tests.polygons import clipped_iou
from tests.require import require_module

torchmetrics = require_module("torchmetrics")
SEEDS = st.integers(0, 10_000)


def value(records: Records, w: np.ndarray | None = None) -> float:
    return value_of(records) if w is None else float(scorer(records)(w[None])[0])


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_multi_label_map_equals_torchmetrics_also_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, (20, 5)) / 5, rng.random((20, 5)) < 0.4
    truth[0] = True  # torchmetrics counts a class without positives as 0 or NaN by version; ours leaves it out
    reference = torchmetrics.classification.MultilabelAveragePrecision(5, average="macro")
    expected = float(reference(torch.from_numpy(scores).float(), torch.from_numpy(truth).long()))
    assert value(Records("map", {"scores": scores, "truth": truth})) == pytest.approx(expected, abs=1e-6)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_iou_and_f1_equal_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said = rng.integers(0, 4, (6, 30)), rng.integers(0, 4, (6, 30))
    counts = np.stack([confusion(p, t, 4) for p, t in zip(said, truth)])
    t, p = torch.from_numpy(truth), torch.from_numpy(said)
    iou = torchmetrics.classification.MulticlassJaccardIndex(4)(p, t)
    f1 = torchmetrics.classification.MulticlassF1Score(4, average="macro")(p, t)
    assert value(Records("miou", {"confusion": counts})) == pytest.approx(float(iou), abs=1e-6)
    assert value(Records("mf1", {"confusion": counts})) == pytest.approx(float(f1), abs=1e-6)
    binary = np.stack([confusion(a > 1, b > 1, 2) for a, b in zip(said, truth)])
    reference = torchmetrics.classification.BinaryF1Score()(p > 1, t > 1)
    assert value(Records("f1", {"confusion": binary})) == pytest.approx(float(reference), abs=1e-6)


def random_detections(rng: np.random.Generator, images: int, classes: int) -> list[tuple[np.ndarray, ...]]:
    """Per image: true boxes and labels, detections near some of them and elsewhere."""
    out = []
    for _ in range(images):
        n = int(rng.integers(0, 5))
        corner = rng.random((n, 2)) * 80
        truth = np.concatenate([corner, corner + 8 + rng.random((n, 2)) * 20], 1)
        near = truth + rng.normal(0, 2.5, truth.shape)
        corner = rng.random((4, 2)) * 80
        found = np.concatenate([near, near + 1, np.concatenate([corner, corner + 15], 1)])
        labels = rng.integers(0, classes, n)
        named = np.concatenate([labels, rng.integers(0, classes, n + 4)])
        out.append((truth, labels, found, named, rng.permutation(len(found)) / 97 + rng.random() * 1e-3))
    return out


def turned(xyxy: np.ndarray) -> np.ndarray:
    """Corners [n, 4, 2]: each box turned about its centre, the more the more to the right it lies."""
    centre, half = (xyxy[:, :2] + xyxy[:, 2:]) / 2, (xyxy[:, 2:] - xyxy[:, :2]) / 2
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    apart = signs * half[:, None]
    cos, sin = np.cos(centre[:, :1] / 9), np.sin(centre[:, :1] / 9)
    return centre[:, None] + np.stack(
        [apart[..., 0] * cos - apart[..., 1] * sin, apart[..., 0] * sin + apart[..., 1] * cos], -1
    )


@pytest.mark.parametrize("oriented", [False, True])
@given(seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_map50_equals_pycocotools(oriented: bool, seed: int) -> None:
    """Oriented: pycocotools matches and averages on overlaps of turned boxes that are clipped here, not by our code."""
    coco_module = require_module("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    from torchvision.ops import box_iou

    rng = np.random.default_rng(seed)
    images = random_detections(rng, 6, 3)
    images[0] = (np.array([[5.0, 5, 25, 25]]), np.array([0]), *images[0][2:])
    parts, owners, boxes, found = [], [], [], []
    for i, (truth, labels, detections, named, scores) in enumerate(images):
        if oriented:
            iou = rotated_iou(turned(detections), turned(truth))
        else:
            iou = box_iou(torch.from_numpy(detections), torch.from_numpy(truth)).numpy()
        parts.append(match_boxes(detections, named, scores, truth, labels, iou, 3))
        owners.append(np.full(len(parts[-1]["label"]), i))
        for box, label in zip(truth, labels):
            x, y, a, b = (float(v) for v in box)
            boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": int(label), "bbox": [x, y, a - x, b - y], "area": (a - x) * (b - y), "iscrowd": 0})  # fmt: skip
        for box, label, score in zip(detections, named, scores):
            x, y, a, b = (float(v) for v in box)
            found.append(
                {"image_id": i, "category_id": int(label), "bbox": [x, y, a - x, b - y], "score": float(score)}
            )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("label", "score", "hit")}
    records = Records(
        "map50_rotated" if oriented else "map50",
        {**arrays, "item": np.concatenate(owners), "truth": np.stack([p["truth"] for p in parts])},
    )
    reference = coco_module.COCO()
    reference.dataset = {
        "images": [{"id": i} for i in range(6)],
        "categories": [{"id": k} for k in range(3)],
        "annotations": boxes,
        "info": {},
    }
    reference.createIndex()
    judged = COCOeval(reference, reference.loadRes(found), "bbox")
    judged.params.iouThrs = np.array([0.5])
    if oriented:

        def overlaps(image: int, k: int) -> np.ndarray:
            truth, labels, detections, named, scores = images[image]
            mine = np.flatnonzero(named == k)
            mine = mine[np.argsort(-scores[mine], kind="mergesort")]
            a, b = turned(detections[mine]), turned(truth[labels == k])
            return np.array([[clipped_iou(x.tolist(), y.tolist()) for y in b] for x in a])

        judged.computeIoU = overlaps
    judged.evaluate()
    judged.accumulate()
    precision = judged.eval["precision"][0, :, :, 0, -1]
    expected = precision[precision > -1].mean()
    assert value(records) == pytest.approx(float(expected), abs=1e-6)


def test_an_item_that_counts_twice_is_an_item_that_is_there_twice() -> None:
    rng = np.random.default_rng(3)
    w = np.array([2, 0, 1, 3])
    again = np.repeat(np.arange(4), w)
    scores, truth = rng.random((4, 3)), rng.random((4, 3)) < 0.5
    doubled = Records("map", {"scores": scores[again], "truth": truth[again]})
    assert value(Records("map", {"scores": scores, "truth": truth}), w) == pytest.approx(value(doubled))
    counts = rng.integers(0, 9, (4, 3, 3))
    assert value(Records("miou", {"confusion": counts}), w) == pytest.approx(
        value(Records("miou", {"confusion": counts[again]}))
    )


def test_paired_difference_is_narrower_than_the_scores_and_zero_against_itself() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200) < 0.5
    right = ~hard | (rng.random(200) < 0.1)
    a, b = (Records("accuracy", {"right": x, "right5": x}) for x in (right, right & (rng.random(200) < 0.97)))
    same, apart, own = difference_of([a], [a]), difference_of([a], [b]), score_of([a])
    assert same is not None
    assert apart is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert apart.high - apart.low < (own.high - own.low) / 2
    assert difference_of([a], [Records("accuracy", {"right": right[:-1], "right5": right[:-1]})]) is None
    assert draws(5).sum(1).tolist() == [5] * 1000


def test_semantic_change_score_by_hand() -> None:
    """Two months of one tile, 4 pixels: one truly changes (0 → 1); the prediction sees it and one more, and names the true one rightly."""
    truth = [np.array([[0, 0], [1, -1]]), np.array([[1, 0], [1, 0]])]
    said = [np.array([[0, 0], [1, 0]]), np.array([[1, 1], [1, 0]])]
    records = change_records(["cube/2018-01/t", "cube/2018-02/t"], said, truth, 2)
    assert records.arrays["both"].tolist() == [1, 0]
    assert records.arrays["either"].tolist() == [2, 0]
    assert value(records) == pytest.approx((1 / 2 + 1.0) / 2)
