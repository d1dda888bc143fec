"""The probe tasks on extracted features: one score per modality, of the fused features, and of all sensors side by side, with what each
test site got.

`knn` and `linear` ask for a scalar label of the site (accuracy), `segment` for a label raster (mean IoU at 10 m).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cluster.errors import UsageError
from model.collapse import effective_rank
from pipeline.probes.classify import beside, knn, ridge
from pipeline.probes.features import FUSED, SiteFeatures, as_numpy
from pipeline.probes.scores import Outcome, Score, accuracy, confusion, mean_iou

CLASSIFIERS = {"knn": knn, "linear": ridge}
CONCAT = "concat"  # the sensors' pooled features side by side: what fusion has to beat
MIN_SITES = 4  # with fewer on a side a modality gets no score
MAX_PIXELS = 20_000  # training pixels of a segmentation probe

Scored = dict[str, tuple[Score, Outcome]]


def site_rows(features: SiteFeatures, num_train: int) -> Iterator[tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
    """(names, features [S, D], present [S]) of every row of the table. Of more than one sensor the concatenation is a row; where
    nothing fuses (pixel statistics) it stands for the fused features too."""
    for name, pooled in features.pooled.items():
        yield (name,), as_numpy(pooled), features.present[name].numpy()
    sensors = [name for name in features.pooled if name != FUSED and features.present[name].any()]
    names = ((CONCAT,) if len(sensors) > 1 else ()) + (() if FUSED in features.pooled else (FUSED,))
    if names and sensors:
        parts = [(as_numpy(features.pooled[name]), features.present[name].numpy()) for name in sensors]
        yield (names, *beside(parts, np.arange(len(parts[0][0])) < num_train))


def site_scores(task: str, features: SiteFeatures, labels_S: np.ndarray, num_train: int) -> Scored:
    """`knn` or `linear`; rows before `num_train` train, the others test. A modality too few sites have is left out."""
    is_train = np.arange(len(labels_S)) < num_train
    scores: Scored = {}
    for names, x, present in site_rows(features, num_train):
        train, test = present & is_train, present & ~is_train
        if train.sum() < MIN_SITES or test.sum() < MIN_SITES:
            continue
        predicted = CLASSIFIERS[task](x[train], labels_S[train], x[test])
        right = np.zeros(len(labels_S), np.uint8)
        right[test] = predicted == labels_S[test]
        outcome = Outcome(test[num_train:], right[num_train:])
        scores |= dict.fromkeys(names, (accuracy(predicted, labels_S[test], labels_S[train]), outcome))
    return scores


def segment_scores(features: SiteFeatures, num_train: int, num_classes: int) -> Scored:
    """Linear segmentation: ridge on the features under labelled pixels (at most MAX_PIXELS, evenly spaced)."""
    if features.classes is None:
        raise UsageError("segmentation needs a label raster; name one that the shard set holds")
    classes = features.classes.numpy()
    scores: Scored = {}
    for names, pixels, valid in _pixel_rows(features, num_train):
        usable = valid & (classes >= 0)
        train_s, train_p = np.nonzero(usable[:num_train])
        tested = [site for site in range(num_train, len(classes)) if usable[site].any()]
        if len(set(train_s.tolist())) < 1 or not tested:
            continue
        pick = np.linspace(0, len(train_s) - 1, min(len(train_s), MAX_PIXELS)).round().astype(int)
        train_s, train_p = train_s[pick], train_p[pick]
        x_train, y_train = as_numpy(pixels[train_s, train_p]), classes[train_s, train_p].astype(np.int64)
        x_test = as_numpy(torch.cat([pixels[site][usable[site]] for site in tested]))
        predicted = ridge(x_train, y_train, x_test)
        counts, at = np.zeros((len(classes) - num_train, num_classes, num_classes), np.int64), 0
        for site in tested:
            n = int(usable[site].sum())
            counts[site - num_train] = confusion(predicted[at : at + n], classes[site][usable[site]], num_classes)
            at += n
        outcome = Outcome(np.isin(np.arange(num_train, len(classes)), tested), counts)
        scores |= dict.fromkeys(names, (mean_iou(counts[outcome.tested], int(np.bincount(y_train).argmax())), outcome))
    return scores


def _pixel_rows(features: SiteFeatures, num_train: int) -> Iterator[tuple[tuple[str, ...], torch.Tensor, np.ndarray]]:
    """(names, features [S, P, D], valid [S, P]), as `site_rows` does per site."""
    for name, pixels in features.pixels.items():
        yield (name,), pixels, features.pixel_valid[name].numpy()
    if FUSED in features.pixels or not features.pixels:
        return
    sites, count = next(iter(features.pixel_valid.values())).shape
    parts: Sequence[tuple[np.ndarray, np.ndarray]] = [
        (as_numpy(x).reshape(sites * count, -1), features.pixel_valid[name].numpy().reshape(-1))
        for name, x in features.pixels.items()
    ]
    x, valid = beside(parts, np.arange(sites * count) < num_train * count)
    yield (FUSED,), torch.from_numpy(x.reshape(sites, count, -1)), valid.reshape(sites, count)


def spread(features: SiteFeatures, pool: str) -> dict[str, float]:
    """Collapse diagnostics over sites: effective rank and mean standard deviation of the mean-pooled features."""
    figures = {}
    for name, pooled in features.pooled.items():
        rows = pooled[features.present[name]]
        rows = rows[:, : rows.shape[1] // 2] if pool == "mean_std" else rows  # means come first
        if len(rows) > 1:
            figures[f"probe/effective_rank/{name}"] = float(effective_rank(rows))
            figures[f"probe/std/{name}"] = float(rows.std(dim=0, correction=0).mean())
    return figures
