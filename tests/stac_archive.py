"""Simulated scenes as an archive serves them: one item per acquisition and sensor, Cloud-optimised-like GeoTIFFs, one collection each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data_prep.geo import Grid
from data_prep.schema import MODALITIES
from data_prep.simulate.write import simulate
from data_prep.sources.items import AssetFields, make_item
from tests.scenes import write_tiff

COLLECTIONS = ("hr", "s2", "s1")


def make_archive(folder: Path, scenes: int, seed: int = 0, side_m: int = 640) -> list[dict[str, Any]]:
    """Items over `scenes` simulated scenes, with hrefs to files under `folder`; the same arguments give the same pixels."""
    simulate(str(folder / "scenes"), scenes, seed, side_m)
    items: list[dict[str, Any]] = []
    for place in sorted((folder / "scenes" / "sites").iterdir()):
        source = json.loads((place / "item.json").read_text())
        for name in ("s2", "s1"):
            items += _dates(place, folder / "images", name)
        hr = source["assets"]["hr"]
        grid = Grid(hr["proj:code"], tuple(hr["proj:transform"]), *reversed(hr["proj:shape"]))
        fields = AssetFields(
            "hr", str(place / "hr.tif"), bands=MODALITIES["hr"].bands, grid=grid, datetime=hr["datetime"]
        )
        items.append(_of_collection(make_item(f"hr_{place.name}", {"image": fields}), "hr"))
    return items


def write_ndjson(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def _dates(place: Path, images: Path, name: str) -> list[dict[str, Any]]:
    group = zarr.open_group(str(place / f"{name}.zarr"), mode="r")
    said, pixels_TCHW = dict(group.attrs), group["data"][:]
    grid = Grid(said["crs"], tuple(said["transform"]), pixels_TCHW.shape[-1], pixels_TCHW.shape[-2])
    clouds = group["cloud"][:] if "cloud" in group else None
    items = []
    for t, (moment, product) in enumerate(zip(said["datetimes"], said["product_ids"])):
        item_id = f"{name}_{place.name}_{t:02d}"
        href = write_tiff(images / f"{item_id}.tif", pixels_TCHW[t], grid, nodata=0 if name == "s2" else None)
        common: dict[str, Any] = {"grid": grid, "datetime": moment, "product_id": product}
        if name == "s1":
            fields = {"vvvh": AssetFields("s1", href, bands=("VV", "VH"), orbit=said["orbits"][t], unit="dB", **common)}
            extra: dict[str, Any] = {"sat:relative_orbit": 44 if said["orbits"][t] == "ascending" else 95}
        else:
            cloud_href = write_tiff(images / f"{item_id}_cloud.tif", clouds[t][None].astype(np.uint8), grid)
            offset = said["boa_add_offsets"][t]
            scaled = {"baseline": said["baselines"][t], "nodata": 0.0, "scale": 1e-4, "offset": offset * 1e-4}
            fields = {
                "data": AssetFields("s2", href, bands=MODALITIES["s2"].bands, **scaled, **common),
                "cloud": AssetFields("cloud", cloud_href, grid=grid, datetime=moment),
            }
            extra = {"sat:relative_orbit": 22, "eo:cloud_cover": round(float((clouds[t] > 0).mean()) * 100, 3)}
        items.append(_of_collection(make_item(item_id, fields, extra=extra), name))
    return items


def _of_collection(item: dict[str, Any], name: str) -> dict[str, Any]:
    """As an API returns it: no site of ours, its collection named."""
    for key in ("geoloom:site", "geoloom:cell"):
        item["properties"].pop(key)
    return item | {"collection": name, "links": []}
