"""What all readers need of files: names, pixels of any raster or picture, split lists. Every error names the file and the fix."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable

import numpy as np
from rasterio.errors import NotGeoreferencedWarning

from cluster import storage
from cluster.errors import UsageError
from data_prep.sources.raster import open_raster
from data_prep.sources.records import SourceFault
from pipeline.evaluate.items import IGNORE, Footprint

warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # pictures have no place
IMAGES = (".tif", ".tiff", ".jpg", ".jpeg", ".png", ".bmp")


def names(url: str, suffixes: tuple[str, ...] = IMAGES) -> list[str]:
    """Sorted file names with one of the suffixes. Raises UsageError if there is none."""
    found = [name for name in storage.list_names(url) if name.lower().endswith(suffixes)]
    if not found:
        raise UsageError(f"{url} is missing or holds no {' '.join(suffixes)}; check --data")
    return found


def require(url: str, what: str) -> str:
    """The URL, if it is there."""
    if not storage.exists(url):
        raise UsageError(f"{url} is missing ({what}); check --data, or fetch that part of the set")
    return url


def size_of(url: str, what: str) -> int:
    """Bytes of a file that must be there."""
    try:
        return storage.size(url)
    except FileNotFoundError:
        raise UsageError(f"{url} is missing ({what}); fetch it, or take its item off the list") from None


def find(url: str, stem: str, what: str, suffixes: tuple[str, ...] = IMAGES) -> str:
    """`url/stem` with whichever suffix is there."""
    for suffix in suffixes:
        if storage.exists(storage.join(url, stem + suffix)):
            return storage.join(url, stem + suffix)
    raise UsageError(f"{storage.join(url, stem)}{suffixes[0]} is missing ({what}); a split list names it")


def pixels(url: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """All bands [F, H, W] as stored; size: rows, columns to resample to, by nearest neighbour."""
    try:
        with open_raster(url, storage.name(url)) as raster:
            if size is None or size == (raster.height, raster.width):
                return raster.read()
            return raster.read(out_shape=(raster.count, *size))
    except SourceFault as fault:
        raise UsageError(str(fault)) from None
    except Exception as error:  # rasterio's read errors are of several kinds
        raise UsageError(f"{url} cannot be read: {' '.join(str(error).split())[:160]}") from None


def footprint(url: str) -> Footprint | None:
    """The ground of a raster that says where it lies; None of others."""
    try:
        with open_raster(url, storage.name(url)) as raster:
            return None if raster.crs is None else (raster.crs.to_wkt(), tuple(raster.bounds))
    except SourceFault as fault:
        raise UsageError(str(fault)) from None


def shape(url: str) -> tuple[int, int]:
    """Rows and columns, from the header."""
    try:
        with open_raster(url, storage.name(url)) as raster:
            return raster.height, raster.width
    except SourceFault as fault:
        raise UsageError(str(fault)) from None


def colour(url: str) -> np.ndarray:
    """[1, 3, H, W] uint8 of a picture or a GeoTIFF with at least three bands, R G B by its colour interpretation.

    Raises:
        UsageError: the file says itself that its bands are in another order.
    """
    try:
        with open_raster(url, storage.name(url)) as raster:
            said = [interpretation.name for interpretation in raster.colorinterp[:3]]
            if raster.count == 1 and said == ["palette"]:
                raise UsageError(f"{url} has a palette, not three bands; convert it to RGB")
            if {"red", "green", "blue"} <= set(said) and said != ["red", "green", "blue"]:
                raise UsageError(f"{url} says its bands are {', '.join(said)}; declared are R, G, B")
            if raster.count < 3:
                raise UsageError(f"{url} has {raster.count} band(s); declared are R, G, B")
            return raster.read([1, 2, 3])[None]
    except SourceFault as fault:
        raise UsageError(str(fault)) from None


def mask(url: str, like: tuple[int, int]) -> np.ndarray:
    """First band [H, W] of a label raster, of the size of its image. Raises UsageError naming both sizes."""
    values = pixels(url)[0]
    _agree(url, values.shape, like)
    return values


def same_size(url: str, found: tuple[int, ...], image: str) -> None:
    """Raises UsageError where a mask of size `found` is not of its image's size."""
    _agree(url, found, shape(image))


def _agree(url: str, found: tuple[int, ...], like: tuple[int, ...]) -> None:
    if tuple(found) != tuple(like):
        raise UsageError(
            f"{url} is {found[0]} x {found[1]}, its image {like[0]} x {like[1]}: the mask is of another size"
        )


def classes_of(values: np.ndarray, num_classes: int, ignored: Iterable[int], where: str, first: int = 0) -> np.ndarray:
    """int16 classes 0 … K-1 of a raster whose classes start at `first`; `ignored` values become IGNORE.

    Raises:
        UsageError: a value that is neither.
    """
    out = values.astype(np.int32) - first
    skip = np.isin(values, list(ignored))
    known = (out >= 0) & (out < num_classes)
    if not (known | skip).all():
        odd = int(values[~(known | skip)][0])
        raise UsageError(
            f"{where} holds {odd}, which is none of the {num_classes} classes; is it the mask of this set?"
        )
    return np.where(skip, IGNORE, out).astype(np.int16)


def lines(url: str) -> list[str]:
    """Non-empty lines of a text file that must be there."""
    require(url, "a split list")
    return [line.strip() for line in storage.read_bytes(url).decode().splitlines() if line.strip()]


def table(url: str) -> list[dict[str, str]]:
    """Rows of a csv file with a header."""
    require(url, "a table of the set")
    return list(csv.DictReader(io.StringIO(storage.read_bytes(url).decode("utf-8-sig"))))
