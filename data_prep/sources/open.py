"""Asset → reader. A new format is one branch here and one class with the `Cube` protocol."""

from __future__ import annotations

from data_prep.sources.copernicus import CopernicusCube
from data_prep.sources.cube import Cube
from data_prep.sources.mesh import MeshCube
from data_prep.sources.patch_cube import PatchCube
from data_prep.sources.raster import RasterCube
from data_prep.sources.records import Asset, SourceFault
from data_prep.sources.treesatai import TreeSatCube
from data_prep.sources.zarr_cube import ZarrCube


def open_cube(assets: list[Asset], wanted: tuple[str, ...], cloud: Asset | None = None) -> Cube:
    """Opens the files of one acquisition, or one cube of many. Raises SourceFault."""
    first = assets[0]
    if first.format in ("raster", "parquet_raster"):
        return RasterCube(assets, wanted, cloud)
    if first.format == "zarr":
        return ZarrCube(first, wanted)
    if first.format == "treesatai":
        return TreeSatCube(first, wanted)
    if first.format == "mesh":
        return MeshCube(first, wanted)
    if first.format == "copernicus":
        return CopernicusCube(first, wanted)
    if first.format == "patches":
        return PatchCube(first, wanted)
    raise SourceFault(first.id, f"format {first.format!r} is not known: {first.href}")
