"""Two dates and a change mask: OSCD (Sentinel-2 L1C, one file per band) and LEVIR-CD (RGB pictures A, B, label)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import (
    IGNORE,
    Footprint,
    Item,
    LabelledSet,
    Sample,
    Split,
    cut,
    extent,
    footprint_of_tile,
    labelled_set,
    tiles,
)
from pipeline.evaluate.readers import files

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row

CLASSES = ("no change", "change")
OSCD_IMAGES = "Onera Satellite Change Detection dataset - Images"
OSCD_LABELS = "Onera Satellite Change Detection dataset - {} Labels"
# Daudt et al. 2018: 14 cities train, 10 test
OSCD_TEST = (
    "brasilia",
    "montpellier",
    "norcia",
    "rio",
    "saclay_w",
    "valencia",
    "dubai",
    "lasvegas",
    "milano",
    "chongqing",
)


def oscd(root: str, row: Row) -> LabelledSet:
    """`<images>/<city>/imgs_{1,2}/*_Bxx.tif`, `<labels>/<city>/cm/cm.png` (or `<city>-cm.tif`), tiles of `row.tile_px`.

    The published test cities test; if none of them has labels (they were held back for years), the city whose name hashes
    first does. Bands are brought to the 10 m grid of B02 by nearest neighbour.
    """
    folder = files.require(storage.join(root, OSCD_IMAGES), "OSCD images")
    labelled = {}
    for city in storage.list_names(folder):
        for part in ("Train", "Test"):
            cm = storage.join(root, OSCD_LABELS.format(part), city, "cm")
            if storage.exists(cm):
                labelled[city] = _city_mask(cm, city)
    if len(labelled) < 2:
        raise UsageError(
            f"{root}: {len(labelled)} cities have labels ({OSCD_LABELS.format('Train')}/<city>/cm); two at least"
        )
    published = [city for city in labelled if city in OSCD_TEST]
    tested = set(published) or {min(labelled, key=_by_hash)}
    how = (
        "published cities"
        if published
        else f"no published test city has labels here: {', '.join(sorted(tested))} tests"
    )
    items = []
    for city, cm in labelled.items():
        load = functools.lru_cache(maxsize=1)(
            functools.partial(_city, storage.join(folder, city), cm, row.bands[0].order)
        )
        split: Split = "test" if city in tested else "train"
        for y, x in tiles(*files.shape(cm), row.tile_px):
            items.append(
                Item(
                    f"{city}/{y:05d}-{x:05d}",
                    split,
                    f"{storage.name(cm)} {storage.size(cm)}",
                    _tile(load, "s2", y, x, row.tile_px),
                )
            )
    return labelled_set(items, CLASSES, how, root)


def levir_cd(root: str, row: Row) -> LabelledSet:
    """`{train,val,test}/{A,B,label}/` as published, or one `A/ B/ label/` with lists `list/{train,val,test}.txt`; failing
    both, names that begin with `train_`, `val_`, `test_`. An image without a label is left out.
    """
    places = (
        [("", root)]
        if storage.exists(storage.join(root, "A"))
        else [(s, storage.join(root, s)) for s in ("train", "val", "test")]
    )
    listed: dict[str, Split] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        url = storage.join(root, "list", f"{split}.txt")
        if storage.exists(url):
            listed |= dict.fromkeys(files.lines(url), split)
    items = []
    for place, base in places:
        if place and not storage.exists(base):
            continue
        for name in files.names(storage.join(base, "A")):
            side = listed.get(name) if listed else place or name.partition("_")[0]
            label = storage.join(base, "label", name)
            if side not in ("train", "val", "test") or not storage.exists(label):
                continue
            other = files.require(storage.join(base, "B", name), "second date")
            load = functools.lru_cache(maxsize=1)(
                functools.partial(_pictures, storage.join(base, "A", name), other, label)
            )
            for y, x in tiles(*files.shape(label), row.tile_px):
                key = f"{place}/{name}/{y:05d}-{x:05d}".lstrip("/")
                items.append(Item(key, side, f"{name} {storage.size(label)}", _tile(load, "hr", y, x, row.tile_px)))  # type: ignore[arg-type]
    absent = sorted(set(listed) - {name for item in items for name in item.key.split("/")})
    if absent:
        raise UsageError(f"{root}: list/ names {absent[0]} ({len(absent)} such) without image and label")
    how = "published lists" if listed else "published folders" if places[0][0] else "by the names' train_, val_, test_"
    return labelled_set(items, CLASSES, how, root)


Pair = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int], Footprint | None]


def _tile(load: Callable[[], Pair], sensor: str, y: int, x: int, size: int) -> Callable[[], Sample]:
    def read() -> Sample:
        before, after, changed, days, ground = load()
        a, b = (cut(image, y, x, size, 0) for image in (before, after))
        target = cut(changed, y, x, size, IGNORE)
        tile = footprint_of_tile(ground, changed.shape, y, x, size)
        return Sample({sensor: a}, target, {sensor: np.array(days)}, {sensor: b}, extent(changed, y, x, size), tile)

    return read


def _city(folder: str, cm: str, order: tuple[str, ...]) -> Pair:
    values = files.pixels(cm)[0]
    changed = _changed(values, cm, offset=1) if cm.endswith(".tif") else (values > 127).astype(np.int16)
    dates = []
    for number in (1, 2):
        base = storage.join(folder, f"imgs_{number}")
        found = {name.rsplit("_", 1)[-1].split(".")[0]: name for name in files.names(base, (".tif",))}
        missing = [band for band in order if band not in found]
        if missing:
            raise UsageError(f"{base} has no {missing[0]}; OSCD keeps one file per band, …_{missing[0]}.tif")
        if number == 1:
            files.same_size(cm, changed.shape, storage.join(base, found["B02"]))
        dates.append(
            np.stack([files.pixels(storage.join(base, found[band]), changed.shape)[0] for band in order])[None]
        )
    ground = files.footprint(storage.join(folder, "imgs_2", found["B02"]))
    return dates[0], dates[1], changed, _days(folder), ground


def _pictures(before: str, after: str, label: str) -> Pair:
    a, b = files.colour(before), files.colour(after)
    if a.shape != b.shape:
        raise UsageError(f"{after} is {b.shape[2:]}, {before} {a.shape[2:]}: the two dates are of different size")
    return a, b, _changed(files.mask(label, a.shape[2:]), label), (0, 0), None


def _changed(values: np.ndarray, where: str, offset: int = 0) -> np.ndarray:
    """0 no change, 1 change; pictures say 255 for change, OSCD's tif 1 and 2."""
    return files.classes_of(np.where(values == 255, 1, values.astype(np.int32) - offset), 2, (), where)


def _city_mask(cm: str, city: str) -> str:
    for name in (f"{city}-cm.tif", "cm.png"):
        if storage.exists(storage.join(cm, name)):
            return storage.join(cm, name)
    raise UsageError(f"{cm} holds neither {city}-cm.tif nor cm.png")


def _days(folder: str) -> tuple[int, int]:
    """Days of the year from `dates.txt` (`date_1: 20150916`), 0 where it does not say."""
    url = storage.join(folder, "dates.txt")
    found = [0, 0]
    for line in files.lines(url) if storage.exists(url) else []:
        name, _, text = line.partition(":")
        if name.strip() in ("date_1", "date_2"):
            found[int(name.strip()[-1]) - 1] = datetime.strptime(text.strip(), "%Y%m%d").timetuple().tm_yday
    return found[0], found[1]


def _by_hash(city: str) -> float:
    import hashlib

    return int(hashlib.sha256(city.encode()).hexdigest()[:12], 16)
