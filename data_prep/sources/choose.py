"""Which of an item's files are read, where several hold the same band of the same image.

Publishers list a band at several pixel sizes (`blue`, `blue_20m`, `blue_60m`; `B02_10m` … `B02_60m`), and in two formats (`red`,
`red-jp2`). Read is, band by band: a file at the band's own resolution before a resampled one, the finest, GeoTIFF before JPEG 2000
(which decodes twenty times slower), and what anybody may read before what the requester pays; else the first. A file that wins no
band is not opened at all.
"""

from __future__ import annotations

from data_prep.schema import MODALITIES
from data_prep.sources.records import MASKS, Asset

# formats of which several files make one image
PER_BAND = ("raster", "parquet_raster", "zarr_bands")


def choose(assets: list[Asset]) -> list[Asset]:
    """The assets to read, in the order given. Cubes and labels are all kept, masks one per item and date."""
    winners: dict[tuple[str, ...], Asset] = {}
    for asset in assets:
        for slot in _slots(asset):
            held = winners.get(slot)
            if held is None or _rank(asset) < _rank(held):
                winners[slot] = asset
    kept = {id(asset) for asset in winners.values()}
    return [asset for asset in assets if id(asset) in kept or not _slots(asset)]


def _slots(asset: Asset) -> list[tuple[str, ...]]:
    """What the asset competes for: each band of an image, or being the image's mask."""
    if asset.modality in MASKS:
        return [("mask", asset.datetime)]
    if asset.modality not in MODALITIES or asset.format not in PER_BAND:
        return []
    spec = MODALITIES[asset.modality]
    # an analytic product beside a picture is not kept for the sake of bands that nobody reads
    bands = [band for band in asset.bands if band in spec.bands] if spec.kind == "colour" else asset.bands
    return [(asset.modality, asset.datetime, asset.product_id, asset.orbit, band) for band in bands]


def _rank(asset: Asset) -> tuple[float | int, ...]:
    """Smaller is better."""
    mask = MASKS.index(asset.modality) if asset.modality in MASKS else 0
    picture = asset.modality in MODALITIES and MODALITIES[asset.modality].kind == "colour"
    key = asset.id.rsplit("/", 1)[-1].lower()
    return (
        mask,
        0 if not picture or "visual" in key or "image" in key else 1,
        _gsd(asset) or float("inf"),
        int(asset.href.lower().endswith((".jp2", ".j2k"))),
        int(asset.href.startswith("s3://")),
    )


def _gsd(asset: Asset) -> float:
    if asset.gsd_m:
        return asset.gsd_m
    return round(asset.grid.gsd_m(), 3) if asset.grid is not None else 0.0
