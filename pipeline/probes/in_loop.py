"""Probes between training steps: all ranks call, all get the same figures."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from cluster.errors import UsageError
from data_prep.index import LABEL_PREFIX
from data_prep.shards import ShardSet
from pipeline.config import PretrainConfig
from pipeline.probes.features import SiteFeatures, extract
from pipeline.probes.scores import Score
from pipeline.probes.split import ProbeSplit, split_of
from pipeline.probes.tasks import TASKS, segment_scores, site_scores, spread


def run_probes(
    skysense: nn.Module,
    cfg: PretrainConfig,
    shardset: ShardSet,
    device: torch.device | str = "cpu",
    ranks: object = None,
) -> dict[str, float]:
    """`probe/<task>/<modality|fused>`, with `…/low` and `…/high`, collapse figures, and `probe/seconds`, the cost of all.

    `cfg.probe` says which tasks, which label and how many sites. `ranks` is not needed: torch.distributed knows.

    Raises:
        UsageError: the set has no such label, or no sites to test on.
    """
    start = time.monotonic()
    figures: dict[str, float] = {}
    scores, more = probe_scores(skysense, cfg, shardset, cfg.probe.tasks, device)
    for task, score in scores.items():
        figures |= {f"probe/{task}": score.value, f"probe/{task}/low": score.low, f"probe/{task}/high": score.high}
    figures |= more
    figures["probe/seconds"] = time.monotonic() - start
    return figures


def probe_scores(
    skysense: nn.Module,
    cfg: PretrainConfig,
    shardset: ShardSet,
    tasks: tuple[str, ...],
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Score], dict[str, float]]:
    """Scores by `<task>/<modality|fused>`, and collapse figures of the features they stand on."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"probe.tasks holds {unknown[0]!r}; known ones are {', '.join(TASKS)}")
    scores: dict[str, Score] = {}
    figures: dict[str, float] = {}
    by_site = [task for task in tasks if task != "segment"]
    if by_site:
        split = split_of(shardset, cfg.probe.samples, cfg.probe.label)
        features = _features(skysense, cfg, shardset, split, None, device)
        labels = _labels(shardset, cfg.probe.label, split)
        figures |= spread(features)
        for task in by_site:
            scores |= {
                f"{task}/{name}": score for name, score in site_scores(task, features, labels, len(split.train)).items()
            }
    if "segment" in tasks:
        raster = raster_name(shardset, cfg)
        split = split_of(shardset, cfg.probe.samples, None, raster)
        features = _features(skysense, cfg, shardset, split, raster, device)
        num_classes = len(shardset.classes.get(raster, ())) or int(features.classes.max()) + 1  # type: ignore[union-attr]
        scores |= {f"segment/{name}": s for name, s in segment_scores(features, len(split.train), num_classes).items()}
    return scores, figures


def statistics_dict(shardset: ShardSet) -> dict[str, dict[str, object]]:
    """Per-band statistics as `model.inputs.normalise` takes them."""
    return {name: value.to_dict() for name, value in shardset.statistics.items()}


def raster_name(shardset: ShardSet, cfg: PretrainConfig) -> str:
    """The label raster to segment: `probe.raster` where the config has one, else the only one of the set."""
    if cfg.probe.raster:
        return cfg.probe.raster
    names = sorted({name for row in shardset.read_index(["rasters"])["rasters"].to_pylist() for name in row or ()})
    if len(names) == 1:
        return names[0]
    raise UsageError(
        f"{shardset.url} has {'the label rasters ' + ', '.join(names) if names else 'no label raster'}: set probe.raster"
    )


def _features(
    skysense: nn.Module,
    cfg: PretrainConfig,
    shardset: ShardSet,
    split: ProbeSplit,
    raster: str | None,
    device: torch.device | str,
) -> SiteFeatures:
    rows = (*split.train, *split.test)
    return extract(
        skysense, shardset.read_sample, rows, cfg.data.views_global, statistics_dict(shardset), raster, device=device
    )


def _labels(shardset: ShardSet, label: str, split: ProbeSplit) -> np.ndarray:
    column = np.asarray(shardset.read_index([f"{LABEL_PREFIX}{label}"])[f"{LABEL_PREFIX}{label}"].to_pylist())
    return column[[*split.train, *split.test]].astype(np.int64)
