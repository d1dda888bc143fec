"""Few labels: the same probes with so many labelled training sites per class, over several draws of who is labelled.

A site's outcome is its mean over the draws; intervals and paired differences draw test sites, the standard deviation beside them is
that of the score over draws of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from cluster.errors import UsageError
from pipeline.probes.exam import Exam
from pipeline.probes.features import SiteFeatures
from pipeline.probes.labelled import Recipe, finetuned, train_on_labels
from pipeline.probes.offline import Prepared, ProbeResult, Round
from pipeline.probes.outcomes import Outcomes
from pipeline.probes.scores import Difference, Outcome, difference, score_of, total_score
from pipeline.probes.tasks import site_scores


def few_labels(prepared: Prepared, per_class: int, draws: int) -> list[ProbeResult]:
    """Every task with `per_class` labelled training sites of each class, on all test sites, over `draws` draws.

    Raises:
        UsageError: a class with fewer training sites.
    """
    exam = prepared.source.exam
    chosen = [draw_labels(exam, per_class, draw) for draw in range(draws)]
    results = []
    for task in exam.tasks:
        rounds = {
            row: [_scored(task, features, exam, train) for train in chosen]
            for row, features in prepared.features.items()
        }
        facts = {"labels_per_class": per_class, "draws": draws}
        bare = ProbeResult(task, {}, {}, Outcomes(exam.digest, exam.keys, {}), facts=facts)
        results.append(with_rows(bare, exam, rounds))
    return results


def finetune(
    prepared: Prepared, results: Sequence[ProbeResult], per_class: int, draws: int, samples: int
) -> list[ProbeResult]:
    """The results of `few_labels` with the rows `finetuned` (from the pretrained weights) and `scratch` (the untrained network), trained
    on the labels of the same draws for `samples` samples each."""
    exam = prepared.source.exam
    rounds: dict[str, list[Round]] = {"finetuned": [], "scratch": []}
    for draw in range(draws):
        train, recipe = draw_labels(exam, per_class, draw), Recipe(samples, seed=draw)
        for row, model, how in (("finetuned", prepared.model, finetuned(recipe)), ("scratch", prepared.twin, recipe)):
            title = f"{row} {draw + 1}/{draws}"
            rounds[row].append(train_on_labels(model, prepared.source, train, how, title, prepared.device))
    return [with_rows(result, exam, rounds, {"finetune_samples": samples}) for result in results]


def supervise(prepared: Prepared, results: Sequence[ProbeResult], samples: int) -> list[ProbeResult]:
    """The results with the row `supervised`: the same network trained from scratch on the labels of all training sites, for so many
    samples. An upper bound for what pretraining of that length can give, not a rival: it has seen the labels."""
    exam = prepared.source.exam
    title = f"supervised, {samples:,} samples"
    own = train_on_labels(
        prepared.twin, prepared.source, range(exam.num_train), Recipe(samples), title, prepared.device
    )
    return [with_rows(result, exam, {"supervised": [own]}, {"supervised_samples": samples}) for result in results]


def draw_labels(exam: Exam, per_class: int, draw: int) -> list[int]:
    """Positions of the labelled training sites of one draw, ascending: a function of the split and the number of the draw.

    Raises:
        UsageError: a class with fewer training sites.
    """
    assert exam.labels is not None
    train = exam.labels[: exam.num_train]
    rng = np.random.default_rng([int(exam.digest[:12], 16), draw])
    chosen: list[int] = []
    for label in np.unique(train):
        sites = np.flatnonzero(train == label)
        if len(sites) < per_class:
            name = exam.classes[label] if label < len(exam.classes) else label
            raise UsageError(f"--labels-per-class {per_class}: class {name} has {len(sites)} training sites")
        chosen += rng.choice(sites, per_class, replace=False).tolist()
    return sorted(chosen)


def with_rows(
    result: ProbeResult, exam: Exam, rounds: dict[str, list[Round]], facts: dict[str, object] | None = None
) -> ProbeResult:
    """The result with the rounds as further rows: their mean over draws, its spread, and the row `trained` minus each of them; of a row
    `finetuned` also what it is over `scratch` and `pixels`."""
    assert exam.labels is not None
    labels = exam.labels
    frequency = np.bincount(labels[: exam.num_train], minlength=int(labels.max()) + 1) / exam.num_train
    chance = float((frequency[labels[exam.num_train :]]).mean())
    means = {row: _mean(each) for row, each in rounds.items()}
    rows = result.rows | {row: {n: score_of(o, chance) for n, o in mean.items()} for row, mean in means.items()}
    sd = result.sd | {
        row: {name: float(np.std([total_score(one[name]) for one in each], ddof=1)) if len(each) > 1 else 0.0 for name in means[row]}
        for row, each in rounds.items()
    }  # fmt: skip
    by_row = result.by_row | means
    over = result.over | {row: paired(by_row["trained"], mean) for row, mean in means.items() if row != "trained"}
    if "finetuned" in means:
        over |= {f"finetuned_over_{row}": paired(means["finetuned"], by_row[row]) for row in ("scratch", "pixels")}
    return replace(result, rows=rows, over=over, by_row=by_row, sd=sd, facts=result.facts | (facts or {}))


def paired(own: Round, other: Round) -> dict[str, Difference]:
    """own − other by modality, paired over the test sites."""
    found = {name: difference(outcome, other[name]) for name, outcome in own.items() if name in other}
    return {name: value for name, value in found.items() if value is not None}


def _scored(task: str, features: SiteFeatures, exam: Exam, train: Sequence[int]) -> Round:
    """Only the sites of `train` and the test sites exist: nothing is standardised on the unlabelled rest."""
    assert exam.labels is not None
    positions = np.array([*train, *range(exam.num_train, len(exam.labels))])
    index = torch.from_numpy(positions)
    pooled, present = ({name: x[index] for name, x in of.items()} for of in (features.pooled, features.present))
    few = SiteFeatures(pooled, present, {}, {}, None)
    return {name: outcome for name, (_, outcome) in site_scores(task, few, exam.labels[positions], len(train)).items()}


def _mean(rounds: Sequence[Round]) -> Round:
    """Mean over draws of what each site got; a site counts where every draw tested it."""
    names = [name for name in rounds[0] if all(name in one for one in rounds)]
    return {
        name: Outcome(
            np.all([one[name].tested for one in rounds], axis=0), np.mean([one[name].counts for one in rounds], axis=0)
        )
        for name in names
    }
