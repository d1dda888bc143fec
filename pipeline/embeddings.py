"""Embeddings of a whole shard set, or of a row of `evaluate`, as GeoParquet: one line per site or image, with its place where it has one.

Columns: `key`, `split`, `geometry` (WKB, longitude and latitude; null where the pixels say no place), `bbox`, `datetime` (shard sets),
`label` (rows of single labels), `label_*` (shard sets), `view` (pairs: before, after), and per modality of the model and for `fused` a
list of D floats: the mean over valid tokens and dates (or mean and standard deviation side by side), null where nothing is valid. The file's metadata
hold the checkpoint under `geoloom`. Written chunk by chunk: memory does not grow with the set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import torch

from cluster import storage
from cluster.progress import progress
from data_prep.geo import bbox_wgs84
from data_prep.index import LABEL_PREFIX, geometry_wkb, with_geo_metadata
from data_prep.shards import ShardSet
from model.pretrained import Pretrained
from pipeline.config import ViewConfig
from pipeline.evaluate.encode import batches
from pipeline.evaluate.frozen import BATCH, check_pixels
from pipeline.evaluate.items import Footprint
from pipeline.evaluate.registry import Row
from pipeline.probes.features import FUSED, SiteFeatures, extract, network
from pipeline.probes.sites import whole_view

CHUNK = 512  # sites in memory, and in a row group
BBOX = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
Chunk = tuple[dict[str, list[Any]], SiteFeatures]


def embed_shards(
    model: Pretrained, shardset: ShardSet, out: str, trained: ViewConfig, pool: str = "mean", stage: str | int = "last"
) -> int:
    """Every site of a shard set, whole, with all its dates (as probes see it; trained: the training view, for the scale of hr).
    Returns how many."""
    copied = [name for name in shardset.index_columns() if name.startswith(LABEL_PREFIX)]
    table = shardset.read_index(["key", "split", "place", "geometry", "bbox", "datetime", *copied])
    rows = range(table.num_rows)
    view = whole_view(shardset, rows, trained)

    def chunks() -> Iterator[Chunk]:
        with progress(len(rows), "embed") as bar:
            for start in range(0, len(rows), CHUNK):
                picked = rows[start : start + CHUNK]
                part = table.take(list(picked)).to_pylist()
                told = {name: [one[name] for one in part] for name in ("key", "split", "datetime", *copied)}
                for name in ("geometry", "bbox"):
                    told[name] = [None if one["place"] == "none" else one[name] for one in part]
                (features,) = extract(
                    [network(model.skysense, pool, stage)], model.cfg.modalities, shardset.read_sample, picked, view,
                    model.statistics, advance=bar.advance,
                )  # fmt: skip
                yield told, features

    columns = [("key", pa.string()), ("split", pa.string()), ("datetime", pa.timestamp("us", tz="UTC"))]
    columns += [(name, pa.int32()) for name in copied]
    return write(out, columns, chunks(), {**facts_of(model), "data": shardset.url, "pool": pool, "stage": stage})


def embed_row(model: Pretrained, row: Row, root: str, out: str, pool: str = "mean", stage: str | int = "last") -> int:
    """Every image of a published data set; of pairs both dates, one line each. Returns how many lines.

    Raises:
        UsageError: bad files, or pixels that contradict what the row declares; nothing is written then.
    """
    labelled = row.read(root, row)
    check_pixels(row, labelled.items)
    describe, names = network(model.skysense, pool, stage), ("before", "after") if row.kind == "pair" else ("",)

    def chunks() -> Iterator[Chunk]:
        at = 0
        with torch.no_grad(), progress(len(labelled.items), f"embed {row.name}") as bar:
            for batch in batches(model, row, labelled.items, BATCH[row.kind]):
                items = labelled.items[at : at + len(batch.samples)]
                at += len(items)
                places = [_place(sample.footprint) for sample in batch.samples]
                for name, view in zip(names, batch.views):
                    told: dict[str, list[Any]] = {
                        "key": [item.key for item in items], "split": [item.split for item in items],
                        "label": [item.label if row.kind in ("class", "labels") else None for item in items],
                        "view": [name or None] * len(items), "geometry": [wkb for wkb, _ in places], "bbox": [box for _, box in places],
                    }  # fmt: skip
                    yield told, SiteFeatures.of(describe(view, None, 0))
                bar.advance(len(items))

    columns = [(name, pa.string()) for name in ("key", "split", "label", "view")]
    facts = {"task": row.name, "split": labelled.digest, "bands": [bands.describe() for bands in row.bands]}
    return write(out, columns, chunks(), {**facts_of(model), **facts, "pool": pool, "stage": stage})


def facts_of(model: Pretrained) -> dict[str, Any]:
    """Where the weights come from."""
    return {name: value for name, value in model.facts.items() if name != "run_config"}


def write(
    out: str, columns: Sequence[tuple[str, pa.DataType]], chunks: Iterator[Chunk], facts: Mapping[str, Any]
) -> int:
    """Writes the file whole or not at all; returns its lines."""
    first = next(chunks)
    names = list(first[1].pooled)
    fields = [*columns, ("geometry", pa.binary()), ("bbox", BBOX)]
    fields += [(name, pa.list_(pa.float32())) for name in (*(n for n in names if n != FUSED), FUSED)]
    plain = with_geo_metadata(pa.schema(fields), None)
    schema = plain.with_metadata({
        b"geo": _any_geometry(plain.metadata[b"geo"]), b"geoloom": json.dumps(dict(facts), default=str).encode()
    })  # fmt: skip
    lines = 0
    with storage.open_atomic(out) as stream, pq.ParquetWriter(stream, schema) as writer:
        for told, features in _with_first(first, chunks):
            arrays = [pa.array(told[name], kind) if name in told else _vectors(features, name) for name, kind in fields]
            writer.write_table(pa.table(arrays, schema))
            lines += len(told["key"])
    return lines


def _with_first(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest


def _any_geometry(geo: bytes) -> bytes:
    """Points too: of some sets only the centre is published."""
    told = json.loads(geo)
    told["columns"]["geometry"]["geometry_types"] = ["Polygon", "MultiPolygon", "Point"]
    return json.dumps(told).encode()


def _vectors(features: SiteFeatures, name: str) -> pa.Array:
    """Lists of one length, or null. (Of Arrow's fixed-size lists a null one cannot be read back from Parquet.)"""
    x_ND, present_N = features.pooled[name].float().numpy(), features.present[name].numpy()
    offsets = np.concatenate([[0], np.cumsum(present_N * x_ND.shape[1])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(x_ND[present_N].ravel()), mask=pa.array(~present_N))


def _place(footprint: Footprint | None) -> tuple[bytes | None, dict[str, float] | None]:
    """WKB and bounding box in longitude and latitude; a point where west is east and south is north."""
    if footprint is None:
        return None, None
    crs, bounds = footprint
    west, south, east, north = bbox_wgs84(crs, bounds)
    box = {"xmin": west, "ymin": south, "xmax": east, "ymax": north}
    if bounds[0] == bounds[2] and bounds[1] == bounds[3]:
        return shapely.to_wkb(shapely.Point(west, south), byte_order=1), box
    return geometry_wkb(crs, bounds, (west, south, east, north)), box
