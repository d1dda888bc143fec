"""Patches without georeference: a folder of images (any depth), or arrays `[N, C, H, W]` in `.npz` / `.npy`.

Such files say next to nothing about themselves, so the caller declares sensor, unit, band order and ground sampling distance
(`Declaration`), and what is not declared is refused. Only JPEG and PNG define their own band order (R, G, B).

A patch is a site of its own, one date, date unknown. Its coordinates are made up: metres around 0° N 0° E in a CRS that is named
so (`geo.NO_PLACE`), at a spot drawn from the hash of the patch's name; the index says `place: none`. The split hashes the
patch's name, or its group: patches of one group stay together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import UsageError
from cluster.storage import exists, filesystem, is_local
from data_prep.geo import Grid, no_place_crs
from data_prep.schema import MODALITIES
from data_prep.sources.items import AssetFields, make_item
from data_prep.sources.names import band_name
from data_prep.sources.patch_cube import patch_array
from data_prep.sources.raster import open_raster
from data_prep.sources.records import SourceFault

ARRAYS = (".npz", ".npy")
IMAGES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".tif": "image/tiff", ".tiff": "image/tiff"}
SELF_ORDERED = (".jpg", ".jpeg", ".png")
UNITS = {  # reflectance = number * scale + offset; uint8 is a colour, no reflectance
    "uint8": (None, None), "dn": (1e-4, 0.0), "dn-offset": (1e-4, -0.1), "reflectance": (1.0, 0.0),
}  # fmt: skip
SENSORS = {"hr": ("uint8",), "s2": ("dn", "dn-offset", "reflectance")}
LABEL = "scene"
HALF_SPAN_M = 500_000.0  # the nearest land to 0° N 0° E, Cape Three Points, is 570 km away
HIGHEST_REFLECTANCE = 10.0  # sun glint and snow reach 2; numbers above this are no reflectance of 0 to 1


@dataclass(frozen=True)
class Declaration:
    """What the caller says of the files, because they do not.

    Attributes:
        sensor: hr or s2.
        unit: uint8 (hr); s2: dn (reflectance x 10000), dn-offset (the same with the +1000 of baseline 04.00 left in), or
            reflectance (0 to 1).
        bands: in file order; those the sensor does not store are dropped. Empty: R, G, B, for JPEG and PNG only.
        gsd_m: metres per pixel.
        array: which array of an `.npz`; "" = the only one with four axes.
        group: "patch", "file" (all patches of one array), "folder", or a regular expression whose first group, found in the path
            below the source without its extension, names the group.
        labels: the folder an image lies in is its scalar label `scene`.
        files: only these paths below the source; empty = all.
    """

    sensor: str = ""
    unit: str = ""
    bands: tuple[str, ...] = ()
    gsd_m: float = 0.0
    array: str = ""
    group: str = "patch"
    labels: bool = True
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises UsageError: something is undeclared or contradicts the sensor; names the fix."""
        if self.sensor not in SENSORS:
            raise UsageError(
                f"--layout patches needs --sensor {' or '.join(SENSORS)}: the files do not say what took them"
            )
        units = SENSORS[self.sensor]
        if self.unit not in units:
            said = f"found {self.unit}" if self.unit else "the files do not say what a number means"
            raise UsageError(f"--sensor {self.sensor} needs --unit {' or '.join(units)}: {said}")
        if not 0 < self.gsd_m < 10_000:
            raise UsageError(
                f"--layout patches needs --gsd METRES, the size of a pixel on the ground; found {self.gsd_m:g}"
            )
        stored = MODALITIES[self.sensor].bands
        twice = [band for band in self.bands if self.bands.count(band) > 1]
        missing = [band for band in stored if band not in self.bands]
        if twice or (self.bands and missing):
            why = f"{twice[0]} stands twice" if twice else f"{missing[0]} is missing"
            raise UsageError(f"--bands {','.join(self.bands)}: {why}; {self.sensor} stores {','.join(stored)}")
        if self.group not in ("patch", "file", "folder"):
            try:
                groups = re.compile(self.group).groups
            except re.error as error:
                raise UsageError(f"--group {self.group}: no regular expression ({error})") from None
            if groups < 1:
                raise UsageError(f"--group {self.group}: needs a group in parentheses, such as ^(.+)_\\d+$")

    @property
    def dropped(self) -> tuple[str, ...]:
        """Declared bands that the sensor does not store."""
        return tuple(band for band in self.bands if band not in MODALITIES[self.sensor].bands)


