"""From finished shards to a set: parts under `_build/` → `index.parquet`, `faults.jsonl` (sites), `losses.jsonl` (dates), `manifest.json`.

A shard is finished when its part JSON exists; that file is written last, after the tar and the two part tables. The merge
reads parts only (no tar), in plan order, holds one part at a time, and gives the same bytes however often, by whomever and
in whatever company it runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import fingerprint, to_dict
from cluster.errors import RunFailure
from data_prep import index
from data_prep.config import SPLITS, BuildConfig
from data_prep.schema import SCHEMA_VERSION
from data_prep.shards import FAULTS, INDEX, LOSSES, MANIFEST, ShardWriter, statistics_splits
from data_prep.statistics import Histograms, statistics_json, statistics_sha256

PARTS = "_build"
ROW_GROUP = 8192
_READ_AHEAD = 32


def part_url(url: str, shard: str, suffix: str) -> str:
    """Where a shard's part lies; suffix: json, index.parquet or stats.parquet."""
    return storage.join(url, PARTS, f"{shard.removesuffix('.tar')}.{suffix}")


def commit_shard(
    url: str, name: str, split: str, writer: ShardWriter, sha256: str, faults: Sequence[Mapping[str, Any]], plan: str
) -> dict[str, Any]:
    """Writes the parts of a shard whose tar is in place (or that has no sample and no tar); returns the part JSON."""
    table = io.BytesIO()
    rows = index.table_of(writer.rows)
    pq.write_table(rows, table, compression="zstd")
    statistics = writer.histograms.to_bytes()
    boxes = [row["bbox"] for row in writer.rows]
    part = {
        "shard": name, "split": split, "plan": plan, "samples": len(writer.rows),
        "bytes": writer.bytes_written if writer.rows else 0, "sha256": sha256 if writer.rows else "",
        "bounds": [
            min(b["xmin"] for b in boxes), min(b["ymin"] for b in boxes), max(b["xmax"] for b in boxes), max(b["ymax"] for b in boxes)
        ] if boxes else None,
        "labels": index.label_names(rows.schema), "classes": writer.classes, "radiometry": writer.radiometry,
        "index_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
        "stats_sha256": hashlib.sha256(statistics).hexdigest(),
        "faults": list(faults), "losses": writer.losses,
    }  # fmt: skip
    storage.write_atomic(part_url(url, name, "index.parquet"), table.getvalue())
    storage.write_atomic(part_url(url, name, "stats.parquet"), statistics)
    storage.write_atomic(part_url(url, name, "json"), dump(part))
    return part


