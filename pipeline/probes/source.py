"""Labelled sites of any kind, as the probes of a finished model take them: a shard set, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from data_prep.shards import MANIFEST, ShardSet
from model.batch import View
from model.inputs import normalise
from model.pretrained import Pretrained
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.exam import Exam, uncovered
from pipeline.probes.features import Describer, SiteFeatures, extract
from pipeline.probes.outside import Declared, list_outside, outside_features, outside_view, split_outside
from pipeline.probes.plan import plan_probe, seen_digest
from pipeline.probes.sites import view_of_sites
from pipeline.probes.tasks import MIN_SITES

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Source:
    """
    exam: labels, split and name of the round.
    describe: (describers, device, told of progress) → features of all sites per describer.
    view: positions of sites → their normalised view, as probes see them.
    training_view: canvas and dates of one training sample, where they are smaller than the probe's view.
    """

    exam: Exam
    describe: Callable[[Sequence[Describer], str, Advance], list[SiteFeatures]]
    view: Callable[[Sequence[int]], View]
    training_view: ViewConfig | None


def open_source(
    model: Pretrained, url: str, probe: ProbeConfig, trained: ViewConfig, declared: Declared | None = None
) -> Source:
    """A shard set, if there is a manifest at `url`, else a labelled folder. trained: see `plan_probe`.

    Raises:
        UsageError: no labelled set, one that cannot serve the tasks, or too few sites.
    """
    if storage.exists(storage.join(url, MANIFEST)):
        if declared is not None:
            raise UsageError(
                f"{url} is a shard set and says itself what it holds: leave --sensor, --bands, --gsd, --unit out"
            )
        return _shards(model, ShardSet.open(url), probe, trained)
    return _folder(model, url, probe, declared)


def _shards(model: Pretrained, shardset: ShardSet, probe: ProbeConfig, trained: ViewConfig) -> Source:
    plan, names = plan_probe(shardset, probe, trained), model.cfg.modalities

    def describe(describers: Sequence[Describer], device: str, advance: Advance) -> list[SiteFeatures]:
        return extract(
            describers, names, shardset.read_sample, plan.rows, plan.view, model.statistics, plan.raster,
            device=device, advance=advance,
        )  # fmt: skip

    def view(positions: Sequence[int]) -> View:
        sites = [shardset.read_sample(plan.rows[i]) for i in positions]
        return normalise(view_of_sites(sites, plan.view, names), model.statistics)

    return Source(plan, describe, view, trained)


def _folder(model: Pretrained, url: str, probe: ProbeConfig, declared: Declared | None) -> Source:
    items, classes = list_outside(url)
    is_dense = "segment" in probe.tasks
    if is_dense == bool(classes) or (is_dense and len(probe.tasks) > 1):
        raise UsageError(
            f"{url} is {'a folder of classes' if classes else 'images with label rasters'}: it cannot serve --task "
            f"{'segment' if classes else 'knn or linear, say --task segment'}"
        )
    train, test, split = split_outside(items)
    items = [items[i] for i in (*train, *test)]
    labels = None
    notes: tuple[str, ...] = ()
    if not is_dense:
        for side, part in (("training", train), ("test", test)):
            if len(part) < MIN_SITES:
                raise UsageError(f"{url}: {len(part)} {side} images, a probe needs {MIN_SITES}")
        labels = np.array([item.label for item in items])
        notes = uncovered(labels, len(train), classes, url)
    seen = None if declared is None else asdict(declared)
    exam = Exam(
        probe.tasks, len(train), tuple(storage.name(item.image) for item in items[len(train) :]), labels, tuple(classes), 0,
        seen_digest(split, seen, probe.pool, probe.stage), notes,
    )  # fmt: skip

    def describe(describers: Sequence[Describer], device: str, advance: Advance) -> list[SiteFeatures]:
        return outside_features(describers, model, items, is_dense, declared, device, advance)

    return Source(exam, describe, lambda positions: outside_view(model, [items[i] for i in positions], declared), None)
