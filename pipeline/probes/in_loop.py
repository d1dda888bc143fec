"""Probes between training steps: all ranks call, all get the same scores, the first keeps what each test site got."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cluster.errors import UsageError
from data_prep.index import LABEL_PREFIX
from data_prep.shards import ShardSet
from pipeline.config import PretrainConfig, ProbeConfig, ViewConfig
from pipeline.probes.features import extract
from pipeline.probes.outcomes import Outcomes, keep, split_number
from pipeline.probes.scores import Outcome, Score
from pipeline.probes.split import split_of
from pipeline.probes.tasks import TASKS, segment_scores, site_scores, spread


@dataclass(frozen=True)
class Probed:
    """Scores by `<task>/<modality|fused>`, collapse figures of the features they stand on, and what each test site got."""

    scores: dict[str, Score]
    figures: dict[str, float]
    outcomes: Outcomes


@functools.lru_cache(maxsize=2)
def _opened(url: str) -> ShardSet:
    return ShardSet.open(url)


def probe_set(cfg: PretrainConfig) -> ShardSet:
    """The shard set whose labels are probed: the first one the run reads. Its index is read once per process."""
    return _opened(cfg.data.url if isinstance(cfg.data.url, str) else cfg.data.url[0])


def run_probes(
    skysense: nn.Module, cfg: PretrainConfig, shardset: ShardSet, device: torch.device | str = "cpu",
    rundir_url: str | None = None, step: int = 0,
) -> dict[str, float]:  # fmt: skip
    """`probe/<task>/<modality|fused>`, with `…/low` and `…/high`, collapse figures, `probe/split` (a number that names
    the split: equal numbers, equal sites and labels) and `probe/seconds`, the cost of all.

    `cfg.probe` says which tasks, which label and how many sites. rundir_url (the first rank gives it): run directory that
    keeps the outcomes of this step; the figures then have the gain since step 1, see `keep`.

    Raises:
        UsageError: the set has no such label, or no sites to test on.
    """
    start = time.monotonic()
    figures: dict[str, float] = {}
    probed = probe_scores(skysense, shardset, cfg.probe, cfg.data.views_global, statistics_dict(shardset), device)
    for task, score in probed.scores.items():
        figures |= {f"probe/{task}": score.value, f"probe/{task}/low": score.low, f"probe/{task}/high": score.high}
    figures |= probed.figures
    if rundir_url:
        figures |= keep(probed.outcomes, rundir_url, step)
    figures["probe/seconds"] = time.monotonic() - start
    return figures


def obstacle(cfg: PretrainConfig) -> str | None:
    """Why the configured probes cannot run on the run's data, or None. Asked before training: a set without labels is
    no reason not to pretrain on it.

    Raises:
        UsageError: an unknown probe task.
    """
    shardset, probe = probe_set(cfg), cfg.probe
    _check_tasks(probe.tasks)
    try:
        raster = raster_name(shardset, probe.raster) if "segment" in probe.tasks else None
        split_of(
            shardset, probe.samples, probe.label if any(task != "segment" for task in probe.tasks) else None, raster
        )
    except UsageError as error:
        return str(error)
    return None


def probe_scores(
    skysense: nn.Module, shardset: ShardSet, probe: ProbeConfig, view: ViewConfig,
    statistics: Mapping[str, Mapping[str, object]], device: torch.device | str = "cpu",
) -> Probed:  # fmt: skip
    """Every task of `probe.tasks` on the same split."""
    tasks = probe.tasks
    _check_tasks(tasks)
    found: dict[str, tuple[Score, Outcome]] = {}
    by_site = [task for task in tasks if task != "segment"]
    label = probe.label if by_site else None
    raster = raster_name(shardset, probe.raster) if "segment" in tasks else None
    split = split_of(shardset, probe.samples, label, raster)
    rows, num_train = (*split.train, *split.test), len(split.train)
    features = extract(skysense, shardset.read_sample, rows, view, statistics, raster, device=device)
    if label is not None:
        labels = _labels(shardset, label, rows)
        for task in by_site:
            found |= {f"{task}/{name}": s for name, s in site_scores(task, features, labels, num_train).items()}
    if raster is not None:
        num_classes = len(shardset.classes.get(raster, ())) or int(features.classes.max()) + 1  # type: ignore[union-attr]
        found |= {f"segment/{name}": s for name, s in segment_scores(features, num_train, num_classes).items()}
    figures = {"probe/split": split_number(split.digest), "probe/sites": float(len(rows))}
    keys = shardset.read_index(["key"])["key"].take(list(split.test)).to_pylist()
    return Probed(
        {name: score for name, (score, _) in found.items()},
        spread(features) | figures,
        Outcomes(split.digest, tuple(keys), {name: outcome for name, (_, outcome) in found.items()}),
    )


def statistics_dict(shardset: ShardSet) -> dict[str, dict[str, object]]:
    """Per-band statistics as `model.inputs.normalise` takes them."""
    return {name: value.to_dict() for name, value in shardset.statistics.items()}


def raster_name(shardset: ShardSet, named: str | None) -> str:
    """The label raster to segment: the one named, else the only one of the set."""
    if named:
        return named
    names = sorted({name for row in shardset.read_index(["rasters"])["rasters"].to_pylist() for name in row or ()})
    if len(names) == 1:
        return names[0]
    raise UsageError(
        f"{shardset.url} has {'the label rasters ' + ', '.join(names) if names else 'no label raster'}: set probe.raster"
    )


def _check_tasks(tasks: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"probe.tasks holds {unknown[0]!r}; known ones are {', '.join(TASKS)}")


def _labels(shardset: ShardSet, label: str, rows: Sequence[int]) -> np.ndarray:
    column = np.asarray(shardset.read_index([f"{LABEL_PREFIX}{label}"])[f"{LABEL_PREFIX}{label}"].to_pylist())
    return column[list(rows)].astype(np.int64)
