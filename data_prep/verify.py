"""Is a shard set what its manifest says? Every checksum, count and offset; and how to mend it.

Checked: the manifest's own hashes; the index's sha256, schema, row order and counts, and the sha256 of its columns; each tar's
size and sha256, its members' names, offsets, lengths and sha256 against the index; keys unique; each sample's JSON against its
index row. With `--decode` also every array's shape, and the statistics.

Mending (`--repair`) never invents pixels. A tar that is intact (its sha256 is the committed one, or, where every record of it
is lost, it can be read to its end and every member decodes) keeps its samples: lost parts, index and manifest are made again
from it. A tar that is damaged or cut is moved to `_build/quarantine/`, its part is dropped, and the set is closed over the
rest; `python -m data_prep build` with the same config then makes the missing shard again, with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.errors import UsageError
from data_prep import column_file
from data_prep.codec import MemberError
from data_prep.config import SPLITS
from data_prep.executors import Executor, run_units
from data_prep.index import read_parquet, row_of, schema
from data_prep.sample import decode_members, load_json
from data_prep.shards import INDEX, MANIFEST, ShardSet
from data_prep.statistics import Histograms, statistics_json, statistics_sha256
from data_prep.tar import samples

COMPARED = ("offset", "length", "split", "cell", "crs", "footprint", "modalities")
COLUMNS = [*COMPARED, "key", "shard", "row", "members"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: which file (and sample), and what."""

    file: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


@dataclass(frozen=True)
class ShardJob:
    """One tar to check; crosses to a worker. entry: the manifest's; rows: of the index, as an Arrow stream; None: it is unreadable."""

    number: int
    url: str
    entry: dict[str, Any]
    rows: bytes | None
    decode: bool


class _Jobs(Sequence[ShardJob]):
    """The tars of a set; a job takes its rows of the index only when it is asked for."""

    def __init__(self, shards: ShardSet, slices: dict[str, pa.Table], decode: bool) -> None:
        self._shards, self._slices, self._decode = shards, slices, decode

    def __len__(self) -> int:
        return len(self._shards.manifest["shards"])

    def __getitem__(self, number: Any) -> Any:
        entry = self._shards.manifest["shards"][number]
        table, rows = self._slices.get(entry["name"]), None
        if table is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            rows = sink.getvalue().to_pybytes()
        return ShardJob(number, self._shards.shard_url(entry["name"]), entry, rows, self._decode)


def verify(
    url: str, decode: bool = False, on_shard: Callable[[str], None] | None = None, executor: Executor | None = None
) -> list[Fault]:
    """Every fault of a shard set, in a fixed order; empty = sound.

    executor: who checks the tars; None or local: two threads of this process.

    Raises UsageError if `url` is no shard set at all (neither manifest nor tars).
    """
    names = storage.list_names(url)
    if MANIFEST not in names:
        if not any(name.endswith(".tar") for name in names):
            raise UsageError(
                f"{url} is not a shard set: no {MANIFEST} and no tars; make one with python -m data_prep build"
            )
        return [Fault(MANIFEST, "is missing")]
    try:
        shards = ShardSet.open(url)
    except UsageError as error:
        return [Fault(MANIFEST, str(error))]
    faults = list(_manifest_faults(shards))
    entries = shards.manifest["shards"]
    listed = [shard["name"] for shard in entries]
    known = set(listed)
    faults += [
        Fault(name, "is not listed in the manifest") for name in names if name.endswith(".tar") and name not in known
    ]
    slices, index_faults = _index_slices(shards)
    faults += [*index_faults, *_columns_faults(shards)]
    histograms, of_shard = Histograms(), dict[int, list[Fault]]()
    # sets from before statistics were of train alone do not say
    counted_splits = shards.manifest.get("statistics_splits", SPLITS)
    for number, found, counted in _checked(_Jobs(shards, slices, decode), listed, executor or Executor()):
        of_shard[number] = found
        if entries[number]["split"] in counted_splits:
            histograms.merge(counted)
        if on_shard:
            on_shard(listed[number])
    faults += [fault for number in sorted(of_shard) for fault in of_shard[number]]
    if decode and not faults and statistics_json(histograms.finish()) != shards.manifest["statistics"]:
        faults.append(Fault(MANIFEST, "statistics are not those of the pixels"))
    return faults


