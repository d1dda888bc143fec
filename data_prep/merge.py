"""From finished shards to a set: parts under `_build/` → `index.parquet`, `columns.safetensors`, `faults.jsonl` (sites), `losses.jsonl`
(dates), `manifest.json`.

A shard is finished when its part JSON exists, written last, after the tar and the two part tables (`data_prep.parts`). The merge
reads parts only (no tar), in plan order, holds a few at a time, and gives the same bytes however often, by whomever, in whatever
company and from whichever parts (of shards, or rolled up by slice) it runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import fingerprint, to_dict
from cluster.errors import RunFailure
from data_prep import column_file, index
from data_prep.config import SPLITS, BuildConfig
from data_prep.parts import PARTS, Bundle, commit_shard, dump, gather, part_url, read_ahead, read_part
from data_prep.schema import SCHEMA_VERSION
from data_prep.shards import FAULTS, INDEX, LOSSES, MANIFEST, ShardSet, statistics_splits
from data_prep.statistics import Histograms, statistics_json, statistics_sha256

__all__ = ["PARTS", "commit_shard", "dump", "merge_parts", "part_url", "read_part", "shaping_config", "software"]

ROW_GROUP = 8192


def merge_parts(
    url: str,
    names: Sequence[str],
    config: BuildConfig,
    plan: str,
    extra: Mapping[str, Any] | None = None,
    plan_faults: Sequence[Mapping[str, Any]] = (),
    allow_missing: bool = False,
    accepted: Collection[str] | None = None,
) -> dict[str, Any]:
    """Writes index, faults and manifest of the shards `names` (plan order) and returns the manifest.

    Args:
        config: what the shards were built with; only what shapes their bytes goes into the manifest.
        plan: fingerprint of the plan, for the manifest.
        extra: further manifest entries known to the plan (split report, duplicates, …).
        plan_faults: sites that the plan refused.
        allow_missing: close the set over the shards that are finished; the manifest names the others under "missing".
        accepted: every part must carry one of these fingerprints; None: the plan's.

    Raises:
        RunFailure: shards unfinished or of another plan, labels whose class names disagree, no sample at all.
    """
    bundles = gather(url, names, accepted if accepted is not None else (plan,))
    done = {part["shard"] for bundle in bundles for part in bundle.parts}
    missing = [name for name in names if name not in done]
    if missing and not allow_missing:
        raise RunFailure(
            f"{url}: {len(missing)} of {len(names)} shards are unfinished ({', '.join(missing[:3])}…): run build again, or merge "
            "--allow-missing to close the set without them"
        )
    faults = [*plan_faults, *(fault for bundle in bundles for part in bundle.parts for fault in part["faults"])]
    storage.write_atomic(storage.join(url, FAULTS), b"".join(dump(fault) for fault in faults))
    losses = [loss for bundle in bundles for part in bundle.parts for loss in part.get("losses", [])]
    if losses:
        storage.write_atomic(storage.join(url, LOSSES), b"".join(dump(loss) for loss in losses))
    else:
        storage.remove(storage.join(url, LOSSES))
    kept = [bundle for bundle in bundles if any(part["samples"] for part in bundle.parts)]
    if not kept:
        raise RunFailure(
            f"{url}: no usable sample in {len(faults)} sites; every one is named in {storage.join(url, FAULTS)}"
        )
    classes = _merge_classes(_filled(kept))
    index_sha256, index_bytes = _write_index(url, kept)
    manifest = _manifest(url, kept, config, classes) | dict(extra or {})
    manifest["index"] = {"sha256": index_sha256, "bytes": index_bytes}
    manifest["columns"] = column_file.write(ShardSet(url, manifest, ""))
    manifest["faults"] = len(faults)
    manifest["losses"] = {"dates": len(losses), "sites": len({loss["site"] for loss in losses})}
    skipped = sum(len(part.get("skipped", ())) for bundle in bundles for part in bundle.parts)
    if skipped:
        manifest["skipped"] = skipped
    manifest["plan"] = plan
    if missing:
        manifest["missing"] = missing
    storage.write_atomic(storage.join(url, MANIFEST), dump(manifest, indent=1))
    return manifest


def shaping_config(config: BuildConfig) -> dict[str, Any]:
    """The part of a build's config that shapes the bytes of a set: no paths, workers or budgets."""
    tree = to_dict(config)
    for key in ("output", "workers", "error_budget", "max_faults", "sites", "prepare"):
        tree.pop(key)
    for key in ("catalog", "skip"):
        tree["source"].pop(key)
    return tree


