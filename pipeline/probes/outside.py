"""Labelled sets that are no shards: a folder of classes, and pairs of image and label raster.

    ROOT/CLASS/anything.tif            one image per file, its class is the folder's name       → knn, linear
    ROOT/images/NAME.tif, ROOT/labels/NAME.tif   label raster on the same ground (any resolution)  → segment

Bands are told by their number: 2 → s1 (dB), 3 or 4 → hr (the first three), 10, 12 or 13 → s2 (uint16, offset removed; 12 = B01 …
B12 without B10). Train and test are parted by place where the images say where they are, else by hashed file name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster import storage
from cluster.errors import UsageError
from data_prep.geo import centre_wgs84, ground_cell
from data_prep.schema import MODALITIES
from data_prep.sources.raster import open_raster
from model.pretrained import Pretrained
from pipeline.probes.features import MAX_PIXELS, SiteFeatures, features_of

IMAGES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_S2_OF_13 = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12)
_S2_OF_12 = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
TEST_SHARE = 5  # one group in five tests


@dataclass(frozen=True)
class Outside:
    """One image. place: group that never straddles train and test; label: class number, -1 for `labels` sets."""

    image: str
    place: str
    label: int
    raster: str | None = None


def list_outside(url: str) -> tuple[list[Outside], list[str]]:
    """Images in name order, and class names (empty for the images/labels layout).

    Raises:
        UsageError: neither layout, or an image without its label raster.
    """
    folders = [name for name in storage.list_names(url) if _is_folder(storage.join(url, name))]
    if {"images", "labels"} <= set(folders):
        return _pairs(url), []
    found = [
        Outside(storage.join(url, folder, name), "", number)
        for number, folder in enumerate(folders) for name in storage.list_names(storage.join(url, folder)) if name.lower().endswith(IMAGES)
    ]  # fmt: skip
    if not found:
        raise UsageError(
            f"{url} is no labelled set: it needs folders named by class with images inside, or images/ and labels/"
        )
    return [Outside(o.image, _place(o.image), o.label) for o in found], folders


def outside_features(model: Pretrained, items: Sequence[Outside], dense: bool) -> SiteFeatures:
    """Features of all items, one by one (sizes may differ); dense ones under MAX_PIXELS evenly spread label pixels each."""
    parts = []
    with torch.no_grad():
        for item in items:
            modality, pixels, gsd_m = read_image(item.image)
            x = torch.from_numpy(pixels)[None]
            view = model.view({modality: x}, gsd_m={modality: gsd_m} if gsd_m else None)
            labels = torch.from_numpy(_labels(item.raster))[None] if dense and item.raster is not None else None
            parts.append(features_of(model.skysense(view), view, labels, MAX_PIXELS))
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return SiteFeatures.of(merged)


def split_outside(items: Sequence[Outside]) -> tuple[list[int], list[int], str]:
    """Positions of training and test items, and a digest that names the split.

    Raises:
        UsageError: all images lie in one place or the set is too small to part.
    """
    places = sorted({item.place for item in items}, key=lambda place: hashlib.sha256(place.encode()).digest())
    tested = set(places[: max(1, len(places) // TEST_SHARE)])
    train = [i for i, item in enumerate(items) if item.place not in tested]
    test = [i for i, item in enumerate(items) if item.place in tested]
    if not train or not test:
        raise UsageError(f"{len(items)} images from {len(places)} place(s) cannot be parted into training and test")
    text = "\n".join(f"{storage.name(items[i].image)} {items[i].label}" for i in (*train, -1, *test) if i >= 0)
    return train, test, hashlib.sha256(text.encode()).hexdigest()[:16]


def read_image(url: str) -> tuple[str, np.ndarray, float | None]:
    """(modality, pixels [C, H, W], metres per pixel or None). Raises SourceFault or UsageError naming the file."""
    with open_raster(url, storage.name(url)) as raster:
        count = raster.count
        bands: tuple[int, ...]
        if count == 2:
            modality, bands = "s1", (0, 1)
        elif count in (3, 4):
            modality, bands = "hr", (0, 1, 2)
        elif count in (10, 12, 13):
            modality, bands = "s2", {10: tuple(range(10)), 12: _S2_OF_12, 13: _S2_OF_13}[count]
        else:
            raise UsageError(f"{url} has {count} bands; known are 2 (s1), 3 or 4 (hr), 10, 12 or 13 (s2)")
        pixels = raster.read([band + 1 for band in bands])
        projected = raster.crs is not None and raster.crs.is_projected
        gsd = float(abs(raster.transform.a)) if projected else None
    return modality, pixels.astype(np.float32 if modality == "s1" else MODALITIES[modality].dtype), gsd


def _pairs(url: str) -> list[Outside]:
    labels = {name.rsplit(".", 1)[0]: name for name in storage.list_names(storage.join(url, "labels"))}
    items = []
    for name in storage.list_names(storage.join(url, "images")):
        if not name.lower().endswith(IMAGES):
            continue
        image, stem = storage.join(url, "images", name), name.rsplit(".", 1)[0]
        if stem not in labels:
            raise UsageError(f"{image} has no label raster; expected {storage.join(url, 'labels', stem)}.tif")
        items.append(Outside(image, _place(image), -1, storage.join(url, "labels", labels[stem])))
    if not items:
        raise UsageError(f"{storage.join(url, 'images')} holds no images")
    return items


def _place(url: str) -> str:
    with open_raster(url, storage.name(url)) as raster:
        if raster.crs is None:
            return storage.name(url)
        lon, lat = centre_wgs84(raster.crs.to_wkt(), tuple(raster.bounds))
    return ground_cell(lon, lat)


def _labels(url: str) -> np.ndarray:
    """int16 [H, W], -1 where the raster declares nodata."""
    with open_raster(url, storage.name(url)) as raster:
        values, nodata = raster.read(1).astype(np.int32), raster.nodata
    return np.where(values == (-1 if nodata is None else int(nodata)), -1, values).astype(np.int16)


def _is_folder(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(fs.isdir(path))
