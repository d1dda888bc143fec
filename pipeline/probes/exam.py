"""One round of probes: labels and sites that any row of the table (a network, pixel statistics) is put to, and what it scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import UsageError
from pipeline.probes.features import SiteFeatures
from pipeline.probes.outcomes import Outcomes, split_number
from pipeline.probes.scores import Score
from pipeline.probes.tasks import Scored, segment_scores, site_scores, spread


@dataclass(frozen=True)
class Exam:
    """
    num_train: of the sites, which come first, train. keys: of the others.
    labels: int64 [S] of `knn` and `linear`, None without them; classes: their names.
    num_classes: of the label raster of `segment`; 0: as many as occur.
    digest: names sites, labels and what is seen of them: equal digests, comparable site by site.
    notes: what is wrong with the split without making it useless.
    """

    tasks: tuple[str, ...]
    num_train: int
    keys: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    num_classes: int
    digest: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Probed:
    """Scores by `<task>/<modality|fused|concat>`, collapse figures of the features they stand on, and what each test site got."""

    scores: dict[str, Score]
    figures: dict[str, float]
    outcomes: Outcomes


def sit(exam: Exam, features: SiteFeatures, pool: str) -> Probed:
    """Every task of the exam on features of its sites. pool: how they were pooled, for the collapse figures."""
    found: Scored = {}
    for task in exam.tasks:
        if task != "segment":
            assert exam.labels is not None
            scores = site_scores(task, features, exam.labels, exam.num_train)
        else:
            assert features.classes is not None
            scores = segment_scores(features, exam.num_train, exam.num_classes or int(features.classes.max()) + 1)
        found |= {f"{task}/{name}": score for name, score in scores.items()}
    sites = exam.num_train + len(exam.keys)
    figures = {"probe/split": split_number(exam.digest), "probe/sites": float(sites)}
    return Probed(
        {name: score for name, (score, _) in found.items()},
        spread(features, pool) | figures,
        Outcomes(exam.digest, exam.keys, {name: outcome for name, (_, outcome) in found.items()}),
    )


def uncovered(labels_S: np.ndarray, num_train: int, names: Sequence[str], where: str) -> tuple[str, ...]:
    """One note if test sites have classes that no training site has: nothing can name those rightly.

    Raises:
        UsageError: all training sites are of one class.
    """
    train, test = set(labels_S[:num_train].tolist()), labels_S[num_train:].tolist()
    if len(train) < 2:
        raise UsageError(f"{where}: all {num_train} training sites are of one class; nothing to learn from them")
    missing = sorted(set(test) - train)
    if not missing:
        return ()
    listed = ", ".join(f"{names[k] if k < len(names) else k} ({test.count(k)} test sites)" for k in missing)
    return (f"{where}: no training site of class {listed}; these count as wrong for every row of the probe",)
