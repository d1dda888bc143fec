"""Arrays of patches, `[N, C, H, W]` in `.npy` or `.npz`: which array a file holds, and one patch of it as a `Cube`."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np

from cluster.storage import is_local, local_path, read_bytes
from data_prep.geo import Grid, Window
from data_prep.sources.cube import Cube, DateInfo, Layer
from data_prep.sources.raster import first_line
from data_prep.sources.records import Asset, SourceFault

HELD_BYTES = 1 << 30  # arrays kept decompressed per process; an `.npy` on disk is mapped and does not count


class _OpenArrays:
    """Arrays of this process, most recently used last: the patches of one file are read from memory, not unpacked again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: OrderedDict[tuple[str, str, int, int], np.ndarray] = OrderedDict()

    def get(self, href: str, name: str) -> np.ndarray:
        key = (href, name, *_signature(href))
        with self.lock:
            if key not in self.held:
                self.held[key] = _load(href, name)
                while len(self.held) > 1 and sum(map(_resident, self.held.values())) > HELD_BYTES:
                    self.held.popitem(last=False)
            self.held.move_to_end(key)
            return self.held[key]


_arrays = _OpenArrays()


def patch_array(href: str, name: str = "") -> tuple[str, np.ndarray]:
    """(name, array) of a file's patches. `name`: which array of an `.npz`; "" takes the only one with four axes.

    Raises SourceFault: unreadable, an object array (never unpickled), no such array, or several to choose from.
    """
    where = href.rsplit("/", 1)[-1]
    if not href.endswith(".npz"):
        array = _arrays.get(href, "")
        if array.ndim != 4:
            raise SourceFault(where, f"has shape {array.shape}, wanted [N, C, H, W]: {href}")
        return "", array
    with (
        _arrays.lock
    ):  # numpy parses headers with `ast`, which CPython 3.11 cannot do in two threads at once (gh-106905)
        shapes = _shapes(href)
    if not name:
        four = [key for key, shape in shapes.items() if len(shape) == 4]
        if len(four) != 1:
            listed = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items()) or "nothing"
            raise SourceFault(where, f"holds {len(four)} arrays [N, C, H, W] ({listed}); name one with --array: {href}")
        name = four[0]
    if len(shapes.get(name, ())) != 4:
        raise SourceFault(where, f"has no array {name!r} [N, C, H, W]; it holds {', '.join(shapes)}: {href}")
    return name, _arrays.get(href, name)


def _shapes(href: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an `.npz`, from their headers."""
    source: Any = local_path(href) if is_local(href) else io.BytesIO(read_bytes(href))
    shapes = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0 if version < (2, 0) else np.lib.format.read_array_header_2_0
                    )
                    shapes[member.removesuffix(".npy")] = read(stream)[0]
    except FileNotFoundError:
        raise SourceFault(href.rsplit("/", 1)[-1], f"{href} does not exist") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceFault(href.rsplit("/", 1)[-1], f"{href} cannot be read as .npz: {first_line(error)}") from None
    return shapes


def _load(href: str, name: str) -> np.ndarray:
    try:
        if href.endswith(".npz"):
            with np.load(
                local_path(href) if is_local(href) else io.BytesIO(read_bytes(href)), allow_pickle=False
            ) as file:
                return np.asarray(file[name])
        if is_local(href):
            return np.load(local_path(href), mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(read_bytes(href)), allow_pickle=False)
    except FileNotFoundError:
        raise SourceFault(href.rsplit("/", 1)[-1], f"{href} does not exist") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceFault(href.rsplit("/", 1)[-1], f"{href} cannot be read as arrays: {first_line(error)}") from None


def _resident(array: np.ndarray) -> int:
    return 0 if isinstance(array, np.memmap) else array.nbytes


def _signature(href: str) -> tuple[int, int]:
    """Modification time and size of a local file, so that a changed one is read anew; (0, 0) where absent or remote."""
    if not is_local(href):
        return 0, 0
    try:
        status = os.stat(local_path(href))
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


class PatchCube(Cube):
    """One patch of an array; `asset.member` is `NAME:INDEX`."""

    def __init__(self, asset: Asset, wanted: tuple[str, ...]) -> None:
        self.asset = asset
        if asset.grid is None:
            raise SourceFault(
                asset.id, "the catalog gives no proj:transform and proj:shape; make it with --layout patches"
            )
        name, _, index = asset.member.rpartition(":")
        _, array_NCHW = patch_array(asset.href, name)
        expected = (len(asset.bands), *asset.grid.shape)
        if not index.isdigit() or int(index) >= len(array_NCHW) or array_NCHW.shape[1:] != expected:
            raise SourceFault(
                asset.id,
                f"patch {index} of {list(expected)} is not in {asset.href}, which holds {list(array_NCHW.shape)}",
            )
        missing = [band for band in wanted if band not in asset.bands]
        if missing:
            raise SourceFault(asset.id, f"has no band {missing[0]}; it holds {', '.join(asset.bands)}")
        self._patch_CHW = array_NCHW[int(index)]
        self._order = [asset.bands.index(band) for band in wanted]
        self.dates = [DateInfo(asset.datetime)]
        self.layers = [Layer(wanted, asset.grid)]
        self.cloud: Grid | None = None

    def read(self, date: int, layer: int, window: Window) -> np.ndarray:
        row0, row1, col0, col1 = window
        return np.asarray(self._patch_CHW[self._order, row0:row1, col0:col1])