def _checked(jobs: _Jobs, names: list[str], executor: Executor) -> Iterator[tuple[int, list[Fault], Histograms]]:
    """(number, faults, counts of pixels) of every tar, in no order."""
    if executor.kind != "local":
        yield from run_units(check_shard, jobs, names, executor, lambda _: None)
        return
    with ThreadPoolExecutor(2) as pool:  # hashing lets go of the GIL
        yield from pool.map(lambda number: check_shard(jobs[number], lambda _: None), range(len(jobs)))


def check_shard(job: ShardJob, report: Callable[[Any], None]) -> tuple[int, list[Fault], Histograms]:
    """(number, faults of one tar against its manifest entry and index rows, counts of its pixels)."""
    entry, histograms = job.entry, Histograms()
    name = entry["name"]
    rows = None if job.rows is None else pa.ipc.open_stream(job.rows).read_all().to_pylist()
    try:
        stream = storage.open_read(job.url)
    except OSError:
        return job.number, [Fault(name, "is missing")], histograms
    faults: list[Fault] = []
    with stream:
        reading = HashingReader(stream)
        count = 0
        try:
            for number, (key, entries, data) in enumerate(samples(reading)):
                count += 1
                found = {e.name.partition(".")[2]: (e.offset, e.length, e.sha256) for e in entries}
                if rows is not None:
                    row = rows[number] if number < len(rows) else None
                    faults += [Fault(name, f"{key}: {why}") for why in _sample_faults(key, entries, data, row)]
                if job.decode:
                    site, _ = decode_members(data.__getitem__, list(found))
                    histograms.add(site)
        except MemberError as error:
            faults.append(Fault(name, f"{key}: {error}"))
        except ValueError as error:
            faults.append(Fault(name, str(error)))
        reading.drain()
    if reading.position != entry["bytes"]:
        faults.append(Fault(name, f"has {reading.position} bytes, the manifest says {entry['bytes']}"))
    elif reading.digest.hexdigest() != entry["sha256"]:
        faults.append(Fault(name, "sha256 is not the manifest's"))
    if count != entry["samples"]:
        faults.append(Fault(name, f"holds {count} samples, the manifest says {entry['samples']}"))
    return job.number, faults, histograms


