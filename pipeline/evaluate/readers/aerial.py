"""Dense labels on large aerial images: iSAID (colour masks over DOTA images) and ISPRS Potsdam, cut into tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import IGNORE, Item, LabelledSet, Sample, Split, cut, extent, labelled_set, tiles
from pipeline.evaluate.readers import files

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row

ISAID = (
    "background", "ship", "storage tank", "baseball diamond", "tennis court", "basketball court", "ground track field", "bridge",
    "large vehicle", "small vehicle", "helicopter", "swimming pool", "roundabout", "soccer ball field", "plane", "harbor",
)  # fmt: skip
ISAID_COLOURS = (
    (0, 0, 0), (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255), (0, 127, 63), (0, 127, 127),
    (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255), (0, 100, 155),
)  # fmt: skip
POTSDAM = ("impervious surfaces", "building", "low vegetation", "tree", "car")
POTSDAM_COLOURS = (
    (255, 255, 255),
    (0, 0, 255),
    (0, 255, 255),
    (0, 255, 0),
    (255, 255, 0),
    (255, 0, 0),
)  # the last: clutter, ignored
POTSDAM_TRAIN = ["2_10", "2_11", "2_12", "3_10", "3_11", "3_12", "4_10", "4_11", "4_12", "5_10", "5_11", "5_12", "6_10", "6_11", "6_12", "6_7", "6_8", "6_9", "7_10", "7_11", "7_12", "7_7", "7_8", "7_9"]  # fmt: skip
POTSDAM_TEST = [
    "5_15",
    "6_15",
    "6_13",
    "3_13",
    "4_14",
    "6_14",
    "5_14",
    "2_13",
    "4_15",
    "2_14",
    "5_13",
    "4_13",
    "3_14",
    "7_13",
]


def isaid(root: str, row: Row) -> LabelledSet:
    """`{train,val}/images/P0000.png` with `{train,val}/Semantic_masks/images/P0000_instance_color_RGB.png`. The labels of the
    test part are on a server, so `val` tests, as in the papers.
    """
    items = []
    splits: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "test"))
    for folder, split in splits:
        images = storage.join(root, folder, "images")
        for name in files.names(images, (".png",)):
            stem = name.rsplit(".", 1)[0]
            mask = storage.join(root, folder, "Semantic_masks", "images", f"{stem}_instance_color_RGB.png")
            label = f"{stem} {files.size_of(mask, f'mask of {name}')}"
            items += _tiled(
                storage.join(images, name), mask, f"{folder}/{stem}", split, label, row.tile_px, ISAID_COLOURS, 16
            )
    return labelled_set(items, ISAID, "published train and val; val tests (the test labels are on a server)", root)


def potsdam(root: str, row: Row) -> LabelledSet:
    """`4_Ortho_RGBIR/top_potsdam_2_10_RGBIR.tif` with `top_potsdam_2_10_label.tif` (in `5_Labels_all/` or beside). Published
    split of 24 and 14 tiles; clutter is ignored, as mF1 over five classes is reported. Tiles that are not there are left out.
    """
    images = files.require(storage.join(root, "4_Ortho_RGBIR"), "Potsdam's images")
    items = []
    splits: tuple[tuple[list[str], Split], ...] = ((POTSDAM_TRAIN, "train"), (POTSDAM_TEST, "test"))
    for names, split in splits:
        for name in names:
            image = storage.join(images, f"top_potsdam_{name}_RGBIR.tif")
            if not storage.exists(image):
                continue
            masks = [storage.join(root, *folder, f"top_potsdam_{name}_label.tif") for folder in (("5_Labels_all",), ())]
            mask = next((url for url in masks if storage.exists(url)), masks[0])
            label = f"{name} {files.size_of(mask, f'mask of {name}')}"
            items += _tiled(image, mask, name, split, label, row.tile_px, POTSDAM_COLOURS, 5)
    return labelled_set(items, POTSDAM, "published 24 and 14 tiles, those that are there", root)


def _tiled(
    image: str, mask: str, key: str, split: Split, label: str, size: int, colours: tuple[tuple[int, ...], ...], num_classes: int
) -> list[Item]:  # fmt: skip
    load = functools.lru_cache(maxsize=1)(functools.partial(_load, image, mask, colours, num_classes))
    return [
        Item(f"{key}/{y:05d}-{x:05d}", split, label, _tile(load, y, x, size))
        for y, x in tiles(*files.shape(image), size)
    ]


def _tile(load: Callable[[], tuple[np.ndarray, np.ndarray]], y: int, x: int, size: int) -> Callable[[], Sample]:
    def read() -> Sample:
        pixels, target = load()
        return Sample(
            {"hr": cut(pixels, y, x, size, 0)}, cut(target, y, x, size, IGNORE), inside=extent(target, y, x, size)
        )

    return read


def _load(
    image: str, mask: str, colours: tuple[tuple[int, ...], ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    pixels = files.colour(image)
    painted = files.colour(mask)[0]
    if painted.shape[1:] != pixels.shape[2:]:
        raise UsageError(f"{mask} is {painted.shape[1:]}, its image {pixels.shape[2:]}: the mask is of another size")
    return pixels, by_colour(painted, colours, num_classes, mask)


def by_colour(
    painted_3HW: np.ndarray, colours: tuple[tuple[int, ...], ...], num_classes: int, where: str
) -> np.ndarray:
    """int16 classes of a painted mask; colours past the classes are ignored. Raises UsageError for a colour of neither."""
    code = (painted_3HW.astype(np.int32) * np.array([65536, 256, 1])[:, None, None]).sum(0)
    target = np.full(code.shape, -2, np.int16)
    for i, (r, g, b) in enumerate(colours):
        target[code == r * 65536 + g * 256 + b] = i if i < num_classes else IGNORE
    if (target == -2).any():
        odd = painted_3HW[:, target == -2][:, 0]
        raise UsageError(f"{where} holds the colour {tuple(int(v) for v in odd)}, which is no class of this set")
    return target
