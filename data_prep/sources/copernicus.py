"""Copernicus-Pretrain: `example-NNNNNN.tar` with `<grid>.s1_grd.pth`, `<grid>.s2_toa.pth` and `<grid>.json` per 0.25 degree grid.

A `.pth` is a zip of a pickle (shapes and types) and raw storages. The pickle is never read: the JSON beside it lists every
image, which gives the number of local patches and dates, and the storage must then have exactly that many bytes of
[patches, dates, bands, 264, 264] (float32 dB for s1, int16 for s2). So nothing of the file can run, and no torch is needed.

Each local patch is a site. Its place is the patch centre in the image names (`0865832_-95.95_43.99/20221121`), given to two
decimals, so every date says `position: assumed…`; the Sentinel-2 images are L1C (top of atmosphere): modality s2_l1c. Short seasons
are padded with repeats of an image; a repeat is not a date.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.storage import join, list_names, open_read
from data_prep.geo import Grid, Window, transformer, utm_code
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import check_whole, check_zip, read_zip_member
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.names import L1C_ORDER, date_in
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.remote import read_source

PIXELS, GSD_M = 264, 10.0
# member: modality, bands, number type, level
MEMBERS = {"s1_grd": ("s1", ("VV", "VH"), "float32", ""), "s2_toa": ("s2_l1c", L1C_ORDER, "int16", "L1C")}
POSITION = "position assumed: the patch centre is given to 0.01 degrees"
_CENTRE = re.compile(r"_(-?\d+\.\d+)_(-?\d+\.\d+)/(\d{8})")


def sites(url: str) -> list[tuple[str, ...]]:
    """(grid, patch number, tar, place of the JSON, then member and place …) per local patch. Reads tar headers and JSON members."""
    tars = [name for name in list_names(url) if name.endswith(".tar")]
    found: list[tuple[str, ...]] = []
    for name in tars:
        href = join(url, name)
        for grid, places in _members(href).items():
            if "json" not in places or not set(places) & set(MEMBERS):
                continue
            about = _json(href, places["json"])
            held = [member for member in MEMBERS if member in places and about.get(member)]
            for patch in range(max((len(about[member]) for member in held), default=0)):
                entries = [text for member in held if patch < len(about[member]) for text in (member, places[member])]
                found.append((grid, str(patch), href, places["json"], *entries))
    if not found:
        raise UsageError(
            f"{url} is no copernicus folder: wanted example-NNNNNN.tar with <grid>.json and <grid>.s1_grd.pth inside"
        )
    return found


def _members(href: str) -> dict[str, dict[str, str]]:
    """grid → {"json" | member: "offset:size"} of a tar."""
    places: dict[str, dict[str, str]] = {}
    try:
        with open_read(href) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for entry in tar:
                grid, _, rest = entry.name.rsplit("/", 1)[-1].partition(".")
                places.setdefault(grid, {})[rest.removesuffix(".pth")] = f"{entry.offset_data}:{entry.size}"
    except (tarfile.TarError, OSError) as error:
        raise SourceFault(href, f"cannot be read as a tar: {first_line(error)}") from None
    return places


def _bytes(href: str, place: str) -> bytes:
    start, size = (int(number) for number in place.split(":"))
    return read_source(href, start, start + size)


@functools.lru_cache(maxsize=64)
def _json(href: str, place: str) -> dict[str, Any]:
    try:
        about = json.loads(_bytes(href, place))
        return {
            member: [[_plain(name) for name in names] for names in about[member]]
            for member in MEMBERS
            if about.get(member)
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ReadFault(href, f"JSON member at {place} is not as wanted: {first_line(error)}") from None


def _plain(name: Any) -> str:
    """An image name; some stand alone in a list."""
    while isinstance(name, list) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str):
        raise ValueError(f"image name {name!r}")
    return name


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One local patch as a STAC item. Raises SourceFault for image names without a centre or date."""
    grid_id, patch, href, about, *entries = site
    assets: dict[str, AssetFields] = {}
    times: list[str] = []
    grid: Grid | None = None
    for member, place in zip(entries[::2], entries[1::2]):
        modality, bands, data_type, level = MEMBERS[member]
        names = _json(href, about)[member][int(patch)]
        times += [info.datetime for info in _dates(names, f"{grid_id}/{member}")]
        grid = grid or _grid(names, f"{grid_id}/{member}")
        assets[member] = AssetFields(
            modality, href, "application/x-tar", bands, grid, format="copernicus", member=f"{member}#{patch}#{place}#{about}",
            level=level, unit="dB" if modality == "s1" else "", scale=1e-4 if level else None, nodata=0.0 if level else None,
            data_type=data_type, note=POSITION, calibration="" if level else "sigma0 GRD",
        )  # fmt: skip
    return make_item(f"{grid_id}_{patch}", assets, times=sorted(times))


