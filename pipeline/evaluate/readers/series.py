"""Series as published: Dynamic EarthNet (Planet, Sentinel-2) and PASTIS-R (numpy arrays, folds)."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import IGNORE, Item, LabelledSet, Sample, Split, cut, extent, labelled_set, tiles
from pipeline.evaluate.readers import files
from pipeline.evaluate.readers.geobench import DYNAMIC, PASTIS, PASTIS_VOID

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row

DAYS = ("01", "05", "10", "15", "20", "25")  # "weekly" of the set's own loader


def dynamic_earthnet(root: str, row: Row) -> LabelledSet:
    """`dynnet_training_splits/{train,val,test}.txt`: lines `/planet/…/PF-SR /labels/…/label.tif 2018-01`. The Planet image of the
    month's first day is hr; a row with `s2` takes `sentinel2/…/YYYY-MM.tif` of the same cube. Labels: 7 bands one-hot (255), the
    seventh (snow and ice) ignored. Tiles of `row.tile_px` Planet pixels.
    """
    items = []
    splits: tuple[Split, ...] = ("train", "val", "test")
    wanted = {bands.sensor for bands in row.bands}
    for split in splits:
        url = storage.join(root, "dynnet_training_splits", f"{split}.txt")
        if split == "val" and not storage.exists(url):
            continue
        for line in files.lines(url):
            parts = line.split()
            if len(parts) != 3:
                raise UsageError(f"{url}: {line!r} is not `planet-folder label-file YYYY-MM`")
            planet, label, month = storage.join(root, parts[0]), storage.join(root, parts[1]), parts[2]
            size = files.size_of(label, f"{split}.txt names it")
            images = {}
            if "hr" in wanted:
                images["hr"] = files.require(storage.join(planet, f"{month}-01.tif"), f"{split}.txt names its month")
            if "s2" in wanted:
                images["s2"] = _sentinel(root, parts[0], month)
            load = functools.lru_cache(maxsize=1)(functools.partial(_month, images, label, month))
            key = f"{parts[0].strip('/').split('/')[-2] if '/' in parts[0].strip('/') else parts[0]}/{month}"
            for y, x in tiles(*files.shape(label), row.tile_px):
                items.append(
                    Item(f"{key}/{y:05d}-{x:05d}", split, f"{parts[1]} {size}", _tile(load, y, x, row.tile_px))
                )
    return labelled_set(items, DYNAMIC, "published lists dynnet_training_splits", root)


def pastis_r(root: str, row: Row) -> LabelledSet:
    """`metadata.geojson` (ID_PATCH, Fold, dates-S2, dates-S1A, dates-S1D), `DATA_S2/S2_<id>.npy` [T, 10, H, W], `DATA_S1A/`,
    `DATA_S1D/` [T, 3, H, W], `ANNOTATIONS/TARGET_<id>.npy`. Folds 1-3 train, 4 chooses, 5 tests (the set's own first fold).
    """
    url = files.require(storage.join(root, "metadata.geojson"), "PASTIS-R's folds and dates")
    try:
        features = [f["properties"] for f in json.loads(storage.read_bytes(url))["features"]]
        facts = [(str(p["ID_PATCH"]), int(p["Fold"]), p) for p in features]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{url} is not PASTIS-R's metadata: {type(error).__name__} {error}") from None
    items = []
    for patch, fold, properties in facts:
        target = storage.join(root, "ANNOTATIONS", f"TARGET_{patch}.npy")
        size = files.size_of(target, "metadata.geojson names it")
        split: Split = "train" if fold <= 3 else "val" if fold == 4 else "test"
        items.append(
            Item(patch, split, f"{patch} {size}", functools.partial(_patch, root, patch, properties, target, row))
        )
    return labelled_set(items, PASTIS, "folds 1-3 train, 4 chooses, 5 tests", root)


def array(url: str) -> np.ndarray:
    """A `.npy` file, never unpickled."""
    files.require(url, "an array of the set")
    try:
        return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{url} is no plain .npy array: {error}") from None


def _patch(root: str, patch: str, properties: dict[str, Any], target: str, row: Row) -> Sample:
    wanted = {bands.sensor for bands in row.bands}
    images: dict[str, np.ndarray] = {}
    doy: dict[str, np.ndarray] = {}
    for sensor, name in (("s2", "S2"), ("s1", "S1A"), ("s1", "S1D")):
        if sensor not in wanted:
            continue
        pixels = array(storage.join(root, f"DATA_{name}", f"{name}_{patch}.npy"))
        days = _days(properties.get(f"dates-{name}"), len(pixels))
        keep = np.linspace(0, len(pixels) - 1, min(len(pixels), row.max_dates)).round().astype(int)
        images[sensor] = np.concatenate([images[sensor], pixels[keep]]) if sensor in images else pixels[keep]
        doy[sensor] = np.concatenate([doy[sensor], days[keep]]) if sensor in doy else days[keep]
    labels = array(target)
    labels = labels[0] if labels.ndim == 3 else labels
    like = next(iter(images.values())).shape[2:]
    if labels.shape != like:
        raise UsageError(f"{target} is {labels.shape}, its images {like}: the mask is of another size")
    return Sample(images, files.classes_of(labels, len(PASTIS), (PASTIS_VOID,), target), doy)


def _days(given: Any, dates: int) -> np.ndarray:
    """Days of the year of PASTIS's `{"0": 20180917, …}` (an object, or its JSON text)."""
    table = json.loads(given) if isinstance(given, str) else given or {}
    texts = [str(table[key]) for key in sorted(table, key=int)]
    if len(texts) != dates:
        return np.zeros(dates, int)
    return np.array([date(int(t[:4]), int(t[4:6]), int(t[6:8])).timetuple().tm_yday for t in texts])


def _sentinel(root: str, planet: str, month: str) -> str:
    """The Sentinel-2 composite of a Planet folder's cube: `/planet/A/B/PF-SR` → `/sentinel2/A/B/YYYY-MM.tif`, as released."""
    parts = planet.strip("/").split("/")
    base = storage.join(root, "sentinel2", *parts[1:-1])
    return files.require(storage.join(base, f"{month}.tif"), "Sentinel-2 of the month")


def _month(images: dict[str, str], label: str, month: str) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    one_hot = files.pixels(label)
    if len(one_hot) != 7:
        raise UsageError(f"{label} has {len(one_hot)} bands; labels of this set are 7 bands, one per class")
    top = np.where(one_hot.max(0) > 0, one_hot.argmax(0), 6)
    target = files.classes_of(top, len(DYNAMIC), (6,), label)
    pixels = {sensor: files.pixels(url, target.shape)[None] for sensor, url in images.items()}
    if "hr" in images:
        files.same_size(label, target.shape, images["hr"])
    year, number = (int(v) for v in month.split("-"))
    return pixels, target, date(year, number, 1).timetuple().tm_yday


def _tile(
    load: Callable[[], tuple[dict[str, np.ndarray], np.ndarray, int]], y: int, x: int, size: int
) -> Callable[[], Sample]:
    def read() -> Sample:
        pixels, target, day = load()
        images = {sensor: cut(image, y, x, size, 0) for sensor, image in pixels.items()}
        return Sample(
            images,
            cut(target, y, x, size, IGNORE),
            {sensor: np.array([day]) for sensor in images},
            inside=extent(target, y, x, size),
        )

    return read
