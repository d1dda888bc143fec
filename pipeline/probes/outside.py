"""Labelled sets that are no shards: a folder of classes, and pairs of image and label raster.

    ROOT/CLASS/anything.tif            one image per file, its class is the folder's name       → knn, linear
    ROOT/images/NAME.tif, ROOT/labels/NAME.tif   label raster on the same ground (any resolution)  → segment

Which sensor an image is, in which order its bands stand, what a number means and how large a pixel is, is declared, see `Declared`. Nothing
is guessed: a wrong order or unit costs more score than most methods gain. Without a declaration only what a file says itself is
taken: 8-bit red, green, blue (by their colour interpretation) with pixels of at most MAX_HR_GSD metres (by their georeference).
Train and test are parted by place where the images say where they are, else by hashed file name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster import storage
from cluster.errors import UsageError
from data_prep.geo import centre_wgs84, ground_cell
from data_prep.schema import MODALITIES
from data_prep.sources.raster import open_raster
from model.batch import View
from model.pretrained import Pretrained
from pipeline.probes.features import MAX_PIXELS, Describer, SiteFeatures

IMAGES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
TEST_SHARE = 5  # one group in five tests
MAX_HR_GSD = 2.5  # metres per pixel: beyond it an RGB image is no `hr` unless declared to be
BATCH = 32  # images of one size per forward pass

# by sensor: what a stored number may mean → factor and offset to the schema's unit (`data_prep.schema`)
UNITS: dict[str, dict[str, tuple[float, float]]] = {
    "hr": {"uint8": (1.0, 0.0), "float01": (255.0, 0.0)},
    "s2": {"reflectance10000": (1.0, 0.0), "reflectance10000+1000": (1.0, -1000.0), "reflectance": (10_000.0, 0.0)},
    "s1": {"db": (1.0, 0.0), "power": (0.0, 0.0)},
}


@dataclass(frozen=True)
class Declared:
    """What a user says of images that do not say it themselves.

    sensor: `hr`, `s2` or `s1`. bands: names in file order; the sensor's own must be among them, others are left out.
    gsd_m: metres per pixel; None: as the file's georeference says. unit: a key of UNITS of the sensor; None: `uint8` of 8-bit hr.
    """

    sensor: str
    bands: tuple[str, ...] = ()
    gsd_m: float | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if self.sensor not in UNITS:
            raise ValueError(f"--sensor {self.sensor!r} is none of {', '.join(UNITS)}")
        own = MODALITIES[self.sensor].bands
        lacking = [band for band in own if band not in self.bands]
        if self.bands and lacking:
            raise ValueError(
                f"--bands lacks {', '.join(lacking)}: {self.sensor} needs {', '.join(own)}, none is filled with zeros"
            )
        if len(set(self.bands)) < len(self.bands):
            raise ValueError(f"--bands {','.join(self.bands)} names a band twice")
        if self.unit is not None and self.unit not in UNITS[self.sensor]:
            raise ValueError(f"--unit {self.unit!r} is none of {', '.join(UNITS[self.sensor])} of {self.sensor}")
        if self.gsd_m is not None and not 0 < self.gsd_m < 10_000:
            raise ValueError(f"--gsd {self.gsd_m} is no pixel size in metres")


@dataclass(frozen=True)
class Outside:
    """One image. place: group that never straddles train and test; label: class number, -1 for `labels` sets."""

    image: str
    place: str
    label: int
    raster: str | None = None


@dataclass(frozen=True)
class Image:
    """pixels: [C, H, W] in the sensor's own bands, order and unit; gsd_m: metres per pixel."""

    sensor: str
    pixels: np.ndarray
    gsd_m: float

    @property
    def kind(self) -> str:
        """Equal for images that fit into one batch."""
        return f"{self.sensor} {'x'.join(map(str, self.pixels.shape[1:]))} at {self.gsd_m:g} m"


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


def outside_view(model: Pretrained, items: Sequence[Outside], declared: Declared | None) -> View:
    """Normalised view of images of one sensor and size.

    Raises:
        UsageError: images of several sizes or sensors.
    """
    images = [read_image(item.image, declared) for item in items]
    for item, image in zip(items, images):
        if image.kind != images[0].kind:
            raise UsageError(
                f"{item.image} is {image.kind}, {items[0].image} {images[0].kind}: images of one kind are needed here"
            )
    return _view(model, images)


def outside_features(
    describers: Sequence[Describer], model: Pretrained, items: Sequence[Outside], dense: bool, declared: Declared | None = None,
    device: str = "cpu", advance: Callable[[int], Any] = lambda sites: None,
) -> list[SiteFeatures]:  # fmt: skip
    """What each describer says of all items, in their order, in batches of one size; dense: under MAX_PIXELS evenly spread label
    pixels each. model: gives normalisation and sensors."""
    parts: list[list[dict[str, torch.Tensor]]] = [[] for _ in describers]
    with torch.no_grad():
        for batch, images in _batches(items, declared, 1 if dense else BATCH):
            view, raster = _view(model, images, device), batch[0].raster
            labels = torch.from_numpy(_labels(raster))[None] if dense and raster is not None else None
            for described, describe in zip(parts, describers):
                described.append(describe(view, labels, MAX_PIXELS))
            advance(len(batch))
    return [SiteFeatures.joined(described) for described in parts]


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


