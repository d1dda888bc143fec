"""Scores as functions of how often each test item counts, so that one piece of code gives the score, its bootstrap interval and
paired differences. Equal to torchmetrics and pycocotools on random inputs (tests/unit/test_evaluate_metrics.py). No torch.

Dimension legend: S test items · K classes · N detections of all items · W draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.probes.scores import DRAWS, Difference, Score

RECALLS = np.linspace(0, 1, 101)  # COCO's recall points
MAX_DETECTIONS = 100
CHUNK = 50  # draws at a time: 50 x 100,000 items in 40 MB
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Records:
    """What every test item got, of one metric. `arrays`: plain numbers, first axis S (detections: N, with their `item`).

    accuracy: right bool [S], right5 bool [S] · map: scores float32 [S, K], truth bool [S, K] · miou, mf1, f1: confusion int [S, K, K]
    (truth, predicted) · map50, map50_rotated: item, label, score, hit [N], truth int [S, K] boxes that there are · scs: confusion [S, K, K] of
    truly changed pixels, both, either [S] (intersection and union of change).
    """

    metric: str
    arrays: Mapping[str, np.ndarray]
    chance: float = 0.0

    @property
    def items(self) -> int:
        return len(self.arrays[FIRST[self.metric]])


FIRST = {
    "accuracy": "right", "map": "truth", "miou": "confusion", "mf1": "confusion", "f1": "confusion", "map50": "truth", "map50_rotated": "truth",
    "scs": "confusion",
}  # fmt: skip
WORDS = {
    "accuracy": "accuracy", "map": "macro mean average precision", "miou": "mean IoU", "mf1": "mean F1 over classes",
    "f1": "F1 of change", "map50": "mAP at IoU 0.5", "map50_rotated": "mAP at rotated IoU 0.5",
    "scs": "semantic change segmentation score",
}  # fmt: skip


def scorer(records: Records) -> Scorer:
    """The score as a function of how often each item counts: w [W, S] → [W]."""
    arrays = records.arrays
    if records.metric == "accuracy":
        right = np.asarray(arrays["right"], float)
        return lambda w: w @ right / np.maximum(w.sum(1), 1)
    if records.metric == "map":
        return _multi_label_map(np.asarray(arrays["scores"], float), np.asarray(arrays["truth"], bool))
    if records.metric in ("map50", "map50_rotated"):
        return _detection_ap(arrays)
    per_item = np.asarray(arrays["confusion"], float)
    flat, shape = per_item.reshape(len(per_item), -1), per_item.shape[1:]
    if records.metric == "scs":
        both, either = (np.asarray(arrays[name], float) for name in ("both", "either"))
        return lambda w: (w @ both / np.maximum(w @ either, 1e-15) + mean_iou((w @ flat).reshape(-1, *shape))) / 2
    summary = {"miou": mean_iou, "mf1": mean_f1, "f1": change_f1}[records.metric]
    return lambda w: summary((w @ flat).reshape(-1, *shape))


def value_of(records: Records) -> float:
    """The score itself: every item counts once."""
    return float(scorer(records)(np.ones((1, records.items)))[0])


def mean_iou(confusion_WKK: np.ndarray) -> np.ndarray:
    """[W] mean over the classes that occur in the truth of intersection / union."""
    hit, truth, said = _sums(confusion_WKK)
    return _mean_where(hit / np.maximum(truth + said - hit, 1), truth > 0)


def mean_f1(confusion_WKK: np.ndarray) -> np.ndarray:
    """[W] mean over the classes that occur in the truth of 2 hit / (truth + predicted)."""
    hit, truth, said = _sums(confusion_WKK)
    return _mean_where(2 * hit / np.maximum(truth + said, 1), truth > 0)


def change_f1(confusion_W22: np.ndarray) -> np.ndarray:
    """[W] F1 of class 1."""
    hit, truth, said = _sums(confusion_W22)
    return 2 * hit[:, 1] / np.maximum(truth[:, 1] + said[:, 1], 1)


def _sums(confusion_WKK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.diagonal(confusion_WKK, axis1=1, axis2=2), confusion_WKK.sum(2), confusion_WKK.sum(1)


def _mean_where(values_WK: np.ndarray, where_WK: np.ndarray) -> np.ndarray:
    """[W] mean over the entries that count; 0 where none does."""
    return (values_WK * where_WK).sum(1) / np.maximum(where_WK.sum(1), 1)


def _multi_label_map(scores_SK: np.ndarray, truth_SK: np.ndarray) -> Scorer:
    """Average precision (step-wise integral over distinct scores), mean over the classes that have a positive item."""
    order_KS = np.argsort(-scores_SK, axis=0, kind="stable").T
    sorted_KS = np.take_along_axis(scores_SK.T, order_KS, 1)
    last_KS = np.concatenate([sorted_KS[:, 1:] != sorted_KS[:, :-1], np.ones((len(order_KS), 1), bool)], 1)
    positive_KS = np.take_along_axis(truth_SK.T, order_KS, 1)

    def score(w: np.ndarray) -> np.ndarray:
        found, occurs = np.zeros((len(w), len(order_KS))), np.zeros((len(w), len(order_KS)), bool)
        for k, (order, last, positive) in enumerate(zip(order_KS, last_KS, positive_KS)):
            if not positive.any():
                continue
            weight = w[:, order]
            hits, seen = np.cumsum(weight * positive, 1), np.cumsum(weight, 1)
            total, hits_at = hits[:, -1], hits[:, last]
            area = np.diff(hits_at, prepend=0) * hits_at / np.maximum(seen[:, last], 1e-12)
            found[:, k], occurs[:, k] = area.sum(1) / np.maximum(total, 1e-12), total > 0
        return _mean_where(found, occurs)

    return score


def _detection_ap(arrays: Mapping[str, np.ndarray]) -> Scorer:
    """COCO's average precision at IoU 0.5: precision made monotone, read at 101 recalls; mean over classes that have boxes."""
    item, label, value, hit = (np.asarray(arrays[name]) for name in ("item", "label", "score", "hit"))
    truth_SK = np.asarray(arrays["truth"], float)
    by_class = []
    for k in range(truth_SK.shape[1]):
        mine = np.flatnonzero(label == k)
        mine = mine[np.argsort(-value[mine], kind="mergesort")]
        by_class.append((item[mine], hit[mine].astype(float)))

    def one_class(weight: np.ndarray, hits: np.ndarray, total: float) -> float:
        right, wrong = np.cumsum(weight * hits), np.cumsum(weight * (1 - hits))
        counted = right + wrong > 0
        recall, precision = right[counted] / total, right[counted] / (right + wrong)[counted]
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(recall, RECALLS - 1e-12, side="left")
        return float(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())

    def score(w: np.ndarray) -> np.ndarray:
        totals_WK = w @ truth_SK
        found = np.zeros_like(totals_WK)
        for k, (owner, hits) in enumerate(by_class):
            for i in np.flatnonzero(totals_WK[:, k] > 0):
                found[i, k] = one_class(w[i, owner].astype(float), hits, totals_WK[i, k])
        return _mean_where(found, totals_WK > 0)

    return score