class HashingReader:
    """A forward-only stream that keeps the sha256 and length of all it has read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.position = stream, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def drain(self) -> None:
        while self.read(8 << 20):
            pass


def _manifest_faults(shards: ShardSet) -> Iterator[Fault]:
    manifest = shards.manifest
    try:
        entries = manifest["shards"]
        content = "".join(f"{shard['name']} {shard['sha256']}\n" for shard in entries)
        if hashlib.sha256(content.encode()).hexdigest() != manifest["content_sha256"]:
            yield Fault(MANIFEST, "content_sha256 is not that of the listed shards")
        if statistics_sha256(manifest["statistics"]) != manifest["statistics_sha256"]:
            yield Fault(MANIFEST, "statistics_sha256 is not that of the statistics")
        for key in ("samples", "bytes"):
            if sum(shard[key] for shard in entries) != manifest["counts"][key]:
                yield Fault(MANIFEST, f"counts.{key} is not the sum over the shards")
        if len(entries) != manifest["counts"]["shards"]:
            yield Fault(MANIFEST, "counts.shards is not the number of shards listed")
    except (KeyError, TypeError) as error:
        yield Fault(MANIFEST, f"lacks or mistypes {error}")


def _index_slices(shards: ShardSet) -> tuple[dict[str, pa.Table], list[Fault]]:
    """Per shard its rows of the index (empty dict: unreadable), and the faults of the index as a whole."""
    try:
        data = storage.read_bytes(storage.join(shards.url, INDEX))
    except OSError:
        return {}, [Fault(INDEX, "is missing")]
    faults = []
    if hashlib.sha256(data).hexdigest() != shards.manifest.get("index", {}).get("sha256"):
        faults.append(Fault(INDEX, "sha256 is not the manifest's"))
    wanted = schema()
    try:
        table = read_parquet(data, COLUMNS)
        if any(table.schema.field(name).type != wanted.field(name).type for name in COLUMNS):
            return {}, [*faults, Fault(INDEX, "columns have other types than this version writes")]
    except (KeyError, ValueError, OSError) as error:
        return {}, [*faults, Fault(INDEX, f"cannot be read: {error}")]
    if not np.array_equal(np.asarray(table["row"]), np.arange(table.num_rows)):
        faults.append(Fault(INDEX, "rows are not numbered 0, 1, 2, …"))
    counts = pc.value_counts(table["key"].combine_chunks())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    faults += [Fault(INDEX, f"key {entry['values']} stands {entry['counts']} times") for entry in repeated.to_pylist()]
    expected = shards.manifest["counts"]["samples"]
    if table.num_rows != expected:
        faults.append(Fault(INDEX, f"has {table.num_rows} rows, the manifest says {expected}"))
    slices, start = {}, 0
    for shard in shards.manifest["shards"]:
        rows = table.slice(start, shard["samples"])
        start += shard["samples"]
        if pc.any(pc.not_equal(rows["shard"], shard["name"])).as_py() or rows.num_rows != shard["samples"]:
            faults.append(
                Fault(INDEX, f"rows {start - shard['samples']} to {start - 1} are not those of {shard['name']}")
            )
            rows = table.filter(pc.equal(table["shard"], shard["name"]))
        slices[shard["name"]] = rows
    return slices, faults


def _columns_faults(shards: ShardSet) -> Iterator[Fault]:
    """The index in the form the reader maps, byte by byte against the manifest; sets of older builds have none."""
    entry = shards.manifest.get("columns")
    if entry is None:
        return
    try:
        with storage.open_read(storage.join(shards.url, column_file.COLUMNS)) as stream:
            reading = HashingReader(stream)
            reading.drain()
    except OSError:
        yield Fault(column_file.COLUMNS, "is missing")
        return
    if (reading.position, reading.digest.hexdigest()) != (entry["bytes"], entry["sha256"]):
        yield Fault(column_file.COLUMNS, "sha256 is not the manifest's")


def _sample_faults(key: str, entries: list[Any], data: dict[str, bytes], row: dict[str, Any] | None) -> Iterator[str]:
    if row is None:
        yield "is not in the index"
        return
    if row["key"] != key:
        yield f"the index has {row['key']} in this place"
        return
    try:
        info = load_json(data.get("json", b""))
    except MemberError as error:
        yield f"json: {error}"
        return
    if next(iter(data)) != "json" or info["key"] != key:
        yield "its JSON is not the first member or names another key"
    listed = {m["name"]: (m["offset"], m["length"], m["sha256"]) for m in row["members"]}
    found = {e.name.partition(".")[2]: (e.offset, e.length, e.sha256) for e in entries}
    for suffix in sorted({*listed, *found}):
        if suffix not in found:
            yield f"member {suffix} is missing"
        elif suffix not in listed:
            yield f"member {suffix} is not in the index"
        elif listed[suffix][:2] != found[suffix][:2]:
            yield f"member {suffix} lies elsewhere than the index says"
        elif listed[suffix][2] != found[suffix][2]:
            yield f"member {suffix} does not match its checksum"
    try:
        again = row_of(info, None, row["shard"], entries)
    except (KeyError, ValueError, TypeError) as error:
        yield f"its JSON lacks or mistypes {error}"
        return
    for column in COMPARED:
        if again[column] != row[column]:
            yield f"{column} in the index is not the sample's"
