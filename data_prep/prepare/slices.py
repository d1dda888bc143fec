"""The prepared plan as files: one slice is read by number, and holds all that a task needs.

URL/plan.json               what it was prepared with; another config or sites file is refused
URL/NNNNNN.sites.parquet    the slice's sites: place, split, and per sensor rows of its table: chosen dates, spares; why one is left out
URL/NNNNNN.SENSOR.parquet   the items that a site of the slice chose or keeps as a spare, each once
URL/NNNNNN.json             written last: counts and checksums of the slice
URL/prepared.json           all slices, when every one is there
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep.prepare.choose import Choice, Image
from data_prep.prepare.items import read_item
from data_prep.schema import MODALITIES
from data_prep.sources.records import MASKS, Asset, SiteRecord
from data_prep.sources.stac import item_assets

PLAN, PREPARED = "plan.json", "prepared.json"
_IMAGES = pa.list_(pa.list_(pa.int32()))
PLACE = ("key", "cell", "split", "crs", "footprint", "bbox", "stratum")


def slice_url(url: str, number: int, part: str) -> str:
    """part: sites.parquet, SENSOR.parquet or json."""
    return storage.join(url, f"{number:06d}.{part}")


def write_slice(
    url: str, number: int, sites: pa.Table, why: Sequence[str], choices: Mapping[str, Choice], items: Mapping[str, pa.Table],
    folders: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Writes a slice, its JSON last, and returns that. sites: rows of the sites file; why: "" or why a site is left out."""
    columns: dict[str, Any] = {name: sites[name] for name in PLACE}
    columns["why"] = pa.array(why, pa.string())
    hashes, used = {}, {}
    for name, choice in choices.items():
        kept = [(its, more) if not reason else ([], []) for its, more, reason in zip(choice.images, choice.spares, why)]
        rows = sorted({row for its, more in kept for image in (*its, *more) for row in image})
        place = {row: i for i, row in enumerate(rows)}
        columns[f"{name}_dates"] = pa.array([len(its) for its, _ in kept], pa.int32())
        columns[f"{name}_images"] = _renumbered([its for its, _ in kept], place)
        columns[f"{name}_spares"] = _renumbered([more for _, more in kept], place)
        table = (
            items[name].take(pa.array(rows, pa.int64())).replace_schema_metadata({b"folder": folders[name].encode()})
        )
        hashes[name] = _write(slice_url(url, number, f"{name}.parquet"), table)
        used[name] = {"items": len(rows), "dates": sum(len(its) for its, _ in kept), "found": items[name].num_rows}
    hashes["sites"] = _write(slice_url(url, number, "sites.parquet"), pa.table(columns))
    reasons: dict[str, int] = {}
    for reason in why:
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    done = {
        "slice": number, "sites": sum(not reason for reason in why), "left_out": dict(sorted(reasons.items())), "sensors": used, "sha256": hashes,
    }  # fmt: skip
    storage.write_atomic(slice_url(url, number, "json"), (json.dumps(done, separators=(",", ":")) + "\n").encode())
    return done


def read_prepared(url: str) -> dict[str, Any]:
    """`prepared.json`: {"fingerprint", "slices": [the slices' JSON]}. Raises UsageError: absent, unfinished or damaged."""
    try:
        return json.loads(storage.read_bytes(storage.join(url, PREPARED)))
    except (FileNotFoundError, NotADirectoryError):
        state = "is not finished" if storage.exists(storage.join(url, PLAN)) else "holds no prepared plan"
        raise UsageError(f"{url} {state}: run python -m data_prep prepare with the same config") from None
    except ValueError:
        raise UsageError(f"{storage.join(url, PREPARED)} is damaged: run python -m data_prep prepare again") from None


def read_places(url: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """A slice's sites that are not left out; some columns (and `why`), or all."""
    table = _read(slice_url(url, number, "sites.parquet"), columns and [*columns, "why"])
    return table.filter(pc.equal(table["why"], ""))


class SliceItems:
    """The items of a slice as assets, each parsed once whatever number of sites share it."""

    def __init__(self, url: str, number: int, sensors: Sequence[str]) -> None:
        """Raises RunFailure: a file is gone or damaged."""
        self._tables = {name: _read(slice_url(url, number, f"{name}.parquet")) for name in sensors}
        self._assets = functools.lru_cache(maxsize=None)(self._parsed)

    def image(self, sensor: str, rows: Sequence[int]) -> tuple[Asset, ...]:
        """Assets of one date (one overpass): its images and their masks."""
        return tuple(asset for row in rows for asset in self._assets(sensor, row))

    def _parsed(self, sensor: str, row: int) -> tuple[Asset, ...]:
        table = self._tables[sensor]
        folder = (table.schema.metadata or {}).get(b"folder", b"").decode()
        found = item_assets(read_item(table, row, folder))
        wanted = {
            sensor,
            *(MASKS if MODALITIES[sensor].kind == "reflectance" else ()),
        }  # mask rasters go with their image
        return tuple(asset for asset in found if asset.modality in wanted)


def site_of(
    row: Mapping[str, Any], items: SliceItems, sensors: Sequence[str]
) -> tuple[SiteRecord, dict[str, list[tuple[Asset, ...]]]]:
    """(the record of a prepared site, per sensor its spare dates in order of rank)."""
    images = {name: [items.image(name, rows) for rows in row[f"{name}_images"]] for name in sensors}
    spares = {name: [items.image(name, rows) for rows in row[f"{name}_spares"]] for name in sensors}
    box = row["bbox"]
    record = SiteRecord(
        row["key"],
        row["cell"],
        row["crs"],
        tuple(row["footprint"]),
        (box["xmin"], box["ymin"], box["xmax"], box["ymax"]),
        (),
    )
    return with_images(record, images), {name: its for name, its in spares.items() if its}


def with_images(record: SiteRecord, images: Mapping[str, Sequence[tuple[Asset, ...]]]) -> SiteRecord:
    """The record with these dates (per sensor, in order of time) and nothing else."""
    import dataclasses

    assets = tuple(asset for name in MODALITIES for image in images.get(name, ()) for asset in image)
    return dataclasses.replace(
        record, assets=assets,
        datetimes=tuple(sorted({a.datetime for a in assets if a.datetime})),
        product_ids=tuple(dict.fromkeys(a.product_id for a in assets if a.product_id)),
    )  # fmt: skip


def _renumbered(images: Sequence[Sequence[Image]], place: Mapping[int, int]) -> pa.Array:
    return pa.array([[[place[row] for row in image] for image in own] for own in images], _IMAGES)


def _write(url: str, table: pa.Table) -> str:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.write_atomic(url, stream.getvalue())
    return hashlib.sha256(stream.getvalue()).hexdigest()


def _read(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(pa.BufferReader(storage.read_bytes(url))).read(columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise RunFailure(f"{url} cannot be read ({error}): run python -m data_prep prepare again") from None
