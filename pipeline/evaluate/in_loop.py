"""`probe.outside`: rows of `evaluate` between training steps, so that a run is watched on labels that other people made.

The row's own reader, bands, radiometry and split; the probes' own features, classifiers, intervals and baselines (`pipeline.probes`).
Of each side at most `probe.samples` images, chosen by hash of their names. All ranks call, each reads its share, all get the same
scores: `probe/<task>/<row>`, of the row's sensor, or of the fused features where it has several.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import UsageError
from cluster.lease import Lease
from model.batch import View
from model.pretrained import Pretrained
from model.skysense import SkySense
from pipeline.config import PretrainConfig
from pipeline.evaluate.encode import make_batch
from pipeline.evaluate.frozen import check_pixels
from pipeline.evaluate.items import Item, Sample
from pipeline.evaluate.registry import ROWS, Row, row_named
from pipeline.parallel.processes import agree_max
from pipeline.probes.exam import Exam, Probed, sit, uncovered
from pipeline.probes.features import FUSED, Describer, SiteFeatures, gathered, network
from pipeline.probes.outcomes import Outcomes, keep_round, split_number, stored_pixels
from pipeline.probes.pixels import describe_pixels
from pipeline.probes.plan import seen_digest
from pipeline.probes.tasks import CLASSIFIERS, MIN_SITES

BATCH = 32  # images of one size in a forward pass


@dataclass(frozen=True)
class Watched(Exam):
    """A row as a run looks at it. items: training ones first."""

    row: Row
    items: tuple[Item, ...]

    @property
    def shown(self) -> str:
        """Whose features are scored."""
        return FUSED if len(self.row.sensors) > 1 else self.row.sensors[0]


def plan_watched(cfg: PretrainConfig, is_first: bool = True, device: torch.device | str = "cpu") -> tuple[Watched, ...]:
    """The rows of `probe.outside`, their layout, split and pixels checked; empty where nothing is probed. All ranks call, the
    first one (`is_first`) looks at the pixels.

    Raises:
        UsageError: an unknown row, one that is not of the kind `class` or whose sensors the model has not, bad files, wrong radiometry.
    """
    if not cfg.probe.every:
        return ()
    watched = tuple(_planned(row_named(name, "probe.outside"), url, cfg) for name, url in cfg.probe.outside.items())
    problem = ""
    if is_first:
        try:
            for one in watched:
                check_pixels(one.row, one.items)
        except UsageError as error:
            problem = str(error)
    if agree_max(float(bool(problem)), device):
        raise UsageError(f"probe.outside: {problem or 'refused, the first rank says why'}")
    return watched


def _planned(row: Row, url: str, cfg: PretrainConfig) -> Watched:
    if row.kind != "class":
        known = ", ".join(one.name for one in ROWS if one.kind == "class")
        raise UsageError(
            f"probe.outside: {row.name} is of kind {row.kind}; a run is watched on one class per image: {known}"
        )
    missing = [sensor for sensor in row.sensors if sensor not in cfg.model.modalities]
    if missing:
        raise UsageError(f"probe.outside: {row.name} needs {missing[0]}, which model.modalities lacks")
    labelled = row.read(url, row)
    train = _some([item for item in labelled.items if item.split != "test"], cfg.probe.samples)
    test = _some(labelled.of("test"), cfg.probe.samples)
    for side, part in (("training", train), ("test", test)):
        if len(part) < MIN_SITES:
            raise UsageError(f"probe.outside: {url} has {len(part)} {side} images, a probe needs {MIN_SITES}")
    items = (*train, *test)
    labels = np.array([labelled.classes.index(item.label) for item in items])
    split = hashlib.sha256(
        "\n".join([labelled.digest, str(len(train)), *(item.key for item in items)]).encode()
    ).hexdigest()
    tasks = tuple(task for task in cfg.probe.tasks if task in CLASSIFIERS) or ("knn",)
    return Watched(
        tasks, len(train), tuple(item.key for item in test), labels, labelled.classes, 0,
        seen_digest(split, [bands.describe() for bands in row.bands], cfg.probe.pool, cfg.probe.stage),
        uncovered(labels, len(train), labelled.classes, row.name), row, items,
    )  # fmt: skip


def _some(items: Sequence[Item], most: int) -> list[Item]:
    """The same ones whatever else changes: nested in `most`."""
    return sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest())[:most]


def watch(
    skysense: SkySense, cfg: PretrainConfig, watched: Watched, statistics: Mapping[str, Mapping[str, object]],
    device: torch.device | str = "cpu", rundir_url: str | None = None, step: int = 0, lease: Lease | None = None,
) -> dict[str, float]:  # fmt: skip
    """Scores of one row as `pipeline.probes.in_loop.run_probes` gives those of the run's own labels, with the same baselines; what
    each test image got is kept in the run directory (rundir_url: the first rank gives it). `probe/<row>/split` names the split.
    """
    start, name = time.monotonic(), watched.row.name
    pixels = stored_pixels(rundir_url, watched.digest, watched.tasks) if rundir_url else None
    is_missing = bool(agree_max(float(bool(rundir_url) and pixels is None), device))
    describers = [network(skysense, cfg.probe.pool, cfg.probe.stage), *([describe_pixels] if is_missing else [])]
    described = describe_items(describers, Pretrained.around(skysense, statistics), watched, device)
    probed = _seat(watched, described[0], cfg.probe.pool)
    figures: dict[str, float] = {}
    for key, score in probed.scores.items():
        figures |= {f"probe/{key}": score.value, f"probe/{key}/low": score.low, f"probe/{key}/high": score.high}
    if rundir_url:
        pixels = pixels or _seat(watched, described[1], "mean").outcomes
        figures |= keep_round(probed.outcomes, pixels, rundir_url, step, lease, f"{name}-{watched.digest}")
    return figures | {
        f"probe/{name}/split": split_number(watched.digest), f"probe/{name}/seconds": time.monotonic() - start
    }  # fmt: skip


def _seat(watched: Watched, features: SiteFeatures, pool: str) -> Probed:
    """`sit`, with the row's name in place of the one sensor, or of the fused features, that is scored."""
    probed = sit(watched, features, pool)
    names = {f"{task}/{watched.shown}": f"{task}/{watched.row.name}" for task in watched.tasks}
    outcomes = {new: probed.outcomes.by_name[old] for old, new in names.items() if old in probed.outcomes.by_name}
    return replace(
        probed,
        scores={new: probed.scores[old] for old, new in names.items() if old in probed.scores},
        outcomes=Outcomes(watched.digest, watched.keys, outcomes),
    )


