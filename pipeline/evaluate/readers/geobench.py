"""GEO-Bench-2: `.tortilla` files (TACO), one per set, samples inside samples.

A tortilla is: 2 bytes `#y`, 8 bytes footer offset, 8 bytes footer length (little endian), payload, footer = Parquet table with one
row per member (`tortilla:id`, `tortilla:file_format`, `tortilla:data_split`, `tortilla:offset`, `tortilla:length`, and the set's own
columns). A member of format TORTILLA is a tortilla again. We read the format ourselves: 40 lines, any fsspec URL, no GDAL virtual
files (tests/unit/test_evaluate_readers.py checks them against tacoreader where it is installed).
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rasterio.io import MemoryFile

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

SPLITS: dict[str, Split] = {"train": "train", "validation": "val", "val": "val", "test": "test"}
BENV2 = (
    "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops", "Pastures", "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation", "Agro-forestry areas",
    "Broad-leaved forest", "Coniferous forest", "Mixed forest", "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation", "Transitional woodland, shrub", "Beaches, dunes, sands", "Inland wetlands",
    "Coastal wetlands", "Inland waters", "Marine waters",
)  # fmt: skip
TREES = (
    "Abies", "Acer", "Alnus", "Betula", "Cleared", "Fagus", "Fraxinus", "Larix", "Picea", "Pinus", "Populus", "Prunus",
    "Pseudotsuga", "Quercus", "Tilia",
)  # fmt: skip
FLAIR2 = (
    "building", "pervious surface", "impervious surface", "bare soil", "water", "coniferous", "deciduous", "brushwood", "vineyard",
    "herbaceous vegetation", "agricultural land", "plowed land", "other",
)  # fmt: skip
PASTIS = (
    "background", "meadow", "soft winter wheat", "corn", "winter barley", "winter rapeseed", "spring barley", "sunflower", "grapevine",
    "beet", "winter triticale", "winter durum wheat", "fruits, vegetables, flowers", "potatoes", "leguminous fodder", "soybeans",
    "orchard", "mixed cereal", "sorghum",
)  # fmt: skip
PASTIS_VOID = 19
DYNAMIC = (
    "impervious surfaces",
    "agriculture",
    "forest & other vegetation",
    "wetlands",
    "soil",
    "water",
)  # snow & ice: ignored


def members(url: str, offset: int = 0) -> list[dict[str, Any]]:
    """Footer rows of the tortilla that begins at `offset` of a file; `tortilla:offset` is made absolute."""
    try:
        head = storage.read_bytes(url, offset, offset + 18)
        if head[:2] != b"#y":
            raise ValueError("it does not begin with #y")
        start, length = struct.unpack("<QQ", head[2:18])
        footer = storage.read_bytes(url, offset + start, offset + start + length)
        rows = pq.read_table(io.BytesIO(footer)).to_pylist()
        return [{**row, "tortilla:offset": row["tortilla:offset"] + offset} for row in rows]
    except (ValueError, struct.error, KeyError, pa.ArrowException) as error:
        raise UsageError(f"{url} is no whole tortilla: {' '.join(str(error).split())[:120]}; fetch it again") from None


def benv2(root: str, row: Row) -> LabelledSet:
    """BigEarthNet v2, multi-label, 19 classes."""
    return _set(
        root,
        row,
        "benv2",
        BENV2,
        lambda url, top: _multi_label(url, top, row, "labels", BENV2, {"s1": "s1", "s2": "s2"}),
    )


def treesatai(root: str, row: Row) -> LabelledSet:
    """TreeSatAI, multi-label genera; every genus named is a label, whatever its share."""
    names = {"aerial": "hr", "s2": "s2", "s1": "s1"}
    return _set(
        root, row, "treesatai", TREES, lambda url, top: _multi_label(url, top, row, "species_labels", TREES, names)
    )


def flair2(root: str, row: Row) -> LabelledSet:
    """FLAIR #2 aerial, 13 classes; values above 13 are `other`, as the set's own loaders read them."""

    def read(parts: dict[str, np.ndarray], where: str) -> np.ndarray:
        return files.classes_of(np.minimum(parts["mask"][0], 13), 13, (0,), where, first=1)

    return _set(root, row, "flair2", FLAIR2, lambda url, top: _dense(url, top, row, {"aerial": "hr"}, "mask", read))


