"""Frozen mode: features of every item once, cached; heads on them; records of every test item.

Dimension legend: N items · K classes · S test items · H, W label pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import progress
from model.pretrained import Pretrained
from pipeline.evaluate import classify, dense
from pipeline.evaluate.bands import to_model
from pipeline.evaluate.boxes import Detector, records_of, train_detector
from pipeline.evaluate.encode import Batch, Encoder, batches
from pipeline.evaluate.items import Boxes, Item, LabelledSet, hashed_split, take_share
from pipeline.evaluate.metrics import Records, confusion, value_of
from pipeline.evaluate.radiometry import check_set, check_unit
from pipeline.evaluate.registry import Row
from pipeline.evaluate.store import FeatureStore, FeatureWriter, is_complete, name_of

log = logging.getLogger(__name__)
CHECKED = 64  # items whose pixels are checked, evenly spread
CHECKED_PIXELS = 400  # of each
BATCH = {"class": 32, "labels": 16, "dense": 8, "pair": 8, "boxes": 1}


@dataclass
class Targets:
    """What the items are labelled with, in item order. sizes: rows, columns of the image (boxes) or label (dense, pair)."""

    values: list[int | np.ndarray | Boxes]
    sizes: list[tuple[int, int]]


def check_pixels(row: Row, items: Sequence[Item]) -> list[str]:
    """Radiometry of the set before anything is computed. Returns notes for the result; raises UsageError for what cannot be."""
    picked = np.linspace(0, len(items) - 1, min(CHECKED, len(items))).round().astype(int)
    raw: dict[str, list[np.ndarray]] = {bands.sensor: [] for bands in row.bands}
    stored: dict[str, list[np.ndarray]] = {bands.sensor: [] for bands in row.bands}
    notes: list[str] = []
    for item in (items[i] for i in picked):
        sample = item.read()
        for bands in row.bands:
            x_TFHW = sample.images[bands.sensor]
            x_TCHW, ok_THW = to_model(bands, x_TFHW, item.key)
            given_PC = np.moveaxis(x_TFHW[:, bands.picked], 1, -1).reshape(-1, x_TCHW.shape[1])
            raw[bands.sensor].append(given_PC[_some(np.isfinite(given_PC).all(1) & (given_PC != 0).any(1))])
            stored[bands.sensor].append(np.moveaxis(x_TCHW, 1, -1).reshape(given_PC.shape)[_some(ok_THW.reshape(-1))])
            side = max(x_TFHW.shape[2:])
            if row.published_px and not row.tile_px and side != row.published_px:
                notes.append(
                    f"images are {side} px, published are {row.published_px} px: resized or recompressed by someone"
                )
    for bands in row.bands:
        if not raw[bands.sensor]:
            raise UsageError(
                f"{row.name}: no valid pixel of {bands.sensor} in {len(picked)} items; is the unit {bands.unit}?"
            )
        check_unit(bands, np.concatenate(raw[bands.sensor]), row.name)
        notes += check_set(bands, stored[bands.sensor], row.name)
        notes += [f"{bands.sensor}: {bands.note}"] if bands.note else []
    return list(dict.fromkeys(notes))


def _some(usable_P: np.ndarray) -> np.ndarray:
    """At most CHECKED_PIXELS positions of those that are usable, evenly spread."""
    at = np.flatnonzero(usable_P)
    return at[np.linspace(0, len(at) - 1, min(CHECKED_PIXELS, len(at))).round().astype(int)]


def targets_of(row: Row, items: Sequence[Item]) -> Targets:
    """Reads the labels of all items (pixels are read again by `features`: nothing is held)."""
    values, sizes = [], []
    for item in items:
        sample = item.read()
        values.append(sample.target)
        array = (
            sample.target
            if isinstance(sample.target, np.ndarray) and sample.target.ndim == 2
            else next(iter(sample.images.values()))
        )
        sizes.append((int(array.shape[-2]), int(array.shape[-1])))
    return Targets(values, sizes)


def features(
    model: Pretrained, encoder: Encoder, row: Row, items: Sequence[Item], folder: str
) -> tuple[FeatureStore, Targets]:
    """Features and targets of all items; from `folder` where they lie complete."""
    keys = [item.key for item in items]
    if is_complete(folder, keys):
        return FeatureStore(folder), targets_of(row, items)
    writer, is_dense = FeatureWriter(folder), row.kind in ("dense", "pair", "boxes")
    values: list[int | np.ndarray | Boxes] = []
    sizes: list[tuple[int, int]] = []
    done = 0
    with torch.inference_mode(), progress(len(items), f"{row.name} {encoder.name}") as bar:
        for batch in batches(model, row, items, BATCH[row.kind]):
            found = encoder(batch, is_dense)
            for b, sample in enumerate(batch.samples):
                maps = [[m[b].float().numpy() for m in view] for view in found.maps]
                writer.add(keys[done], [vector[b].float().numpy() for vector in found.pooled], maps)
                values.append(sample.target)
                sizes.append(_size(sample.target, batch))
                done += 1
            bar.advance(len(batch.samples))
    return writer.close(), Targets(values, sizes)


def _size(target: object, batch: Batch) -> tuple[int, int]:
    if isinstance(target, np.ndarray) and target.ndim == 2:
        return target.shape[0], target.shape[1]
    lead = next(part for part in batch.views[0].modalities.values() if bool(part.valid_BTHW.any()))
    return int(lead.valid_BTHW.shape[2]), int(lead.valid_BTHW.shape[3])


@dataclass(frozen=True)
class Sides:
    """Rows of the store that train, choose and test."""

    train: list[int]
    val: list[int]
    test: list[int]


def sides(labelled: LabelledSet, share: float, seed: int) -> Sides:
    """With `share` < 1 the training and validation items are thinned alike. Without validation items a fifth of the training
    ones by hash choose (at least one, if there are two)."""
    place = {item.key: i for i, item in enumerate(labelled.items)}
    train, val = labelled.of("train"), labelled.of("val")
    if share < 1:
        train = take_share(train, share, seed)
        val = take_share(val, share, seed) if val else val
    if not val:
        val = [item for item in train if hashed_split(item.key, 0.8) == "test"] or train[-1:]
        rest = [item for item in train if item not in val]
        train = rest or train
    return Sides(*([place[item.key] for item in part] for part in (train, val, labelled.of("test"))))


def unseen(labelled: LabelledSet, targets: Targets, parts: Sides) -> list[str]:
    """A note for classes that the test has and training lacks: nothing can score on them."""
    if isinstance(targets.values[0], Boxes):
        counts = [
            np.bincount(t.labels, minlength=len(labelled.classes)) for t in targets.values if isinstance(t, Boxes)
        ]
    elif isinstance(targets.values[0], np.ndarray) and targets.values[0].dtype == bool:
        counts = [np.asarray(t, int) for t in targets.values]
    else:
        flat = [np.asarray(t).ravel() for t in targets.values]
        counts = [np.bincount(t[t >= 0], minlength=len(labelled.classes)) for t in flat]
    trained = np.sum([counts[i] for i in (*parts.train, *parts.val)], axis=0)
    tested = np.sum([counts[i] for i in parts.test], axis=0)
    missing = [name for name, a, b in zip(labelled.classes, trained, tested) if b and not a]
    return (
        [f"no training item has {', '.join(missing)}, which the test has: nothing can score there"] if missing else []
    )


def head_records(
    row: Row, labelled: LabelledSet, head: str, store: FeatureStore, targets: Targets, parts: Sides, seed: int
) -> tuple[Records, dict[str, object]]:  # fmt: skip
    """Trains one head on frozen features; what every test item got, and what was chosen on validation."""
    if row.kind in ("class", "labels"):
        return _global(row, labelled, head, store, targets, parts)
    if row.kind == "boxes":
        return _boxes(row, labelled, store, targets, parts, seed)
    return _dense(row, labelled, head, store, targets, parts, seed)


def _global(
    row: Row, labelled: LabelledSet, head: str, store: FeatureStore, targets: Targets, parts: Sides
) -> tuple[Records, dict[str, object]]:  # fmt: skip
    x_ND = store.pooled[0]
    many = row.kind == "labels"
    values = targets.values
    one_hot = np.array(values, bool) if many else np.eye(len(labelled.classes), dtype=bool)[np.array(values, int)]

    def quality(scores: np.ndarray, truth: np.ndarray) -> float:
        found = global_records(row, scores, truth, truth)
        return value_of(found)

    train, val, test = parts.train, parts.val, parts.test
    chosen: dict[str, object]
    if head == "knn":
        both = [*train, *val]
        scores, chosen = classify.knn(x_ND[both], one_hot[both], x_ND[test]), {"k": classify.K}
    elif head == "logistic":
        scores, strength = classify.logistic(x_ND[train], one_hot[train], x_ND[val], one_hot[val], x_ND[test], quality)
        chosen = {"C": strength}
    else:
        raise UsageError(f"--head {head}: {row.name} takes {', '.join(row.heads)}")
    return global_records(row, scores, one_hot[test], one_hot[[*train, *val]]), chosen


def global_records(row: Row, scores_SK: np.ndarray, truth_SK: np.ndarray, trained_NK: np.ndarray) -> Records:
    """Chance: accuracy of guessing with the training frequencies; for several labels the share of items that have them."""
    if row.kind == "labels":
        some = truth_SK.any(0)
        chance = float(truth_SK[:, some].mean()) if some.any() else 0.0
        return Records("map", {"scores": scores_SK.astype(np.float32), "truth": truth_SK}, chance)
    truth = truth_SK.argmax(1)
    order = np.argsort(-scores_SK, axis=1, kind="stable")
    frequency = trained_NK.mean(0)
    right = {"right": order[:, 0] == truth, "right5": (order[:, :5] == truth[:, None]).any(1)}
    return Records("accuracy", right, float(frequency[truth].mean()))


def _dense(
    row: Row, labelled: LabelledSet, head: str, store: FeatureStore, targets: Targets, parts: Sides, seed: int
) -> tuple[Records, dict[str, object]]:  # fmt: skip
    if head not in dense.HEADS:
        raise UsageError(f"--head {head}: {row.name} takes {', '.join(row.heads)}")
    num_classes = len(labelled.classes)

    def load(rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        views = [store.maps(i) for i in rows]
        stacked = [
            [torch.from_numpy(np.stack([views[b][v][m] for b in range(len(rows))])) for m in range(len(views[0][v]))]
            for v in range(store.views)
        ]
        labels = np.stack([np.asarray(targets.values[i], np.int64) for i in rows])
        return dense.joined(stacked), torch.from_numpy(labels)

    dims = [m.shape[1] for m in load(parts.train[:1])[0]]

    def fitted(rate: float, rows: Sequence[int]) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = dense.HEADS[head](dims, num_classes)
        return dense.train_head(built, load, rows, seed, rate)

    def quality(rate: float) -> float:
        head_of_rate = fitted(rate, parts.train)
        return value_of(dense_records(row, head_of_rate, load, parts.val, labelled, targets, parts.train))

    rate = max(dense.RATES, key=quality)
    both = sorted(
        {*parts.train, *parts.val}
    )  # as the other heads: what chose learns too, and fine-tuning learns from no more
    trained = fitted(rate, both)
    return dense_records(row, trained, load, parts.test, labelled, targets, both), {"rate": rate}


@torch.no_grad()
def dense_records(
    row: Row, head: torch.nn.Module, load: dense.Loader, rows: Sequence[int], labelled: LabelledSet, targets: Targets,
    trained: Sequence[int],
) -> Records:  # fmt: skip
    """Confusion of every test item. Chance: the best constant answer (for change: change everywhere)."""
    said = {i: dense.whole(head(load([i])[0]), targets.sizes[i]).argmax(1)[0].numpy() for i in rows}
    truth = {i: np.asarray(targets.values[i]) for i in rows}
    num_classes = len(labelled.classes)
    if row.metric == "scs":
        return change_records(
            [labelled.items[i].key for i in rows], [said[i] for i in rows], [truth[i] for i in rows], num_classes
        )
    total = np.stack([confusion(said[i], truth[i], num_classes) for i in rows])
    known = np.concatenate([np.asarray(targets.values[i]).ravel() for i in trained])
    commonest = 1 if row.kind == "pair" else int(np.bincount(known[known >= 0], minlength=num_classes).argmax())
    constant = np.zeros_like(total)
    constant[:, :, commonest] = total.sum(2)
    chance = value_of(Records(row.metric, {"confusion": constant}))
    return Records(row.metric, {"confusion": total}, chance)


def change_records(
    keys: Sequence[str], said: Sequence[np.ndarray], truth: Sequence[np.ndarray], num_classes: int
) -> Records:
    """Semantic change between an item and the next month of the same tile (keys `cube/YYYY-MM/tile`); the last months count nothing."""
    size = len(keys)
    arrays = {
        "confusion": np.zeros((size, num_classes, num_classes), np.int64),
        "both": np.zeros(size),
        "either": np.zeros(size),
    }
    series: dict[tuple[str, str], list[int]] = {}
    for i in sorted(range(size), key=lambda i: keys[i]):
        cube, _, tile = keys[i].rsplit("/", 2)
        series.setdefault((cube, tile), []).append(i)
    for a, b in ((a, b) for one in series.values() for a, b in pairwise(one)):
        known = (truth[a] >= 0) & (truth[b] >= 0)
        changed, told = known & (truth[a] != truth[b]), known & (said[a] != said[b])
        arrays["confusion"][a] = confusion(said[a][changed], truth[a][changed], num_classes)
        arrays["both"][a], arrays["either"][a] = float((changed & told).sum()), float((changed | told).sum())
    return Records("scs", arrays)


def _boxes(
    row: Row, labelled: LabelledSet, store: FeatureStore, targets: Targets, parts: Sides, seed: int
) -> tuple[Records, dict[str, object]]:  # fmt: skip
    def load(i: int) -> tuple[list[Tensor], tuple[int, int], Boxes]:
        truth = targets.values[i]
        assert isinstance(truth, Boxes)
        return [torch.from_numpy(m)[None] for m in store.maps(i)[0]], targets.sizes[i], truth

    num_classes = len(labelled.classes)
    maps, size, _ = load(parts.train[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector([m.shape[1] for m in maps], num_classes, size[0], [m.shape[2] for m in maps], row.oriented)
    rows = [i for i in [*parts.train, *parts.val] if len(targets.values[i].labels)]  # type: ignore[union-attr]
    train_detector(detector, load, rows, seed)
    return Records(row.metric, records_of(detector, load, parts.test, num_classes)), {}


def features_folder(cache: str, facts: dict[str, object]) -> str:
    """Where the features that these facts determine lie."""
    return storage.join(cache, name_of(facts))