def _dates(names: list[str], where: str) -> list[DateInfo]:
    dates = [DateInfo(date_in(name.rsplit("/", 1)[-1]), name) for name in names]
    if not dates or any(not info.datetime for info in dates):
        raise SourceFault(where, f"image names carry no date: {names[:1]}")
    return dates


def _grid(names: list[str], where: str) -> Grid:
    match = _CENTRE.search(names[0])
    if not match:
        raise SourceFault(where, f"image name carries no centre: {names[0]!r}")
    lon, lat = float(match[1]), float(match[2])
    crs = utm_code(lon, lat)
    x, y = transformer("EPSG:4326", crs).transform(lon, lat)
    half = PIXELS * GSD_M / 2
    return Grid(
        crs, (GSD_M, 0.0, round((x - half) / 10) * 10.0, 0.0, -GSD_M, round((y + half) / 10) * 10.0), PIXELS, PIXELS
    )


@functools.lru_cache(maxsize=2)
def _storage(href: str, place: str) -> bytes:
    """The only storage of a `.pth`, as raw bytes. Raises ValueError for another structure, zipfile.BadZipFile for damage."""
    data = _bytes(href, place)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_zip(archive, len(data))
        names = archive.namelist()
        storages = [name for name in names if re.search(r"(^|/)data/\d+$", name)]
        if len(storages) != 1:
            raise ValueError(f"{len(storages)} storages, wanted 1")
        orders = [name for name in names if name.endswith("byteorder")]
        if orders and read_zip_member(archive, orders[0], 64) != b"little":
            raise ValueError("is not little endian")
        return archive.read(storages[0])


class CopernicusCube(Cube):
    """The dates of one local patch of one member."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        member, patch, place, about = asset.member.split("#")
        _, bands, data_type, _ = MEMBERS[member]
        lists = _json(asset.href, about)[member]
        names = lists[int(patch)]
        try:
            check_whole(asset.href, (len(lists), len(names), len(bands), PIXELS, PIXELS), np.dtype(data_type).itemsize)
            raw = np.frombuffer(_storage(asset.href, place), dtype=np.dtype(data_type).newbyteorder("<"))
            values = raw.reshape(len(lists), len(names), len(bands), PIXELS, PIXELS)[int(patch)]
        except (
            ValueError,
            IndexError,
            NotImplementedError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
        ) as error:
            raise ReadFault(
                asset.id, f"{member} at {place} of {asset.href} is not as its JSON says: {first_line(error)}"
            ) from None
        missing = [band for band in wanted if band not in bands]
        if missing:
            raise SourceFault(asset.id, f"has no band {missing[0]}; it holds {', '.join(bands)}")
        self._values_TCHW = values[:, [bands.index(band) for band in wanted]]
        self.dates = _dates(names, asset.id)
        self.layers = [Layer(wanted, asset.grid or _grid(names, asset.id))]
        self.cloud: Grid | None = None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        return self._values_TCHW[date, :, row0:row1, col0:col1]