def pastis(root: str, row: Row) -> LabelledSet:
    """PASTIS-R, Sentinel-2 and Sentinel-1 series with their dates, 19 classes, void ignored."""

    def read(parts: dict[str, np.ndarray], where: str) -> np.ndarray:
        return files.classes_of(parts["semantic"][0], len(PASTIS), (PASTIS_VOID,), where)

    names = {"s2": "s2", "s1a": "s1", "s1d": "s1"}
    return _set(root, row, "pastis", PASTIS, lambda url, top: _dense(url, top, row, names, "semantic", read))


def dynamic_earthnet(root: str, row: Row) -> LabelledSet:
    """Dynamic EarthNet: the month's Planet image of the first day as hr, and its Sentinel-2 image, 6 classes, snow and ice ignored."""

    def read(parts: dict[str, np.ndarray], where: str) -> np.ndarray:
        top = parts["label"].argmax(0)
        return files.classes_of(np.where(parts["label"].max(0) > 0, top, 6), len(DYNAMIC), (6,), where)

    return _set(
        root,
        row,
        "dynamic_earthnet",
        DYNAMIC,
        lambda url, top: _dense(url, top, row, {"planet_0": "hr", "s2": "s2"}, "label", read),
    )


Reader = Callable[[str, dict[str, Any]], list[tuple[str, str, Callable[[], Sample]]]]


def _set(root: str, row: Row, stem: str, classes: tuple[str, ...], items_of: Reader) -> LabelledSet:
    """Every `…stem….tortilla` of the folder (or the one file that `root` is)."""
    if root.endswith(".tortilla"):
        urls = [files.require(root, "a tortilla")]
    else:
        urls = [storage.join(root, n) for n in storage.list_names(root) if n.endswith(".tortilla") and stem in n]
    if not urls:
        raise UsageError(f"{root} holds no *{stem}*.tortilla; --data takes the folder or the file of {row.name}")
    items = []
    for url in urls:
        for top in members(url):
            split = SPLITS.get(str(top.get("tortilla:data_split")))
            if split is None:
                raise UsageError(f"{url}: sample {top['tortilla:id']} is of split {top.get('tortilla:data_split')!r}")
            items += [Item(key, split, label, read) for key, label, read in items_of(url, top)]
    return labelled_set(items, classes, "tortilla:data_split of the files", root)


def _multi_label(
    url: str, top: dict[str, Any], row: Row, column: str, classes: tuple[str, ...], names: dict[str, str]
) -> list[tuple[str, str, Callable[[], Sample]]]:
    given = [str(name) for name in top[column]]
    unknown = [name for name in given if name not in classes]
    if unknown or not given:
        raise UsageError(
            f"{url}: sample {top['tortilla:id']} is labelled {unknown[0] if unknown else 'nothing'!r}, which is no class of {row.name}"
        )
    target = np.isin(classes, given)

    def read() -> Sample:
        images, doy = _images(url, top, row, names)
        return Sample(images, target, doy, footprint=_footprint(top))

    return [(f"{storage.name(url)}/{top['tortilla:id']}", "+".join(sorted(given)), read)]