def declaration(sensor: str, unit: str, bands: str, gsd_m: float, **more: Any) -> Declaration:
    """A `Declaration` with bands as one comma-separated text, in any of the names people use (red, B2, nir). Raises UsageError."""
    names = tuple(band_name(name, hr=sensor == "hr") for name in bands.split(",") if name.strip())
    return Declaration(sensor, unit, names, gsd_m, **more)


class Patches:
    """The layout: `sites` lists, `item` describes one patch. Holds the class names between the two."""

    def __init__(self, declared: Declaration) -> None:
        self.declared = declared
        self.classes: tuple[str, ...] = ()

    def sites(self, url: str) -> list[tuple[str, ...]]:
        """(key, href, member, group, class), sorted by path.

        Raises:
            UsageError: nothing usable there, files of both kinds, or bands that must be declared.
            SourceFault: an array file that cannot be read or does not fit what is declared.
        """
        paths = self._paths(url)
        extensions = {_extension(path) for path in paths.values()}
        undeclared = extensions - set(SELF_ORDERED) if not self.declared.bands else set()
        if undeclared or (not self.declared.bands and self.declared.sensor != "hr"):
            raise UsageError(
                f"--layout patches needs --bands NAME,NAME,… in file order: {sorted(undeclared or extensions)[0]} does not say it"
            )
        if extensions & set(ARRAYS):
            found = [site for relative, href in paths.items() for site in self._patches(relative, href)]
        else:
            found = [
                (relative, href, "", self._group(relative, ""), self._class(relative))
                for relative, href in paths.items()
            ]
        self.classes = tuple(sorted({label for *_, label in found} - {""}))
        keys = _keys(
            [f"{relative}:{member.rpartition(':')[2]}" if member else relative for relative, _, member, *_ in found]
        )
        return [(key, *site[1:]) for key, site in zip(keys, found)]

    def item(self, url: str, site: tuple[str, ...]) -> dict[str, Any]:
        """One patch as a STAC item without date or place. Raises SourceFault."""
        key, href, member, group, label = site
        if member:
            height, width = patch_array(href, member.rpartition(":")[0])[1].shape[2:]
            bands, media = self.declared.bands, "application/octet-stream"
        else:
            height, width, bands = self._image(href, key)
            media = IMAGES[_extension(href)]
        scale, offset = UNITS[self.declared.unit]
        asset = AssetFields(
            self.declared.sensor, href, media, bands, made_up_grid(key, self.declared.gsd_m, width, height),
            level="L2A" if self.declared.sensor == "s2" else "", scale=scale, offset=offset,
            nodata=0.0 if self.declared.sensor == "s2" else None, member=member, format="patches" if member else "",
            note=f"position made up, the patch has none; declared {self.declared.unit}, {self.declared.gsd_m:g} m",
        )  # fmt: skip
        labels: dict[str, Any] = {}
        if label:
            labels = {"scalars": {LABEL: self.classes.index(label)}, "classes": {LABEL: self.classes}}
        digest = hashlib.sha256(group.encode()).hexdigest()[:12]
        return make_item(
            key, {self.declared.sensor: asset}, cell=f"none_{digest}", extra={"geoloom:place": "none"}, **labels
        )

    def notes(self) -> list[str]:
        """What the user should know of the choice made for them."""
        dropped = self.declared.dropped
        return [f"bands dropped, {self.declared.sensor} does not store them: {', '.join(dropped)}"] if dropped else []

    def _paths(self, url: str) -> dict[str, str]:
        """Path below the source → URL, of all files of the one kind there is, or of one file."""
        if not exists(url):
            raise UsageError(f"{url} does not exist")
        fs, root = filesystem(url)
        root = root.rstrip("/")
        if fs.isfile(root):
            below = {root.rsplit("/", 1)[-1]: root}
        else:
            below = {name[len(root) :].strip("/"): name for name in sorted(fs.find(root))}
        if self.declared.files:
            absent = [name for name in self.declared.files if name not in below]
            if absent:
                raise UsageError(f"{url} has no file {absent[0]} ({len(absent)} of --files are not there)")
            below = {name: below[name] for name in sorted(set(self.declared.files))}
        arrays = {name: path for name, path in below.items() if _extension(name) in ARRAYS}
        images = {name: path for name, path in below.items() if _extension(name) in IMAGES}
        if bool(arrays) == bool(images):
            what = "both images and arrays; catalogue them one by one" if arrays else "no image or array"
            raise UsageError(f"{url} holds {what} ({', '.join((*IMAGES, *ARRAYS))})")
        return {name: path if is_local(url) else fs.unstrip_protocol(path) for name, path in (arrays or images).items()}

    def _patches(self, relative: str, href: str) -> list[tuple[str, ...]]:
        name, array_NCHW = patch_array(href, self.declared.array)
        bands = self.declared.bands
        if array_NCHW.shape[1] != len(bands):
            last = "; its last axis fits: transpose it" if array_NCHW.shape[3] == len(bands) else ""
            raise SourceFault(
                relative,
                f"has shape {list(array_NCHW.shape)}, wanted [N, {len(bands)}, H, W] for the declared bands{last}",
            )
        self._check_numbers(relative, array_NCHW[:: max(len(array_NCHW) // 16, 1)])
        members = [f"{name}:{number}" for number in range(len(array_NCHW))]
        return [(relative, href, member, self._group(relative, member), "") for member in members]

    def _image(self, href: str, key: str) -> tuple[int, int, tuple[str, ...]]:
        """(height, width, bands) of an image file that has no place of its own and fits what is declared."""
        with open_raster(href, key) as dataset:
            if dataset.crs is not None and not dataset.transform.is_identity:
                raise SourceFault(key, f"has a georeference; catalogue it with --layout geotiff: {href}")
            bands = self.declared.bands or MODALITIES["hr"].bands
            if dataset.count == len(bands) + 1 and dataset.colorinterp[-1].name == "alpha":
                bands = (*bands, "alpha")
            if dataset.count != len(bands):
                raise SourceFault(key, f"has {dataset.count} bands, declared are {','.join(bands)}: {href}")
            if self.declared.sensor == "s2":
                self._check_numbers(key, dataset.read())
            elif dataset.dtypes[0] != "uint8":
                raise SourceFault(key, f"holds {dataset.dtypes[0]}, wanted uint8 (0-255): rescale it first: {href}")
            return dataset.height, dataset.width, bands

    def _check_numbers(self, name: str, sample: np.ndarray) -> None:
        """The declared unit against the numbers. Raises SourceFault."""
        unit, highest = self.declared.unit, float(np.nanmax(sample)) if sample.size else 0.0
        if unit == "uint8" and sample.dtype != np.uint8:
            raise SourceFault(name, f"holds {sample.dtype}, wanted uint8 (0-255): rescale it first")
        if unit == "reflectance" and highest > HIGHEST_REFLECTANCE:
            raise SourceFault(name, f"reaches {highest:g}, no reflectance of 0 to 1: declare --unit dn")
        if unit in ("dn", "dn-offset") and 0 < highest <= HIGHEST_REFLECTANCE:
            raise SourceFault(name, f"reaches {highest:g}, no reflectance x 10000: declare --unit reflectance")

    def _group(self, relative: str, member: str) -> str:
        stem = relative.rpartition(".")[0]
        kind = self.declared.group
        if kind == "patch":
            return f"{relative}:{member}"
        if kind == "file":
            return relative
        if kind == "folder":
            return relative.rpartition("/")[0]
        match = re.search(kind, stem)
        return match[1] if match and match[1] else f"{relative}:{member}"

    def _class(self, relative: str) -> str:
        return relative.split("/")[-2] if self.declared.labels and "/" in relative else ""


def made_up_grid(name: str, gsd_m: float, width: int, height: int) -> Grid:
    """A pixel grid at a spot drawn from the hash of a name, within 500 km of 0° N 0° E, on the 10 m lattice."""
    digest = hashlib.sha256(name.encode()).digest()
    steps = int(HALF_SPAN_M / 10)
    x, y = (10.0 * (int.from_bytes(part, "big") % (2 * steps) - steps) for part in (digest[:8], digest[8:16]))
    return Grid(no_place_crs(), (gsd_m, 0.0, x, 0.0, -gsd_m, y), width, height)


def _extension(path: str) -> str:
    return "." + path.rpartition(".")[2].lower()


def _keys(names: list[str]) -> list[str]:
    """Shard keys of relative paths: no dots, at most 72 characters; where two would be equal or one is cut, a hash tells them apart."""
    plain = [
        re.sub(r"[^A-Za-z0-9_-]+", "_", re.sub(r"\.[A-Za-z0-9]+(?=:\d+$|$)", "", name)).strip("_") for name in names
    ]
    count: dict[str, int] = {}
    for key in plain:
        count[key] = count.get(key, 0) + 1
    return [
        key
        if count[key] == 1 and 0 < len(key) <= 72
        else f"{key[-60:]}_{hashlib.sha256(name.encode()).hexdigest()[:10]}"
        for name, key in zip(names, plain)
    ]