def read_part(url: str, shard: str) -> dict[str, Any] | None:
    """A shard's part JSON, or None if the shard is not finished (or its part is damaged)."""
    try:
        part = json.loads(storage.read_bytes(part_url(url, shard, "json")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return part if isinstance(part, dict) and part.get("shard") == shard else None


def merge_parts(
    url: str,
    names: Sequence[str],
    config: BuildConfig,
    plan: str,
    extra: Mapping[str, Any] | None = None,
    plan_faults: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Writes index, faults and manifest of the shards `names` (plan order) and returns the manifest.

    Args:
        config: what the shards were built with; only what shapes their bytes goes into the manifest.
        plan: fingerprint every part must carry.
        extra: further manifest entries known to the plan (split report, duplicates, …).
        plan_faults: sites that the plan refused.

    Raises:
        RunFailure: shards unfinished or of another plan, labels whose class names disagree, no sample at all.
    """
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: read_part(url, name), names))
    parts = [part for part in found if part is not None and part["plan"] == plan]
    if len(parts) < len(names):
        done = {part["shard"] for part in parts}
        missing = [name for name in names if name not in done]
        raise RunFailure(
            f"{url}: {len(missing)} of {len(names)} shards are unfinished ({', '.join(missing[:3])}…): run build again"
        )
    faults = [*plan_faults, *(fault for part in parts for fault in part["faults"])]
    storage.write_atomic(storage.join(url, FAULTS), b"".join(dump(fault) for fault in faults))
    losses = [loss for part in parts for loss in part.get("losses", [])]
    if losses:
        storage.write_atomic(storage.join(url, LOSSES), b"".join(dump(loss) for loss in losses))
    else:
        storage.remove(storage.join(url, LOSSES))
    kept = [part for part in parts if part["samples"]]
    if not kept:
        raise RunFailure(
            f"{url}: no usable sample in {len(faults)} sites; every one is named in {storage.join(url, FAULTS)}"
        )
    classes = _merge_classes(kept)
    index_sha256, index_bytes = _write_index(url, kept)
    manifest = _manifest(url, kept, config, classes) | dict(extra or {})
    manifest["index"] = {"sha256": index_sha256, "bytes": index_bytes}
    manifest["faults"] = len(faults)
    manifest["losses"] = {"dates": len(losses), "sites": len({loss["site"] for loss in losses})}
    manifest["plan"] = plan
    storage.write_atomic(storage.join(url, MANIFEST), dump(manifest, indent=1))
    return manifest


def dump(value: Any, indent: int | None = None) -> bytes:
    """Canonical JSON with a line end."""
    separators = (",", ":") if indent is None else (",", ": ")
    return (
        json.dumps(value, indent=indent, separators=separators, sort_keys=indent is not None, ensure_ascii=False) + "\n"
    ).encode()


def shaping_config(config: BuildConfig) -> dict[str, Any]:
    """The part of a build's config that shapes the bytes of a set: no paths, workers or budgets."""
    tree = to_dict(config)
    for key in ("output", "workers", "error_budget", "max_faults"):
        tree.pop(key)
    tree["source"].pop("catalog")
    return tree


def software() -> dict[str, str]:
    """Versions of what decides the bytes of a shard."""
    return {"geoloom": VERSION} | {
        name: importlib.metadata.version(name) for name in ("blosc2", "numcodecs", "pyarrow")
    }


VERSION = "0.1.0"


def _manifest(
    url: str, parts: Sequence[Mapping[str, Any]], config: BuildConfig, classes: Mapping[str, list[str]]
) -> dict[str, Any]:
    shards = [{key: part[key] for key in ("name", "split", "samples", "bytes", "sha256")} for part in _named(parts)]
    histograms, counted = Histograms(), statistics_splits(part["split"] for part in parts)
    for data in _ahead(url, [part for part in parts if part["split"] in counted], "stats.parquet"):
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


def _write_index(url: str, parts: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Streams the part tables into one file with global row numbers; returns its sha256 and bytes."""
    labels = sorted({label for part in parts for label in part["labels"]})
    bounds = [part["bounds"] for part in parts]
    west, south, east, north = zip(*bounds)
    wanted = index.with_geo_metadata(index.schema(labels), (min(west), min(south), max(east), max(north)))
    place, row, waiting = storage.join(url, INDEX), 0, []
    with storage.open_atomic(place) as stream:
        hashing = _Hashing(stream)
        with pq.ParquetWriter(pa.PythonFile(hashing, mode="w"), wanted, compression="zstd") as writer:
            for part, data in zip(parts, _ahead(url, parts, "index.parquet")):
                waiting.append(index.conform(index.read_parquet(data), wanted, row))
                row += part["samples"]
                if sum(table.num_rows for table in waiting) >= ROW_GROUP:
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


def _ahead(url: str, parts: Sequence[Mapping[str, Any]], suffix: str) -> Iterator[bytes]:
    """The bytes of each part's table, in order, checked, with a few reads in flight."""

    def read(part: Mapping[str, Any]) -> bytes:
        place = part_url(url, part["shard"], suffix)
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != part[f"{suffix.partition('.')[0]}_sha256"]:
            raise RunFailure(f"{place} is missing or damaged: run python -m data_prep verify {url} --repair")
        return data

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(parts), _READ_AHEAD):
            yield from pool.map(read, parts[start : start + _READ_AHEAD])


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
