"""TerraMesh and SSL4EO-S12 v1.1 as published: `[{split}/]{MODALITY}/*.tar` of `<stem>.zarr.zip` members, or `*.zarr.zip` files.

A `.zarr.zip` is a format-2 group: `bands` with dims out of (sample, time, band, y, x), coordinates `band`, `time`, `x`, `y` (pixel
centres), `crs` (EPSG number), optional `cloud_mask`, `file_id`, `sample`. In the 64 x 4 files of SSL4EO-S12 v1.1 the coordinates of a
sample are `time_`, `x_`, `y_`, and `time`, `x`, `y` merely count; their Sentinel-2 numbers carry the +1000 offset on every date, which
the later edition in tars has removed (both by the publisher's own description). The same stem (or sample id) in several modalities
is one site; a split folder is kept in the key's cell. Cataloguing reads coordinates, no image.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.storage import join, list_names
from data_prep.config import QualityConfig
from data_prep.geo import Grid, Window, crs_name
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.guard import Hostile
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.masks import mask_codes
from data_prep.sources.names import L1C_ORDER, L2A_ORDER, band_name, cf_times, iso_datetime, relative_orbit, s2_product
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, ReadFault, SourceFault
from data_prep.sources.remote import open_source, retrying
from data_prep.sources.zarr_store import arrays_of, open_group, small

# folder: modality, usual bands in file order, level, calibration
FOLDERS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "S2L2A": ("s2", L2A_ORDER, "L2A", ""),
    "S2L1C": ("s2_l1c", L1C_ORDER, "L1C", ""),
    "S1RTC": ("s1", ("VV", "VH"), "", "gamma0 RTC"),
    "S1GRD": ("s1", ("VV", "VH"), "", "sigma0 GRD"),
}
DIMS = ("sample", "time", "band", "y", "x")


def holds_mesh(url: str) -> bool:
    """Whether a folder (or its split folders) holds modality folders with tars or `.zarr.zip` files."""
    return any(True for _ in _files(url))


def _files(url: str) -> Iterator[tuple[str, str]]:
    """(modality folder, file URL), modality by modality, files sorted."""
    for base in (url, *(join(url, split) for split in ("train", "val", "test"))):
        present = list_names(base)
        for folder in FOLDERS:
            if folder in present:
                for name in list_names(join(base, folder)):
                    if name.endswith((".tar", ".zarr.zip")):
                        yield folder, join(base, folder, name)


def sites(url: str) -> list[tuple[str, ...]]:
    """(stem, folder, file URL, "offset:length", sample, …) with four entries per modality, sorted by stem.

    Tar headers are read, members are not; a 64 x 4 file is opened for its sample ids. Raises UsageError if nothing is there.
    """
    held: dict[str, list[str]] = {}
    for folder, href in _files(url):
        for stem, place, sample in _entries(href):
            held.setdefault(stem, []).extend((folder, href, place, sample))
    if not held:
        raise UsageError(
            f"{url} holds no TerraMesh or SSL4EO-S12 v1.1 files: wanted {'|'.join(FOLDERS)}/*.tar or *.zarr.zip"
        )
    return [(stem, *entries) for stem, entries in sorted(held.items())]


def _entries(href: str) -> Iterator[tuple[str, str, str]]:
    """(stem, place inside the file, sample number) of every sample."""
    if href.endswith(".tar"):
        try:
            with open_source(href) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if member.name.endswith(".zarr.zip"):
                        stem = member.name.rsplit("/", 1)[-1].removesuffix(".zarr.zip")
                        yield stem, f"{member.offset_data}:{member.size}", ""
        except (tarfile.TarError, OSError) as error:
            raise SourceFault(href, f"cannot be read as a tar: {first_line(error)}") from None
        return
    group, _ = open_group(href, href, zarr_format=2)
    if "bands" in group and group["bands"].ndim == 5 and "sample" in group:
        for number, name in enumerate(_texts(group["sample"])):
            yield name, "", str(number)
    else:
        yield href.rsplit("/", 1)[-1].removesuffix(".zarr.zip"), "", ""


def item(url: str, site: tuple[str, ...]) -> dict[str, Any]:
    """One sample, all its modalities, as a STAC item. Raises SourceFault."""
    stem, *flat = site
    assets: dict[str, AssetFields] = {}
    times: list[str] = []
    for folder, href, place, sample in zip(*[iter(flat)] * 4):
        if folder == "S1GRD" and "S1RTC" in flat:
            continue  # the same acquisition twice; sigma0 and gamma0 are not mixed
        modality, bands, level, calibration = FOLDERS[folder]
        member = f"{place}#{sample}" if sample else place
        asset = Asset(f"{stem}/{folder}", modality, href, "mesh", bands, member=member)
        cube = MeshCube(asset, ())
        times += [info.datetime for info in cube.dates if info.datetime]
        s2 = modality.startswith("s2")
        assets[folder] = AssetFields(
            modality, href, "application/vnd+zarr", cube.names, cube.grid, format="mesh", member=member, level=level,
            unit="" if s2 else "dB", scale=1e-4 if s2 else None, offset=(-0.1 if cube.has_offset else 0.0) if s2 else None,
            nodata=0.0 if s2 else None,
            calibration=calibration, data_type=cube.data_type,
        )  # fmt: skip
    cell = "_".join(stem.split("_")[:2]) if stem.count("_") >= 3 else ""
    return make_item(stem, assets, times=sorted(times), cell=cell)


class MeshCube(Cube):
    """One sample of one `.zarr.zip`."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        place, _, sample = asset.member.partition("#")
        group, store = open_group(asset.href, asset.id, place, zarr_format=2)
        arrays_of(group, store, asset.href, asset.id)
        self.has_offset = "time_" in group  # the 64 x 4 edition of SSL4EO-S12 v1.1
        try:
            self._array = group["bands"]
            dims = list(self._array.attrs.get("_ARRAY_DIMENSIONS") or DIMS[5 - self._array.ndim :])
            self._pick = {"sample": int(sample or 0)}
            self._dims = dims
            size = dict(zip(dims, self._array.shape))
            self.names = tuple(band_name(n) for n in _texts(group["band"])) if "band" in group else asset.bands
            self.dates = self._read_dates(group, size.get("time", 1))
            self.grid = self._read_grid(group, size["y"], size["x"])
            self._cloud = group.get("cloud_mask")
        except Exception as error:  # strangers' metadata: key, type, index and codec errors of every sort
            kind = SourceFault if isinstance(error, KeyError | Hostile) else ReadFault
            raise kind(asset.id, f"{asset.href} is no TerraMesh sample: {first_line(error)}") from None
        missing = [band for band in wanted if band not in self.names]
        if missing:
            raise SourceFault(asset.id, f"has no band {missing[0]}; it holds {', '.join(self.names)}")
        self._indices = [self.names.index(band) for band in wanted]
        self.data_type = str(self._array.dtype)
        self.layers = [Layer(wanted, self.grid)]
        self.cloud = self.grid if self._cloud is not None else None

    def _one(self, array: Any) -> np.ndarray:
        """An array (a coordinate, say) of this sample: a leading sample dimension is picked away."""
        dims = array.attrs.get("_ARRAY_DIMENSIONS") or []
        values = small(array)
        return values[self._pick["sample"]] if dims and dims[0] == "sample" else values

    def _read_dates(self, group: Any, count: int) -> list[DateInfo]:
        name = next((name for name in ("time_", "time") if name in group), "")
        times = np.atleast_1d(self._one(group[name])) if name else np.zeros(count, np.int64)
        stamps = _stamps(times, str(group[name].attrs.get("units", "")) if name else "")
        files = [str(name) for name in np.atleast_1d(self._one(group["file_id"]))] if "file_id" in group else []
        dates = []
        for number in range(count):
            product = files[number] if number < len(files) else ""
            said, track = s2_product(product), relative_orbit(product)
            stamp = stamps[number] if number < len(stamps) else ""
            dates.append(DateInfo(stamp, product, said.get("baseline", ""), relative_orbit=track))
        return dates

    def _read_grid(self, group: Any, height: int, width: int) -> Grid:
        names = ("x_", "y_") if "x_" in group and "y_" in group else ("x", "y")
        xs, ys = (np.ravel(self._one(group[name])).astype(float) for name in names)
        if len(xs) != width or len(ys) != height or width < 2 or height < 2:
            raise ValueError(f"{len(xs)} x {len(ys)} coordinates for {width} x {height} pixels")
        step_x, step_y = (xs[-1] - xs[0]) / (width - 1), (ys[-1] - ys[0]) / (height - 1)
        crs = crs_name(f"EPSG:{int(np.ravel(self._one(group['crs']))[0])}")
        return Grid(crs, (step_x, 0.0, xs[0] - step_x / 2, 0.0, step_y, ys[0] - step_y / 2), width, height)

    def _block(self, array: Any, dims: list[str], date: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        picks = {
            "sample": self._pick["sample"],
            "time": date,
            "band": slice(None),
            "y": slice(row0, row1),
            "x": slice(col0, col1),
        }
        try:
            return retrying(lambda: np.asarray(array[tuple(picks[name] for name in dims)]), self.asset.href)
        except Hostile as error:
            raise SourceFault(self.asset.id, f"{self.asset.href}: {error}") from None
        except Exception as error:  # codecs raise what they like on damaged bytes
            raise ReadFault(self.asset.id, f"corrupt chunk in {self.asset.href}: {first_line(error)}") from None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        return self._block(self._array, self._dims, date, window)[self._indices]

    def read_cloud(self, date: int, window: Window, quality: QualityConfig) -> np.ndarray:
        assert self._cloud is not None
        dims = list(self._cloud.attrs.get("_ARRAY_DIMENSIONS") or DIMS[-self._cloud.ndim :])
        return mask_codes(self._block(self._cloud, dims, date, window), "cloud", quality)


def _stamps(times: np.ndarray, units: str) -> list[str]:
    """Times as ISO text: datetime64, CF numbers, or nanoseconds since 1970; "" where none is given (0)."""
    if times.dtype.kind == "M":
        return [iso_datetime(str(stamp)) for stamp in times]
    if units:
        return [iso_datetime(text) for text in cf_times(times.tolist(), units)]
    return [iso_datetime(str(np.datetime64(int(stamp), "ns"))) if int(stamp) > 0 else "" for stamp in times]


def _texts(array: Any) -> list[str]:
    return [
        item.decode(errors="replace") if isinstance(item, bytes) else str(item)
        for item in np.ravel(small(array)).tolist()
    ]
