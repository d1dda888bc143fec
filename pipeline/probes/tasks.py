"""The probe tasks on extracted features: one score per modality, and one for the fused features, with what each test site got.

`knn` and `linear` ask for a scalar label of the site (accuracy), `segment` for a label raster (mean IoU at 10 m).
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.errors import UsageError
from model.collapse import effective_rank
from pipeline.probes.classify import knn, ridge
from pipeline.probes.features import SiteFeatures, as_numpy
from pipeline.probes.scores import Outcome, Score, accuracy, confusion, mean_iou

TASKS = ("knn", "linear", "segment")
MIN_SITES = 4  # with fewer on a side a modality gets no score
MAX_PIXELS = 20_000  # training pixels of a segmentation probe


def site_scores(
    task: str, features: SiteFeatures, labels_S: np.ndarray, num_train: int
) -> dict[str, tuple[Score, Outcome]]:
    """`knn` or `linear`; rows before `num_train` train, the others test. A modality too few sites have is left out."""
    classifier = {"knn": knn, "linear": ridge}[task]
    is_train = np.arange(len(labels_S)) < num_train
    scores = {}
    for name, pooled in features.pooled.items():
        present = features.present[name].numpy()
        train, test = present & is_train, present & ~is_train
        if train.sum() < MIN_SITES or test.sum() < MIN_SITES:
            continue
        x = as_numpy(pooled)
        predicted = classifier(x[train], labels_S[train], x[test])
        right = np.zeros(len(labels_S), np.uint8)
        right[test] = predicted == labels_S[test]
        outcome = Outcome(test[num_train:], right[num_train:])
        scores[name] = accuracy(predicted, labels_S[test], labels_S[train]), outcome
    return scores


def segment_scores(features: SiteFeatures, num_train: int, num_classes: int) -> dict[str, tuple[Score, Outcome]]:
    """Linear segmentation: ridge on the features under labelled pixels (at most MAX_PIXELS, evenly spaced)."""
    if features.classes is None:
        raise UsageError("segmentation needs a label raster; name one that the shard set holds")
    classes = features.classes.numpy()
    scores = {}
    for name, pixels in features.pixels.items():
        usable = features.pixel_valid[name].numpy() & (classes >= 0)
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
        scores[name] = mean_iou(counts[outcome.tested], int(np.bincount(y_train).argmax())), outcome
    return scores


def spread(features: SiteFeatures) -> dict[str, float]:
    """Collapse diagnostics over sites: effective rank and mean standard deviation of the pooled features."""
    figures = {}
    for name, pooled in features.pooled.items():
        rows = pooled[features.present[name]]
        if len(rows) > 1:
            figures[f"probe/effective_rank/{name}"] = float(effective_rank(rows))
            figures[f"probe/std/{name}"] = float(rows.std(dim=0, correction=0).mean())
    return figures
