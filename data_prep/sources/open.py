"""Asset → reader. A new format is one branch here and one class with the `Cube` protocol."""

from __future__ import annotations

from data_prep.sources.choose import PER_BAND
from data_prep.sources.copernicus import CopernicusCube
from data_prep.sources.cube import Cube
from data_prep.sources.mesh import MeshCube
from data_prep.sources.mmearth import MMEarthCube
from data_prep.sources.olmoearth import OlmoEarthCube
from data_prep.sources.patch_cube import PatchCube
from data_prep.sources.raster import RasterCube
from data_prep.sources.records import Asset, SourceFault
from data_prep.sources.treesatai import TreeSatCube
from data_prep.sources.zarr_bands import ZarrBandsCube
from data_prep.sources.zarr_cube import ZarrCube, is_cube


def open_cube(assets: list[Asset], wanted: tuple[str, ...], cloud: Asset | None = None) -> Cube:
    """Opens the files of one acquisition, or one cube of many. Raises SourceFault, ReadFault."""
    first = assets[0]
    if (
        cloud is not None
        and first.format in PER_BAND
        and (cloud.format == "zarr_bands") != (first.format == "zarr_bands")
    ):
        raise SourceFault(cloud.id, f"is {cloud.format}, its image is {first.format}: put both into one format")
    if first.format in ("raster", "parquet_raster"):
        return RasterCube(assets, wanted, cloud)
    if first.format == "zarr_bands":
        return ZarrBandsCube(assets, wanted, cloud)
    if first.format == "zarr":
        return ZarrCube(first, wanted) if is_cube(first) else ZarrBandsCube(assets, wanted)
    if first.format == "treesatai":
        return TreeSatCube(first, wanted)
    if first.format == "mesh":
        return MeshCube(first, wanted)
    if first.format == "copernicus":
        return CopernicusCube(first, wanted)
    if first.format == "mmearth":
        return MMEarthCube(first, wanted)
    if first.format == "olmoearth":
        return OlmoEarthCube(first, wanted)
    if first.format == "patches":
        return PatchCube(first, wanted)
    raise SourceFault(first.id, f"format {first.format!r} is not known: {first.href}")