def match_boxes(
    boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, truth: np.ndarray, truth_labels: np.ndarray, iou: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Greedy matching of one image as COCO does it: by falling score each detection takes the free true box of its class with the
    greatest IoU of at least 0.5. iou: [detections, truths]. Per class at most MAX_DETECTIONS count.

    Returns label, score, hit of the detections that count, and truth [K] true boxes per class.
    """
    keep, hits = [], []
    for k in range(num_classes):
        mine = np.flatnonzero(labels == k)
        mine = mine[np.argsort(-scores[mine], kind="mergesort")][:MAX_DETECTIONS]
        theirs = np.flatnonzero(truth_labels == k)
        free = np.ones(len(theirs), bool)
        for detection in mine:
            overlap = np.where(free, iou[detection, theirs], -1.0) if len(theirs) else np.zeros(0)
            best = int(overlap.argmax()) if len(theirs) else -1
            is_hit = best >= 0 and overlap[best] >= 0.5
            if is_hit:
                free[best] = False
            keep.append(detection)
            hits.append(is_hit)
    index = np.array(keep, np.int64)
    return {
        "label": labels[index].astype(np.int64), "score": scores[index].astype(np.float32), "hit": np.array(hits, bool),
        "truth": np.bincount(truth_labels, minlength=num_classes).astype(np.int64),
    }  # fmt: skip


def draws(items: int, seed: int = 0, number: int = DRAWS) -> np.ndarray:
    """[W, S] how often each item counts in each bootstrap draw; hangs on the seed and the number of items only."""
    picks = np.random.default_rng(seed).integers(0, items, (number, items))
    return np.stack([np.bincount(pick, minlength=items) for pick in picks])


def _drawn(records: Sequence[Records]) -> np.ndarray:
    """[W] bootstrap scores, mean over seeds: every seed and every network sees the same draws."""
    scorers, items = [scorer(one) for one in records], records[0].items
    counts = draws(items)
    parts = [counts[start : start + CHUNK] for start in range(0, len(counts), CHUNK)]
    return np.concatenate([np.mean([score(part) for score in scorers], axis=0) for part in parts])


def score_of(records: Sequence[Records]) -> Score:
    """Mean over seeds with a 95 % interval over test items."""
    low, high = np.quantile(_drawn(records), [0.025, 0.975])
    value, chance = (
        float(np.mean(values)) for values in ([value_of(one) for one in records], [one.chance for one in records])
    )
    return Score(value, float(low), float(high), chance, records[0].items)


def difference_of(records: Sequence[Records], base: Sequence[Records]) -> Difference | None:
    """records − base, paired over test items: each draw takes the same ones for both. None where they do not count the same."""
    if records[0].metric != base[0].metric or records[0].items != base[0].items:
        return None
    low, high = np.quantile(_drawn(records) - _drawn(base), [0.025, 0.975])
    value = np.mean([value_of(one) for one in records]) - np.mean([value_of(one) for one in base])
    return Difference(float(value), float(low), float(high))


def confusion(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """[truth, predicted] counts of labelled pixels (truth >= 0)."""
    keep = truth >= 0
    index = truth[keep].astype(np.int64) * num_classes + predicted[keep].astype(np.int64)
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)
