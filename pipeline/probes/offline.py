"""Probes of a finished model: on a shard set or an outside labelled set, beside the same network untrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from cluster import storage
from cluster.errors import UsageError
from cluster.rundir import RunDir
from data_prep.shards import MANIFEST, ShardSet
from model.pretrained import Pretrained
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.features import FUSED
from pipeline.probes.in_loop import probe_scores
from pipeline.probes.outcomes import Outcomes, differences, url_of, write_outcomes
from pipeline.probes.outside import list_outside, outside_features, split_outside
from pipeline.probes.scores import Difference, Score
from pipeline.probes.tasks import TASKS, segment_scores, site_scores

T = TypeVar("T")


@dataclass(frozen=True)
class ProbeResult:
    """Scores by modality of the trained and of the untrained network; `headline` names the one to quote.

    gain: trained − untrained, paired over the test sites; outcomes: what each of them got from the trained network.
    """

    task: str
    trained: dict[str, Score]
    untrained: dict[str, Score]
    gain: dict[str, Difference]
    outcomes: Outcomes

    @property
    def headline(self) -> str:
        return FUSED if FUSED in self.trained else max(self.trained, key=lambda name: self.trained[name].value)

    def to_json(self) -> dict[str, Any]:
        best = self.trained[self.headline]
        base = self.untrained[self.headline]
        gain = self.gain[self.headline]
        return {
            "task": self.task, "modality": self.headline, "score": best.value, "low": best.low, "high": best.high,
            "untrained": base.value, "untrained_low": base.low, "untrained_high": base.high, "chance": best.chance,
            "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high,
            "sites": best.sites, "split": self.outcomes.split, "trained": {n: asdict(s) for n, s in self.trained.items()},
            "baseline": {n: asdict(s) for n, s in self.untrained.items()},
            "gains": {n: asdict(d) for n, d in self.gain.items()},
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
    results = []
    for network in (model.to(device), twin.to(device)):
        if storage.exists(storage.join(url, MANIFEST)):
            results.append(_on_shards(network, ShardSet.open(url), task, probe, view, device))
        else:
            results.append(_on_outside(network, url, task))
    (scores, outcomes), (base_scores, base_outcomes) = results
    if not scores:
        raise UsageError(f"{url}: too few labelled sites with a modality this model reads for a {task} probe")
    gain = _by_modality(differences(outcomes, base_outcomes))
    return ProbeResult(task, _by_modality(scores), _by_modality(base_scores), gain, outcomes)


def keep_beside(model: Pretrained, result: ProbeResult) -> str | None:
    """Writes the outcomes into the run directory that the weights come from, if it is there and they are the teacher's, which
    in-loop probes score too. Returns the URL, or None where there is nothing to write to.

    Raises:
        OSError, RunFailure: the run directory cannot be written.
    """
    folder = str(model.facts.get("checkpoint", ""))
    rundir_url, _, _ = folder.rpartition("/checkpoints/")
    if not rundir_url or model.facts.get("weights") != "teacher" or RunDir(rundir_url).read_resolved() is None:
        return None
    url = url_of(rundir_url, int(model.facts["step"]), f"{result.task}-{result.outcomes.split}")
    write_outcomes(url, result.outcomes)
    return url


def _on_shards(
    model: Pretrained, shardset: ShardSet, task: str, probe: ProbeConfig, view: ViewConfig, device: str
) -> tuple[dict[str, Score], Outcomes]:
    settings = ProbeConfig(tasks=(task,), samples=probe.samples, label=probe.label, raster=probe.raster)
    probed = probe_scores(model.skysense, shardset, settings, view, model.statistics, device)
    return probed.scores, probed.outcomes


def _on_outside(model: Pretrained, url: str, task: str) -> tuple[dict[str, Score], Outcomes]:
    items, classes = list_outside(url)
    if (task == "segment") == bool(classes):
        raise UsageError(
            f"{url} is {'a folder of classes' if classes else 'images with label rasters'}: it cannot serve --task {task}"
        )
    train, test, split = split_outside(items)
    features = outside_features(model, [items[i] for i in (*train, *test)], dense=task == "segment")
    if task == "segment":
        assert features.classes is not None
        found = segment_scores(features, len(train), int(features.classes.max()) + 1)
    else:
        labels = np.array([items[i].label for i in (*train, *test)])
        found = site_scores(task, features, labels, len(train))
    keys = tuple(storage.name(items[i].image) for i in test)
    outcomes = Outcomes(split, keys, {f"{task}/{name}": outcome for name, (_, outcome) in found.items()})
    return {f"{task}/{name}": score for name, (score, _) in found.items()}, outcomes


def _by_modality(found: Mapping[str, T]) -> dict[str, T]:
    return {name.split("/", 1)[1]: value for name, value in found.items()}
