"""Where a sample comes from, and what came of an image: the index says what was used, the set's plan which files that is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.errors import UsageError
from data_prep import planfile
from data_prep.config import BuildConfig
from data_prep.planfile import StoredPlan
from data_prep.schema import MODALITIES
from data_prep.shards import ShardSet
from data_prep.sources.records import Asset, SiteRecord

Spares = dict[str, list[tuple[Asset, ...]]]


def about(shardset: ShardSet, key: str) -> dict[str, Any]:
    """What the index says of a sample, and under `sources` the files that were planned for it.

    A source is {"modality", "item", "datetime", "product_id", "href", "used"}; used: its date is in the sample; null where the file alone
    knows its dates. Empty where the set has no plan any more (its `_build` folder is gone, or from an earlier version).

    Raises UsageError for a key that the set does not have.
    """
    row = find_row(shardset, key)
    return {**row, "sources": [*_sources(shardset.url, row)]}


def find_row(shardset: ShardSet, key: str) -> dict[str, Any]:
    """The index row of a sample. Raises UsageError for a key that the set does not have."""
    start = 0
    for batch in shardset.index_batches(["key"]):
        keys = batch["key"].to_pylist()
        if key in keys:
            return shardset.index.slice(start + keys.index(key), 1).to_pylist()[0]
        start += len(keys)
    raise UsageError(f"{shardset.url} has no sample {key!r}")


def samples_of(shardset: ShardSet, image: str) -> list[dict[str, Any]]:
    """Samples that hold an image, named by its product or by the id of its STAC item: {"key", "shard", "split"} each."""
    found: dict[str, dict[str, Any]] = {}
    for batch in shardset.index_batches(["key", "shard", "split", "product_ids"]):
        for row in batch.to_pylist():
            if image in (row.pop("product_ids") or ()):
                found[row["key"]] = row
    if found:
        return list(found.values())
    wanted = {
        record.key: name for name, record, _ in _planned(shardset.url) for a in record.assets if _item(a) == image
    }
    for batch in shardset.index_batches(["key", "shard", "split"]):
        found |= {row["key"]: row for row in batch.to_pylist() if row["key"] in wanted}
    return [
        row for row in found.values() if any(s["item"] == image and s["used"] is not False for s in _of(shardset, row))
    ]


def _of(shardset: ShardSet, row: dict[str, Any]) -> list[dict[str, Any]]:
    return about(shardset, row["key"])["sources"]


def _sources(url: str, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = next((its for its in _planned(url, row["shard"]) if its[1].key == row["key"]), None)
    if found is None:
        return
    _, record, spares = found
    products = {text for text in row["product_ids"] or () if text}
    dates = {name: set(row.get(f"{name}_datetimes") or ()) for name in MODALITIES}
    assets = [*record.assets, *(a for images in spares.values() for image in images for a in image)]
    for asset in assets:
        if asset.modality not in MODALITIES:
            used = None
        elif asset.product_id and products:
            used = asset.product_id in products and asset.datetime in ("", *dates[asset.modality])
        else:
            used = asset.datetime in dates[asset.modality] if asset.datetime else None
        yield {
            "modality": asset.modality, "item": _item(asset), "datetime": asset.datetime, "product_id": asset.product_id,
            "href": asset.href, "used": used,
        }  # fmt: skip


def _planned(url: str, shard: str = "") -> Iterator[tuple[str, SiteRecord, Spares]]:
    """(shard, record, spares) of the planned sites, of one shard or of all."""
    plan, config = planfile.read_plan(url), planfile.recorded_config(url)
    if plan is None or config is None:
        return
    for number, piece in enumerate(plan.slices):
        for index, name in enumerate(piece.names):
            if not shard or name == shard:
                yield from _records(url, plan, config, number, index)


def _records(
    url: str, plan: StoredPlan, config: BuildConfig, number: int, index: int
) -> Iterator[tuple[str, SiteRecord, Spares]]:  # fmt: skip
    planned = plan.ref(url, number, index).load(config)
    for record in planned.records:
        yield planned.name, record, planned.spares.get(record.key, {})


def _item(asset: Asset) -> str:
    return asset.id.rsplit("/", 1)[0]
