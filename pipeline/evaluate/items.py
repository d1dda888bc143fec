"""A labelled set as evaluation sees it: items with pixels and targets, parted by the published split, named by a digest. No torch.

Dimension legend: T dates · F bands of the file · H, W pixels · K classes · n boxes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from cluster.errors import UsageError

Split = Literal["train", "val", "test"]
Kind = Literal["class", "labels", "dense", "pair", "boxes"]
IGNORE = -1
Footprint = tuple[str, tuple[float, float, float, float]]  # CRS, and west, south, east, north in it


@dataclass
class Sample:
    """Pixels and target of one item.

    Attributes:
        images: per sensor [T, F, H, W], numbers and band order as in the file.
        target: `class` int; `labels` bool [K]; `dense`, `pair` int16 [H, W] with IGNORE; `boxes`: `Boxes`.
        doy: per sensor int [T], 1-366, 0 = unknown (default).
        after: `pair` only: the images of the second date.
        inside: of a tile: rows and columns of its image that it holds; beyond them nothing is valid.
        footprint: the ground it covers, where the files say so.
    """

    images: dict[str, np.ndarray]
    target: int | np.ndarray | Boxes
    doy: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, np.ndarray] = field(default_factory=dict)
    inside: tuple[int, int] | None = None
    footprint: Footprint | None = None


@dataclass(frozen=True)
class Boxes:
    """xyxy: float32 [n, 4] pixels; labels: int64 [n], 0 … K-1; corners: float32 [n, 4, 2] of oriented boxes, or None."""

    xyxy: np.ndarray
    labels: np.ndarray
    corners: np.ndarray | None = None


@dataclass(frozen=True)
class Item:
    """key: unique name in the set; label: what the split's digest says of its label (class, or file and bytes)."""

    key: str
    split: Split
    label: str
    read: Callable[[], Sample] = field(compare=False, repr=False)


@dataclass(frozen=True)
class LabelledSet:
    """items in key order; classes: names, index = value; how: how the split came about, in words."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    how: str

    def of(self, split: Split) -> list[Item]:
        return [item for item in self.items if item.split == split]

    @property
    def digest(self) -> str:
        """Names items, their sides and their labels; equal digests may be compared item by item."""
        lines = (f"{item.split} {item.key} {item.label}" for item in self.items)
        return hashlib.sha256("\n".join([*self.classes, *lines]).encode()).hexdigest()[:16]


def labelled_set(items: Sequence[Item], classes: Sequence[str], how: str, where: str) -> LabelledSet:
    """Sorted and checked.

    Raises:
        UsageError: a key twice, or no training or test item.
    """
    ordered = tuple(sorted(items, key=lambda item: item.key))
    for a, b in pairwise(ordered):
        if a.key == b.key:
            raise UsageError(f"{where}: item {a.key} is there twice")
    for split in ("train", "test"):
        if not any(item.split == split for item in ordered):
            raise UsageError(f"{where}: no {split} items ({how}); check the split lists and the folder")
    return LabelledSet(ordered, tuple(classes), how)


def hashed_split(key: str, train: float, val: float = 0.0) -> Split:
    """The side of a key by its sha256: the same for everyone, whatever else lies in the folder."""
    share = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / float(1 << 48)
    return "train" if share < train else "val" if share < train + val else "test"


def take_share(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """`--labels`: of every label at least one item, `share` of them rounded, drawn by hash of seed and key; nested in `share`."""
    if not 0 < share <= 1:
        raise UsageError(f"--labels {share}: a share of the training labels, above 0 and at most 1")
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label if len(item.label) < 64 else "", []).append(item)
    if len(groups) > len(items) / 2:  # labels are rasters or boxes: no strata
        groups = {"": list(items)}
    kept = []
    for group in groups.values():
        drawn = sorted(group, key=lambda item: hashlib.sha256(f"{seed} {item.key}".encode()).digest())
        kept += drawn[: max(1, round(share * len(drawn)))]
    return sorted(kept, key=lambda item: item.key)


def tiles(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Upper left corners of tiles of `size` that cover an image; those at the edge reach beyond it."""
    return [(row, column) for row in range(0, height, size) for column in range(0, width, size)]


def footprint_of_tile(
    whole: Footprint | None, shape: tuple[int, int], row: int, column: int, size: int
) -> Footprint | None:
    """The ground of the tile at (row, column) of an image of `shape` pixels; what reaches beyond the image is left out."""
    if whole is None:
        return None
    crs, (west, south, east, north) = whole
    x, y = (east - west) / shape[1], (north - south) / shape[0]
    bottom, right = min(row + size, shape[0]), min(column + size, shape[1])
    return crs, (west + column * x, north - bottom * y, west + right * x, north - row * y)


def cut(x: np.ndarray, row: int, column: int, size: int, fill: float) -> np.ndarray:
    """[..., size, size] window of [..., H, W], `fill` beyond the edge."""
    window = x[..., row : row + size, column : column + size]
    short = [(0, 0)] * (x.ndim - 2) + [(0, size - window.shape[-2]), (0, size - window.shape[-1])]
    return window if not any(b for _, b in short) else np.pad(window, short, constant_values=fill)


def extent(x: np.ndarray, row: int, column: int, size: int) -> tuple[int, int]:
    """Rows and columns of [..., H, W] that the tile at (row, column) holds."""
    return min(size, x.shape[-2] - row), min(size, x.shape[-1] - column)