def software() -> dict[str, str]:
    """Versions of what decides the bytes of a shard."""
    return {"geoloom": VERSION} | {
        name: importlib.metadata.version(name) for name in ("blosc2", "numcodecs", "pyarrow")
    }


VERSION = "0.1.0"


def _manifest(
    url: str, bundles: Sequence[Bundle], config: BuildConfig, classes: Mapping[str, list[str]]
) -> dict[str, Any]:
    parts = _filled(bundles)
    shards = [{key: part[key] for key in ("name", "split", "samples", "bytes", "sha256")} for part in _named(parts)]
    histograms, counted = Histograms(), statistics_splits(part["split"] for part in parts)
    judged = [bundle for bundle in bundles if bundle.split in counted]
    for data in read_ahead(url, judged, "stats.parquet"):
        histograms.merge(Histograms.from_bytes(data))
    statistics = statistics_json(histograms.finish())
    radiometry: dict[str, int] = {}
    for part in parts:
        for line, count in part["radiometry"].items():
            radiometry[line] = radiometry.get(line, 0) + count
    content = "".join(f"{shard['name']} {shard['sha256']}\n" for shard in shards)
    shaping = shaping_config(config)
    return {
        "schema": SCHEMA_VERSION,
        "software": software(),
        "config": shaping,
        "config_fingerprint": fingerprint(shaping),
        "counts": {**_totals(shards), "splits": {split: _totals([s for s in shards if s["split"] == split]) for split in SPLITS}},
        "shards": shards,
        "statistics": statistics,
        "statistics_splits": list(counted),
        "statistics_sha256": statistics_sha256(statistics),
        "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "classes": classes,
        "codecs": shaping["codecs"],
        "radiometry": [{**json.loads(line), "dates": radiometry[line]} for line in sorted(radiometry)],
    }  # fmt: skip


def _filled(bundles: Sequence[Bundle]) -> list[dict[str, Any]]:
    """Parts with samples, in the order of the set."""
    return [part for bundle in bundles for part in bundle.parts if part["samples"]]


def _write_index(url: str, bundles: Sequence[Bundle]) -> tuple[str, int]:
    """Streams the part tables into one file with global row numbers; returns its sha256 and bytes. How shards are bundled does
    not show in it."""
    parts = _filled(bundles)
    labels = sorted({label for part in parts for label in part["labels"]})
    bounds = [part["bounds"] for part in parts]
    west, south, east, north = zip(*bounds)
    wanted = index.with_geo_metadata(index.schema(labels), (min(west), min(south), max(east), max(north)))
    place, row, waiting = storage.join(url, INDEX), 0, []
    with storage.open_atomic(place) as stream:
        hashing = _Hashing(stream)
        with pq.ParquetWriter(pa.PythonFile(hashing, mode="w"), wanted, compression="zstd") as writer:
            for bundle, data in zip(bundles, read_ahead(url, bundles, "index.parquet")):
                table, start = index.read_parquet(data).combine_chunks(), 0
                for part in _filled([bundle]):
                    waiting.append(index.conform(table.slice(start, part["samples"]), wanted, row))
                    start, row = start + part["samples"], row + part["samples"]
                    if sum(its.num_rows for its in waiting) >= ROW_GROUP:
                        writer.write_table(pa.concat_tables(waiting), row_group_size=1 << 30)
                        waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=1 << 30)
    return hashing.digest.hexdigest(), hashing.position


class _Hashing:
    """A write-only file that knows the sha256 and length of what passed through it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.position, self.closed = stream, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True


def _merge_classes(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Class names per label over all shards; a label may not mean two things in one set."""
    classes: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for part in parts:
        for label, names in part["classes"].items():
            if classes.setdefault(label, names) != names:
                raise RunFailure(
                    f"label {label!r} has other class names in {part['shard']} than in {owner[label]}: rename it in one of "
                    "the catalogs (property geoloom:labels), or build them as two sets"
                )
            owner.setdefault(label, part["shard"])
    return {label: classes[label] for label in sorted(classes)}


def _named(parts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield {**part, "name": part["shard"]}


def _totals(shards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "shards": len(shards),
        "samples": sum(s["samples"] for s in shards),
        "bytes": sum(s["bytes"] for s in shards),
    }
