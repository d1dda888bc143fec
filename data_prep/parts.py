"""What finished work leaves under `_build/` until the merge: a part per shard, one per slice once all its shards are finished.

A part is a JSON, written last, with an index table and the statistics beside it. When every shard of a slice is finished their parts
are rolled up into `slice-NNNNNN`, with one sum of statistics, and removed: a set of 50,000 shards is merged from 1,600 parts.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import RunFailure
from data_prep import index
from data_prep.shards import ShardWriter
from data_prep.statistics import Histograms

PARTS = "_build"
SUFFIXES = (
    "json",
    "index.parquet",
    "stats.parquet",
)  # the JSON first: where it is gone, nothing vouches for the others
_READ_AHEAD = 32


def part_url(url: str, shard: str, suffix: str) -> str:
    """Where a part lies. shard: a shard's name or `slice_name`; suffix: json, index.parquet or stats.parquet."""
    return storage.join(url, PARTS, f"{shard.removesuffix('.tar')}.{suffix}")


def slice_name(number: int) -> str:
    return f"slice-{number:06d}"


def commit_shard(
    url: str, name: str, split: str, writer: ShardWriter, sha256: str, faults: Sequence[Mapping[str, Any]], plan: str,
    skipped: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Writes the parts of a shard whose tar is in place (or that has no sample and no tar); returns the part JSON."""
    table, statistics = table_bytes(index.table_of(writer.rows)), writer.histograms.to_bytes()
    part = {
        **facts_of(name, split, writer, sha256, faults, plan, skipped),
        "index_sha256": hashlib.sha256(table).hexdigest(), "stats_sha256": hashlib.sha256(statistics).hexdigest(),
    }  # fmt: skip
    storage.write_atomic(part_url(url, name, "index.parquet"), table)
    storage.write_atomic(part_url(url, name, "stats.parquet"), statistics)
    storage.write_atomic(part_url(url, name, "json"), dump(part))
    return part


def facts_of(
    name: str, split: str, writer: ShardWriter, sha256: str, faults: Sequence[Mapping[str, Any]], plan: str,
    skipped: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What a part says of a shard, its tables apart. skipped: keys of the plan that were left out on purpose."""
    boxes = [row["bbox"] for row in writer.rows]
    return {
        "shard": name, "split": split, "plan": plan, "samples": len(writer.rows),
        "bytes": writer.bytes_written if writer.rows else 0, "sha256": sha256 if writer.rows else "",
        "bounds": [
            min(b["xmin"] for b in boxes), min(b["ymin"] for b in boxes), max(b["xmax"] for b in boxes), max(b["ymax"] for b in boxes)
        ] if boxes else None,
        "labels": index.labels_of(writer.rows), "classes": writer.classes, "radiometry": writer.radiometry,
        "faults": list(faults), "losses": writer.losses, **({"skipped": list(skipped)} if skipped else {}),
    }  # fmt: skip


def table_bytes(table: pa.Table) -> bytes:
    """An index table as a part holds it."""
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return stream.getvalue()


def read_part(url: str, shard: str) -> dict[str, Any] | None:
    """A shard's own part JSON, or None if the shard is not finished, rolled up, or its part is damaged."""
    found = _json(part_url(url, shard, "json"))
    return found if found.get("shard") == shard else None


def read_slice(url: str, number: int) -> dict[str, Any] | None:
    """A rolled-up slice's JSON, or None if it is absent or damaged."""
    found = _json(part_url(url, slice_name(number), "json"))
    return found if found.get("slice") == number else None


def unroll(url: str, number: int) -> None:
    """Takes a slice's common part away. Its shards count as unfinished until their tars are read, or made, again."""
    for suffix in SUFFIXES:
        storage.remove(part_url(url, slice_name(number), suffix))


@dataclass(frozen=True)
class State:
    """What an output holds, by two listings. plans: fingerprints that its parts may carry; sizes: of the tars; names: of the parts."""

    url: str
    plans: frozenset[str]
    sizes: Mapping[str, int]
    names: frozenset[str]

    @staticmethod
    def look(url: str, plans: Iterable[str]) -> State:
        names = frozenset(storage.list_names(storage.join(url, PARTS)))
        return State(url, frozenset(plans), storage.list_sizes(url), names)

    def is_rolled(self, number: int) -> bool:
        return f"{slice_name(number)}.json" in self.names

    def has(self, shard: str) -> bool:
        """Whether a shard has a part of its own."""
        return f"{shard.removesuffix('.tar')}.json" in self.names

    def parts_of(self, number: int, shards: Sequence[str]) -> list[dict[str, Any] | None]:
        """Of every shard of a slice its part if it is committed and its tar has the committed size, else None."""
        found: dict[str, Any] = {}
        if self.is_rolled(number):
            found = {part["shard"]: part for part in (read_slice(self.url, number) or {"parts": []})["parts"]}
        for name in shards:
            if name not in found and self.has(name):
                found[name] = read_part(self.url, name)
        return [part if part is not None and self._stands(part) else None for part in map(found.get, shards)]

    def part(self, shard: str, number: int) -> dict[str, Any] | None:
        """A finished shard's part, else None."""
        return self.parts_of(number, [shard])[0]

    def is_complete(self, number: int, shards: Sequence[str]) -> bool:
        """Whether a slice is rolled up, or every shard of it has its part."""
        return self.is_rolled(number) or all(map(self.has, shards))

    def complete(self, slices: Sequence[Sequence[str]]) -> bool:
        return all(self.is_complete(number, shards) for number, shards in enumerate(slices))

    def roll_up(self, number: int, shards: Sequence[str]) -> None:
        """One part instead of those of a slice's shards, if there are several and all are finished."""
        if len(shards) < 2 or self.is_rolled(number) or not self.is_complete(number, shards):
            return
        whole = [
            part for name in shards if (part := read_part(self.url, name)) is not None and part["plan"] in self.plans
        ]
        if len(whole) < len(shards):
            return
        histograms, tables = Histograms(), []
        for part in whole:
            histograms.merge(Histograms.from_bytes(checked(self.url, part["shard"], part, "stats.parquet")))
            tables.append(index.read_parquet(checked(self.url, part["shard"], part, "index.parquet")))
        wanted = index.schema(sorted({label for part in whole for label in part["labels"]}))
        joined = table_bytes(pa.concat_tables([index.conform(table, wanted, 0) for table in tables]))
        statistics, name = histograms.to_bytes(), slice_name(number)
        done = {
            "slice": number, "plan": whole[0]["plan"], "parts": whole,
            "index_sha256": hashlib.sha256(joined).hexdigest(), "stats_sha256": hashlib.sha256(statistics).hexdigest(),
        }  # fmt: skip
        storage.write_atomic(part_url(self.url, name, "index.parquet"), joined)
        storage.write_atomic(part_url(self.url, name, "stats.parquet"), statistics)
        storage.write_atomic(part_url(self.url, name, "json"), dump(done))
        for shard in shards:
            for suffix in SUFFIXES:
                storage.remove(part_url(self.url, shard, suffix))

    def _stands(self, part: Mapping[str, Any]) -> bool:
        return part["plan"] in self.plans and (part["samples"] == 0 or self.sizes.get(part["shard"]) == part["bytes"])


@dataclass(frozen=True)
class Bundle:
    """Parts that share one index table and one statistics file: a rolled-up slice's (whose shards are of one split), or one shard's."""

    name: str
    parts: tuple[dict[str, Any], ...]
    hashes: Mapping[str, Any]

    @property
    def split(self) -> str:
        return str(self.parts[0]["split"])


def gather(url: str, names: Sequence[str], plans: Collection[str]) -> list[Bundle]:
    """The parts of the shards `names`, in that order; those that are unfinished are left out. One listing, one read per bundle."""
    listed = storage.list_names(storage.join(url, PARTS))
    numbers = [int(name[6:12]) for name in listed if name.startswith("slice-") and name.endswith(".json")]
    own = frozenset(listed)
    with ThreadPoolExecutor(8) as pool:
        rolled = [
            entry
            for entry in pool.map(lambda n: read_slice(url, n), numbers)
            if entry is not None and entry["plan"] in plans
        ]
        held = {part["shard"]: entry for entry in rolled for part in entry["parts"]}
        single = [name for name in names if name not in held and f"{name.removesuffix('.tar')}.json" in own]
        parts = {
            part["shard"]: part for part in pool.map(lambda name: read_part(url, name), single) if part is not None
        }
    bundles: list[Bundle] = []
    seen: set[int] = set()
    for name in names:
        entry = held.get(name)
        if entry is None:
            part = parts.get(name)
            if part is not None and part["plan"] in plans:
                bundles.append(Bundle(name, (part,), part))
        elif entry["slice"] not in seen:
            seen.add(entry["slice"])
            bundles.append(Bundle(slice_name(entry["slice"]), tuple(entry["parts"]), entry))
    return bundles


def read_ahead(url: str, bundles: Sequence[Bundle], suffix: str) -> Iterator[bytes]:
    """The bytes of each bundle's table, in order, checked, with a few reads in flight."""
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(bundles), _READ_AHEAD):
            yield from pool.map(lambda b: checked(url, b.name, b.hashes, suffix), bundles[start : start + _READ_AHEAD])


def checked(url: str, name: str, hashes: Mapping[str, Any], suffix: str) -> bytes:
    """The bytes of a part's table. Raises RunFailure unless their sha256 is the one in its JSON."""
    place = part_url(url, name, suffix)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != hashes[f"{suffix.partition('.')[0]}_sha256"]:
        raise RunFailure(f"{place} is missing or damaged: run python -m data_prep verify {url} --repair")
    return data


def dump(value: Any, indent: int | None = None) -> bytes:
    """Canonical JSON with a line end."""
    separators = (",", ":") if indent is None else (",", ": ")
    return (
        json.dumps(value, indent=indent, separators=separators, sort_keys=indent is not None, ensure_ascii=False) + "\n"
    ).encode()


def _json(place: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(place))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