def _dense(
    url: str, top: dict[str, Any], row: Row, names: dict[str, str], label: str,
    classes: Callable[[dict[str, np.ndarray], str], np.ndarray],
) -> list[tuple[str, str, Callable[[], Sample]]]:  # fmt: skip
    key = f"{storage.name(url)}/{top['tortilla:id']}"
    shape = top.get("stac:raster_shape")
    size = row.tile_px if row.tile_px and shape and min(shape) > row.tile_px else 0
    corners = tiles(int(shape[0]), int(shape[1]), size) if size and shape else [(0, 0)]

    def read(y: int, x: int) -> Sample:
        images, doy = _images(url, top, row, names)
        found = {m["tortilla:id"]: m for m in members(url, top["tortilla:offset"])}
        target = classes({label: _pixels(url, found[label])}, key)
        if size:
            images = {name: cut(image, y, x, size, 0) for name, image in images.items()}
            inside, tile = extent(target, y, x, size), footprint_of_tile(_footprint(top), target.shape, y, x, size)
            return Sample(images, cut(target, y, x, size, IGNORE), doy, inside=inside, footprint=tile)
        return Sample(images, target, doy, footprint=_footprint(top))

    told = f"{top['tortilla:id']} {top['tortilla:length']}"
    return [(f"{key}/{y:05d}-{x:05d}" if size else key, told, functools.partial(read, y, x)) for y, x in corners]


def _images(
    url: str, top: dict[str, Any], row: Row, names: dict[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """[T, F, H, W] and days of the year by sensor, for the sensors that the row declares; parts of one sensor follow each other."""
    wanted = {bands.sensor for bands in row.bands}
    images: dict[str, np.ndarray] = {}
    doy: dict[str, np.ndarray] = {}
    for part in members(url, top["tortilla:offset"]):
        sensor = names.get(part["tortilla:id"])
        if sensor not in wanted:
            continue
        pixels = _pixels(url, part)
        pixels = pixels[None] if pixels.ndim == 3 else pixels
        days = _days(part, len(pixels))
        images[sensor] = np.concatenate([images[sensor], pixels]) if sensor in images else pixels
        doy[sensor] = np.concatenate([doy[sensor], days]) if sensor in doy else days
    missing = wanted - set(images)
    if missing:
        raise UsageError(f"{url}: sample {top['tortilla:id']} has no {min(missing)}; {row.name} needs it")
    return images, doy


def _pixels(url: str, member: dict[str, Any]) -> np.ndarray:
    raw = storage.read_bytes(url, member["tortilla:offset"], member["tortilla:offset"] + member["tortilla:length"])
    try:
        if member["tortilla:file_format"] == "HDF5":
            import h5py

            with h5py.File(io.BytesIO(raw)) as file:
                return file["data"][()]
        with MemoryFile(raw) as memory, memory.open() as raster:
            return raster.read()
    except Exception as error:  # h5py and rasterio each have their own
        raise UsageError(
            f"{url}: member {member['tortilla:id']} cannot be read: {' '.join(str(error).split())[:120]}"
        ) from None


def _footprint(top: dict[str, Any]) -> Footprint | None:
    """From `stac:crs`, `stac:geotransform` (GDAL's order) and `stac:raster_shape`; else the point `lon`, `lat`; else None."""
    crs, transform, shape = (top.get(f"stac:{name}") for name in ("crs", "geotransform", "raster_shape"))
    if crs and transform and shape:
        x0, dx, _, y0, _, dy = (float(value) for value in transform)
        return str(crs), (x0, y0 + dy * shape[0], x0 + dx * shape[1], y0)
    if top.get("lon") is not None and top.get("lat") is not None:
        lon, lat = float(top["lon"]), float(top["lat"])
        return "EPSG:4326", (lon, lat, lon, lat)
    return None


def _days(member: dict[str, Any], dates: int) -> np.ndarray:
    """Days of the year: from `dates` (20180917 …) or `stac:time_start`; 0 where neither says."""
    given = member.get("dates") or []
    if len(given) == dates:
        return np.array([datetime.strptime(str(day), "%Y%m%d").timetuple().tm_yday for day in given])
    start = member.get("stac:time_start")
    if dates == 1 and start and start > 1e8:
        return np.array([datetime.fromtimestamp(float(start), UTC).timetuple().tm_yday])
    return np.zeros(dates, int)