def describe_items(
    describers: Sequence[Describer], model: Pretrained, watched: Watched, device: torch.device | str
) -> list[SiteFeatures]:
    """What each describer says of the items, shared out over all ranks, gathered on every one.

    Images of one size go through together. Every rank makes the same number of forward passes, its last ones with nothing valid in
    them if the others have more: experts may lie on other ranks, and their collectives must meet. How many those are comes out of the
    images' sizes, so the ranks agree pass by pass, and each image is read once.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    groups = _groups(watched.items[rank::world])
    parts: list[list[dict[str, Tensor]]] = [[] for _ in describers]
    with torch.no_grad():
        while agree_max(float(bool(samples := next(groups, []))), device):
            seen = _view(model, watched.row, samples).to(device)
            for described, describe in zip(parts, describers):
                found = describe(seen, None, 0)
                described.append({name: value[: len(samples)] for name, value in found.items()})
    whole = math.ceil(len(watched.items) / world)
    joined = ({name: torch.cat([part[name] for part in many]) for name in many[0]} for many in parts)
    return [SiteFeatures.of(gathered(named, whole, len(watched.items))) for named in joined]


def _view(model: Pretrained, row: Row, samples: list[Sample]) -> View:
    """Normalised view of samples of one size; of none: an image in which nothing is valid."""
    if samples:
        return make_batch(model, row, samples).views[0]
    bands = row.bands[0]
    blank = np.zeros((1, len(bands.order), 32, 32), np.float32 if bands.unit != "uint8" else np.uint8)
    return make_batch(model, row.only((bands.sensor,)), [Sample({bands.sensor: blank}, 0, inside=(0, 0))]).views[0]


def _groups(items: Sequence[Item]) -> Iterator[list[Sample]]:
    """Runs of at most BATCH consecutive items whose images are of one size, read when they are asked for."""
    group: list[Sample] = []
    for item in items:
        sample = item.read()
        if group and (len(group) == BATCH or _shapes(sample) != _shapes(group[0])):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: images.shape for name, images in sample.images.items()}
