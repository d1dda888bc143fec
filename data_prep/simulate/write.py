"""Simulated sites as files: GeoTIFF, Zarr cubes and STAC items, laid out as `data_prep.sources.stac` reads them.

Layout: `OUT/catalog.parquet`, `OUT/sites/KEY/{hr.tif, s2.zarr, s1.zarr, landcover.tif, item.json}`, `OUT/simulated.json`.
Everything is made in a folder beside OUT and appears at once (object stores: the catalog goes last).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import rasterio
import zarr
from rasterio.transform import Affine

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import progress
from data_prep.schema import MODALITIES
from data_prep.simulate.landcover import CELL_PX, Ground
from data_prep.simulate.optics import observe_hr, observe_s2
from data_prep.simulate.places import MAX_SITES, Calendar, Place, calendar_of, day_of_year, iso, place_of
from data_prep.simulate.radar import observe_s1
from data_prep.simulate.scenes import SCENE_TYPES, draw_scene
from data_prep.simulate.spectra import CLASSES

NUM_S2_DATES, NUM_S1_DATES = 12, 8
_MEDIA = {"tif": "image/tiff; application=geotiff", "zarr": "application/vnd+zarr"}


def simulate(out: str, num_sites: int, seed: int = 0, side_m: int = 160, scene_types: str = "hard") -> str:
    """Writes `num_sites` sites under the URL `out`; returns the URL of their catalog. Same arguments, same pixels.

    scene_types: `hard`, types that pixel statistics do not tell (`arrangements`); `basic`, eight mixtures of land covers.

    Running it again with the same arguments finds the finished set and does nothing.

    Raises:
        UsageError: sizes out of range, or `out` holds something else.
    """
    _check_arguments(num_sites, seed, side_m)
    if scene_types not in SCENE_TYPES:
        raise UsageError(f"--scene-types {scene_types}: choose {' or '.join(SCENE_TYPES)}")
    catalog = storage.join(out, "catalog.parquet")
    made_with = {"sites": num_sites, "seed": seed, "side_m": side_m, "scene_types": scene_types}
    if _already_there(out, made_with):
        return catalog
    folder = _workspace(out)
    try:
        items = []
        with progress(num_sites, "sites") as bar:
            for index in range(num_sites):
                items.append(_write_site(folder, index, seed, side_m, scene_types))
                bar.advance()
        (folder / "simulated.json").write_text(json.dumps(made_with))
        _write_catalog(items, folder / "catalog.parquet")
        _publish(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return catalog


def _check_arguments(num_sites: int, seed: int, side_m: int) -> None:
    if not 1 <= num_sites <= MAX_SITES:
        raise UsageError(f"--sites {num_sites}: choose 1 to {MAX_SITES}")
    if side_m < 40 or side_m > 2560 or side_m % 10:
        raise UsageError(f"--side-m {side_m}: choose a multiple of 10 between 40 and 2560")
    if seed < 0:
        raise UsageError(f"--seed {seed}: choose 0 or more")


def _already_there(out: str, made_with: dict[str, Any]) -> bool:
    names = storage.list_names(out)
    if not names:
        return False
    if "simulated.json" in names and "catalog.parquet" in names:
        found = json.loads(storage.read_bytes(storage.join(out, "simulated.json")))
        if {"scene_types": "basic"} | found == made_with:  # older sets had no other types
            return True
        raise UsageError(
            f"{out} holds simulated sites of other arguments ({found}); choose another folder or remove it"
        )
    raise UsageError(f"{out} is not empty and holds no finished simulation; choose another folder or remove it")


def _workspace(out: str) -> Path:
    """A new folder on the same file system as a local `out`, so that publishing is one rename."""
    if not storage.is_local(out):
        return Path(tempfile.mkdtemp(prefix="geoloom-simulate-"))
    target = Path(storage.local_path(out))
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    return folder


def _publish(folder: Path, out: str) -> None:
    if storage.is_local(out):
        target = storage.local_path(out)
        if os.path.isdir(target):
            os.rmdir(target)  # known to be empty
        os.replace(folder, target)
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == "catalog.parquet")
    with progress(len(files), "upload") as bar:
        for path in files:
            storage.upload(str(path), storage.join(out, path.relative_to(folder).as_posix()))
            bar.advance()


def _write_site(root: Path, index: int, seed: int, side_m: int, scene_types: str) -> dict[str, Any]:
    """Draws and writes one site; returns its STAC item with hrefs relative to `root`."""
    names = SCENE_TYPES[scene_types]
    order = np.random.default_rng([seed, 3, index // len(names)]).permutation(len(names))
    scene = int(order[index % len(names)])
    place = place_of(index, side_m, seed)
    calendar = calendar_of(index, place, seed, NUM_S2_DATES, NUM_S1_DATES)
    rng = np.random.default_rng([seed, 4, index])
    ground = draw_scene(scene_types, scene, side_m, rng)
    folder = root / "sites" / place.key
    folder.mkdir(parents=True)
    _write_s2(folder, ground, place, calendar, rng)
    _write_s1(folder, ground, place, calendar, rng)
    hr = observe_hr(ground, day_of_year(calendar.hr), calendar.shift_days, rng)
    _write_tif(folder / "hr.tif", hr, place)
    _write_tif(folder / "landcover.tif", ground.landcover_hw[None], place, nodata=-1)
    item = _stac_item(place, calendar, scene, names, ground)
    (folder / "item.json").write_text(json.dumps(item, indent=1))
    for asset in item["assets"].values():
        asset["href"] = f"sites/{place.key}/{asset['href']}"
    return item


def _write_s2(folder: Path, ground: Ground, place: Place, calendar: Calendar, rng: np.random.Generator) -> None:
    days = [day_of_year(time) for time in calendar.s2]
    dn, clouded = observe_s2(ground, days, calendar.shift_days, calendar.s2_offsets, rng)
    attributes = {
        "datetimes": [iso(time) for time in calendar.s2], "product_ids": calendar.s2_products,
        "baselines": calendar.s2_baselines, "boa_add_offsets": calendar.s2_offsets, "nodata": 0,
    }  # fmt: skip
    _write_cube(folder / "s2.zarr", "s2", dn, place, attributes, clouded)


def _write_s1(folder: Path, ground: Ground, place: Place, calendar: Calendar, rng: np.random.Generator) -> None:
    days = [day_of_year(time) for time in calendar.s1]
    decibel = observe_s1(ground, days, calendar.s1_orbits, calendar.shift_days, rng)
    attributes = {
        "datetimes": [iso(time) for time in calendar.s1], "product_ids": calendar.s1_products,
        "orbits": calendar.s1_orbits, "unit": "dB",
    }  # fmt: skip
    _write_cube(folder / "s1.zarr", "s1", decibel, place, attributes)


def _write_cube(
    path: Path,
    modality: str,
    pixels: np.ndarray,
    place: Place,
    attributes: dict[str, Any],
    cloud: np.ndarray | None = None,
) -> None:
    """A Zarr format 3 group: `data` [time, band, y, x] and, for s2, `cloud` [time, y, x]."""
    common = {"crs": f"EPSG:{place.epsg}", "transform": list(_transform(place, pixels.shape[-1])[:6])}
    group = zarr.create_group(
        store=str(path), zarr_format=3, attributes=common | {"bands": list(MODALITIES[modality].bands)} | attributes
    )
    group.create_array("data", data=pixels, chunks=pixels.shape, dimension_names=("time", "band", "y", "x"))
    if cloud is not None:
        group.create_array("cloud", data=cloud, chunks=cloud.shape, dimension_names=("time", "y", "x"))


def _write_tif(path: Path, pixels: np.ndarray, place: Place, nodata: float | None = None) -> None:
    count, height, width = pixels.shape
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256} if width >= 256 else {}
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=pixels.dtype.name, nodata=nodata,
        crs=f"EPSG:{place.epsg}", transform=_transform(place, width), **tiled,
    ) as raster:  # fmt: skip
        raster.write(pixels)


def _transform(place: Place, width: int) -> Affine:
    xmin, _, xmax, ymax = place.bounds
    pixel = (xmax - xmin) / width
    return Affine(pixel, 0, xmin, 0, -pixel, ymax)


def _stac_item(place: Place, calendar: Calendar, scene: int, names: Sequence[str], ground: Ground) -> dict[str, Any]:
    """The site as a STAC item; hrefs are relative to the item's own folder."""
    to_wgs84 = pyproj.Transformer.from_crs(place.epsg, 4326, always_xy=True)
    west, south, east, north = to_wgs84.transform_bounds(*place.bounds)
    xmin, ymin, xmax, ymax = place.bounds
    ring = [(xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax), (xmin, ymin)]
    corners = [list(to_wgs84.transform(x, y)) for x, y in ring]
    cells = len(ground.landcover_hw)
    times = sorted([*calendar.s2, *calendar.s1, calendar.hr])

    def asset(modality: str, href: str, pixels: int, bands: tuple[str, ...], **extra: Any) -> dict[str, Any]:
        return extra | {
            "href": href, "type": _MEDIA[href.rsplit(".", 1)[1]], "roles": ["data"], "geoloom:modality": modality,
            "proj:code": f"EPSG:{place.epsg}", "proj:transform": list(_transform(place, pixels)[:6]),
            "proj:shape": [pixels, pixels], "eo:bands": [{"name": band} for band in bands],
        }  # fmt: skip

    return {
        "type": "Feature", "stac_version": "1.0.0", "id": place.key, "stac_extensions": [], "links": [],
        "bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": {
            "datetime": None, "start_datetime": iso(times[0]), "end_datetime": iso(times[-1]),
            "geoloom:site": place.key, "proj:code": f"EPSG:{place.epsg}", "proj:bbox": [float(b) for b in place.bounds],
            "geoloom:labels": {"scene": scene},
            "label:classes": [
                {"name": "scene", "classes": list(names)}, {"name": "landcover", "classes": list(CLASSES)},
            ],
        },
        "assets": {
            "hr": asset("hr", "hr.tif", cells * CELL_PX, MODALITIES["hr"].bands, datetime=iso(calendar.hr)),
            "s2": asset("s2", "s2.zarr", cells, MODALITIES["s2"].bands, **{"processing:level": "L2A"}),
            "s1": asset("s1", "s1.zarr", cells, MODALITIES["s1"].bands),
            "landcover": asset("label", "landcover.tif", cells, ()) | {"roles": ["labels"]},
        },
    }  # fmt: skip


def _write_catalog(items: list[dict[str, Any]], path: Path) -> None:
    import pyarrow.fs  # noqa: F401  (stac_geoparquet uses it without importing it)
    import stac_geoparquet.arrow

    batches = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
    stac_geoparquet.arrow.to_parquet(batches, path)