def read_image(url: str, declared: Declared | None = None) -> Image:
    """One image in its sensor's bands and unit.

    Raises:
        SourceFault: no raster. UsageError: the file does not say what is not declared either, or contradicts it.
    """
    with open_raster(url, storage.name(url)) as raster:
        declared = declared or _said_by_file(raster, url)
        own = MODALITIES[declared.sensor].bands
        bands = declared.bands or _bands_of_file(raster, declared.sensor, url)
        if len(bands) != raster.count:
            raise UsageError(f"{url} has {raster.count} bands, declared are {len(bands)}: {','.join(bands)}")
        pixels = raster.read([bands.index(band) + 1 for band in own])
        gsd_m = declared.gsd_m or _gsd(raster)
    if gsd_m is None:
        raise UsageError(f"{url} does not say how large its pixels are; declare --gsd METRES")
    return Image(declared.sensor, _in_unit(pixels, declared, url), gsd_m)


def _said_by_file(raster: Any, url: str) -> Declared:
    """What a file says by itself, if that leaves no doubt: 8-bit RGB on the ground, with small pixels."""
    gsd_m = _gsd(raster)
    if _is_rgb(raster) and set(raster.dtypes) == {"uint8"} and gsd_m is not None and gsd_m <= MAX_HR_GSD:
        return Declared("hr", _colours(raster), gsd_m, "uint8")
    size = "pixels of unknown size" if gsd_m is None else f"{gsd_m:g} m pixels"
    raise UsageError(
        f"{url}: {raster.count} bands of {raster.dtypes[0]}, {size}: sensor, band order and unit cannot be told; declare them, e.g. "
        "--sensor hr --bands R,G,B --gsd 0.3 --unit uint8"
    )


def _bands_of_file(raster: Any, sensor: str, url: str) -> tuple[str, ...]:
    own, described = MODALITIES[sensor].bands, tuple(text or "" for text in raster.descriptions)
    if set(own) <= set(described):
        return described
    if sensor == "hr" and _is_rgb(raster):
        return _colours(raster)
    raise UsageError(f"{url} does not name its bands; declare their order, e.g. --bands {','.join(own)}")


def _is_rgb(raster: Any) -> bool:
    return tuple(c.name for c in raster.colorinterp[:3]) == ("red", "green", "blue")


def _colours(raster: Any) -> tuple[str, ...]:
    return ("R", "G", "B", *(f"band{i + 4}" for i in range(raster.count - 3)))


def _gsd(raster: Any) -> float | None:
    return float(abs(raster.transform.a)) if raster.crs is not None and raster.crs.is_projected else None


def _in_unit(pixels: np.ndarray, declared: Declared, url: str) -> np.ndarray:
    """From the declared unit to the schema's; refused where the numbers cannot be of that unit."""
    unit = declared.unit or ("uint8" if declared.sensor == "hr" and pixels.dtype == np.uint8 else None)
    if unit is None:
        raise UsageError(
            f"{url}: what its numbers ({pixels.dtype}) mean is not known; declare --unit {'|'.join(UNITS[declared.sensor])}"
        )
    x = pixels.astype(np.float32)
    known = x[np.isfinite(x)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    fits = {
        "uint8": low >= 0 and high <= 255, "float01": low >= 0 and high <= 1.5, "reflectance": high <= 10, "db": low < 0 or high == 0,
        "reflectance10000": high > 10 or high == 0, "reflectance10000+1000": high > 10 or high == 0, "power": low >= 0,
    }  # fmt: skip
    if not fits[unit]:
        raise UsageError(f"{url}: declared as {unit}, but its numbers run from {low:g} to {high:g}")
    if unit == "power":
        return np.where(x > 0, 10 * np.log10(np.maximum(x, 1e-30)), np.nan).astype(np.float32)
    factor, offset = UNITS[declared.sensor][unit]
    scaled = x * factor + offset
    if declared.sensor == "s2":  # 0 is what is missing; what is there is at least 1
        scaled = np.where(x == 0, 0, np.maximum(scaled, 1))
    return scaled.astype(np.float32)


def _batches(
    items: Sequence[Outside], declared: Declared | None, largest: int
) -> Iterator[tuple[list[Outside], list[Image]]]:
    """Runs of at most `largest` items whose images are of one kind."""
    batch: list[tuple[Outside, Image]] = []
    for item in items:
        image = read_image(item.image, declared)
        if batch and (len(batch) == largest or image.kind != batch[0][1].kind):
            yield [held for held, _ in batch], [held for _, held in batch]
            batch = []
        batch.append((item, image))
    if batch:
        yield [held for held, _ in batch], [held for _, held in batch]


def _view(model: Pretrained, images: Sequence[Image], device: str = "cpu") -> View:
    sensor, gsd_m = images[0].sensor, images[0].gsd_m
    x = torch.from_numpy(np.stack([image.pixels for image in images])).to(device)
    return model.view({sensor: x}, gsd_m={sensor: gsd_m})


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
