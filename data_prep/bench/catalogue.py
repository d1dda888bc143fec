"""A large made-up archive, as metadata only: what planning costs at millions of sites, measured without a pixel.

Tiles of one degree (which overlap, as MGRS tiles do), each seen on `dates` Sentinel-2 days, 12 Sentinel-1 days and by one aerial image,
as a stac-geoparquet dump with twelve assets per Sentinel-2 item.
"""

from __future__ import annotations

import datetime as dt
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

S2_ASSETS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12", "scl", "thumbnail")
SENSORS = {"s2": (S2_ASSETS, 65), "s1": (("vv", "vh"), 12), "hr": (("image",), 1)}
OVERLAP = 0.05  # degrees on every side
START = int(dt.datetime(2023, 1, 1, 10, 30, tzinfo=dt.UTC).timestamp())


def write_dump(folder: str, bbox: tuple[float, float, float, float], seed: int = 0) -> dict[str, int]:
    """Writes `{s2,s1,hr}.parquet` of every tile that meets the box; returns the number of items of each."""
    west, south, east, north = bbox
    lon, lat = np.meshgrid(np.arange(np.floor(west), np.ceil(east)), np.arange(np.floor(south), np.ceil(north)))
    tiles = np.column_stack([lon.ravel(), lat.ravel()])
    os.makedirs(folder, exist_ok=True)
    counts = {}
    for name, (assets, dates) in SENSORS.items():
        kind = _schema(assets)
        with pq.ParquetWriter(os.path.join(folder, f"{name}.parquet"), kind, compression="zstd") as writer:
            for start in range(0, len(tiles), 64):
                writer.write_table(
                    _rows(name, tiles[start : start + 64], dates, assets, kind, seed), row_group_size=4096
                )
        counts[name] = len(tiles) * dates
    return counts


def _schema(assets: tuple[str, ...]) -> pa.Schema:
    texts = pa.list_(pa.string())
    band = pa.list_(pa.struct([("name", pa.string())]))
    asset = pa.struct([("href", pa.string()), ("type", pa.string()), ("roles", texts), ("eo:bands", band)])
    box = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
    return pa.schema(
        [
            ("id", pa.string()), ("collection", pa.string()), ("geometry", pa.binary()), ("bbox", box),
            ("datetime", pa.timestamp("us", "UTC")), ("eo:cloud_cover", pa.float64()), ("sat:relative_orbit", pa.int64()),
            ("sat:orbit_state", pa.string()), ("platform", pa.string()), ("s2:processing_baseline", pa.string()),
            ("proj:code", pa.string()), ("assets", pa.struct([(key, asset) for key in assets])),
        ]
    )  # fmt: skip


def _rows(name: str, tiles: np.ndarray, dates: int, assets: tuple[str, ...], kind: pa.Schema, seed: int) -> pa.Table:
    count = len(tiles) * dates
    west, south = np.repeat(tiles[:, 0], dates) - OVERLAP, np.repeat(tiles[:, 1], dates) - OVERLAP
    size = 1 + 2 * OVERLAP
    number = np.tile(np.arange(dates), len(tiles))
    rng = np.random.default_rng([seed, len(assets), int(tiles[0, 0]) + 360, int(tiles[0, 1]) + 360])
    stamps = START + number * (365 * 86_400 // dates) // 86_400 * 86_400 + rng.integers(0, 600, count)
    names = [
        f"{name}_{int(w + OVERLAP):+04d}{int(s + OVERLAP):+03d}_{n:03d}"
        for w, s, n in zip(np.round(west, 3), np.round(south, 3), number)
    ]
    orbit = np.repeat((tiles[:, 0].astype(int) % 143) + 1, dates)

    def asset(key: str) -> list[dict[str, object]]:
        bands = [{"name": key.upper()}] if key not in ("scl", "thumbnail", "image") else None
        media = "image/jpeg" if key == "thumbnail" else "image/tiff; application=geotiff; profile=cloud-optimized"
        return [
            {"href": f"s3://archive/{name}/{text}/{key}.tif", "type": media, "roles": ["thumbnail" if key == "thumbnail" else "data"], "eo:bands": bands}
            for text in names
        ]  # fmt: skip

    columns = {
        "id": names, "collection": [name] * count, "geometry": shapely.to_wkb(shapely.box(west, south, west + size, south + size)).tolist(),
        "bbox": pa.StructArray.from_arrays([pa.array(v) for v in (west, south, west + size, south + size)], fields=list(kind.field("bbox").type)),
        "datetime": pa.array(stamps * 1_000_000, pa.timestamp("us", "UTC")), "eo:cloud_cover": rng.uniform(0, 100, count) if name == "s2" else [None] * count,
        "sat:relative_orbit": orbit, "sat:orbit_state": ["descending"] * count, "platform": [f"{name}-a"] * count,
        "s2:processing_baseline": ["05.09"] * count, "proj:code": ["EPSG:32633"] * count,
        "assets": pa.StructArray.from_arrays([pa.array(asset(key), kind.field("assets").type.field(i).type) for i, key in enumerate(assets)], fields=list(kind.field("assets").type)),
    }  # fmt: skip
    return pa.table(
        {
            f.name: columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type)
            for f in kind
        },
        kind,
    )
