"""Probes of a finished model: on a shard set or an outside labelled set, beside the same network untrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cluster import storage
from cluster.errors import UsageError
from data_prep.shards import MANIFEST, ShardSet
from model.pretrained import Pretrained
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.features import FUSED
from pipeline.probes.in_loop import probe_scores
from pipeline.probes.outside import list_outside, outside_features, split_outside
from pipeline.probes.scores import Score
from pipeline.probes.tasks import TASKS, segment_scores, site_scores


@dataclass(frozen=True)
class ProbeResult:
    """Scores by modality of the trained and of the untrained network; `headline` names the one to quote."""

    task: str
    trained: dict[str, Score]
    untrained: dict[str, Score]
    split: str

    @property
    def headline(self) -> str:
        return FUSED if FUSED in self.trained else max(self.trained, key=lambda name: self.trained[name].value)

    def to_json(self) -> dict[str, Any]:
        best = self.trained[self.headline]
        base = self.untrained[self.headline]
        return {
            "task": self.task, "modality": self.headline, "score": best.value, "low": best.low, "high": best.high,
            "untrained": base.value, "untrained_low": base.low, "untrained_high": base.high, "chance": best.chance,
            "sites": best.sites, "split": self.split, "trained": {n: asdict(s) for n, s in self.trained.items()},
            "baseline": {n: asdict(s) for n, s in self.untrained.items()},
        }  # fmt: skip


def untrained_twin(model: Pretrained, seed: int = 0) -> Pretrained:
    """The same architecture and statistics with weights as training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Pretrained(model.cfg, model.statistics).eval()


def probe_model(
    model: Pretrained, url: str, task: str, probe: ProbeConfig, view: ViewConfig, device: str = "cpu"
) -> ProbeResult:
    """Scores of one task.

    Raises:
        UsageError: unknown task, or a set without what the task needs.
    """
    if task not in TASKS:
        raise UsageError(f"--task {task}: known ones are {', '.join(TASKS)}")
    twin = untrained_twin(model)
    results, split = [], ""
    for network in (model.to(device), twin.to(device)):
        if storage.exists(storage.join(url, MANIFEST)):
            scores, split = _on_shards(network, ShardSet.open(url), task, probe, view, device)
        else:
            scores, split = _on_outside(network, url, task)
        results.append(scores)
    if not results[0]:
        raise UsageError(f"{url}: too few labelled sites with a modality this model reads for a {task} probe")
    return ProbeResult(task, results[0], results[1], split)


def _on_shards(
    model: Pretrained, shardset: ShardSet, task: str, probe: ProbeConfig, view: ViewConfig, device: str
) -> tuple[dict[str, Score], str]:
    settings = ProbeConfig(tasks=(task,), samples=probe.samples, label=probe.label, raster=probe.raster)
    scores, figures = probe_scores(model.skysense, shardset, settings, view, model.statistics, device)
    return _by_modality(scores), f"{int(figures['probe/split']):012x}"


def _on_outside(model: Pretrained, url: str, task: str) -> tuple[dict[str, Score], str]:
    items, classes = list_outside(url)
    if (task == "segment") == bool(classes):
        raise UsageError(
            f"{url} is {'a folder of classes' if classes else 'images with label rasters'}: it cannot serve --task {task}"
        )
    train, test, split = split_outside(items)
    features = outside_features(model, [items[i] for i in (*train, *test)], dense=task == "segment")
    if task == "segment":
        assert features.classes is not None
        return segment_scores(features, len(train), int(features.classes.max()) + 1), split
    labels = np.array([items[i].label for i in (*train, *test)])
    return site_scores(task, features, labels, len(train)), split


def _by_modality(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {name.split("/", 1)[1]: score for name, score in scores.items()}
