"""What a probe of a shard set will do, before a network is asked: which sites, what is shown of them, which labels, under which name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cluster.errors import UsageError
from data_prep.index import LABEL_PREFIX
from data_prep.shards import ShardSet
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.exam import Exam, uncovered
from pipeline.probes.outcomes import TASKS
from pipeline.probes.sites import whole_view
from pipeline.probes.split import split_of
from pipeline.probes.tasks import MIN_SITES

PROTOCOL = 2  # counts up when equal features would get other scores: outcomes of two protocols are never paired


@dataclass(frozen=True)
class ProbePlan(Exam):
    """rows: of the set, training sites first. view: what is shown of each. raster: label raster of `segment`."""

    rows: tuple[int, ...]
    view: ViewConfig
    raster: str | None


def plan_probe(shardset: ShardSet, probe: ProbeConfig, trained: ViewConfig) -> ProbePlan:
    """Plans every task of `probe.tasks` on the same split. trained: the view that training shows, see `whole_view`.

    Raises:
        UsageError: an unknown task, no such label, too few sites on a side, or training sites of one class only.
    """
    check_tasks(probe.tasks)
    label = probe.label if any(task != "segment" for task in probe.tasks) else None
    raster = raster_name(shardset, probe.raster) if "segment" in probe.tasks else None
    split = split_of(shardset, probe.samples, label, raster)
    for side, sites in (("training", split.train), ("test", split.test)):
        if label is not None and len(sites) < MIN_SITES:
            raise UsageError(
                f"{shardset.url}: {len(sites)} {side} sites with label {label!r}, a probe needs {MIN_SITES}"
            )
    rows = (*split.train, *split.test)
    view = probe.views or whole_view(shardset, rows, trained)
    names = tuple(shardset.classes.get(label or "", ()))
    labels = None if label is None else _labels(shardset, label, rows)
    notes = () if labels is None else uncovered(labels, len(split.train), names, shardset.url)
    keys = shardset.read_index(["key"])["key"].take(list(split.test)).to_pylist()
    num_classes = len(shardset.classes.get(raster or "", ()))
    digest = seen_digest(split.digest, asdict(view), probe.pool, probe.stage)
    return ProbePlan(
        probe.tasks, len(split.train), tuple(keys), labels, names, num_classes, digest, notes, rows, view, raster
    )


def seen_digest(split: str, view: object, pool: str, stage: str | int) -> str:
    """Name of a split as one way of looking at it sees it: 16 hex digits. view: anything JSON can hold."""
    text = json.dumps([PROTOCOL, split, view, pool, str(stage)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def check_tasks(tasks: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"probe.tasks holds {unknown[0]!r}; known ones are {', '.join(TASKS)}")


def _labels(shardset: ShardSet, label: str, rows: Sequence[int]) -> np.ndarray:
    column = np.asarray(shardset.read_index([f"{LABEL_PREFIX}{label}"])[f"{LABEL_PREFIX}{label}"].to_pylist())
    return column[list(rows)].astype(np.int64)
