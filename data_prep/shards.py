"""A shard set: tars + `index.parquet` + `manifest.json` in one folder. Writing one shard, opening a finished set.

manifest.json   schema, software, config, config_fingerprint, counts, shards [{name, split, samples, bytes, sha256}], index
                {sha256, bytes}, columns {bytes, header_sha256, sha256}, statistics (of train), statistics_sha256,
                content_sha256, classes, codecs, radiometry, splits (overlap report), faults. Deterministic: no clocks, no host names, no paths.
index.parquet   see `data_prep.index`. It is read only after its sha256 has proven to be the manifest's.
columns.safetensors   the same in the form that the reader maps, see `data_prep.columns`; older sets have none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from data_prep.codec import MemberError
from data_prep.config import SPLITS, CodecsConfig
from data_prep.index import read_batches, row_of
from data_prep.sample import SampleError, check_site, decode_members, encode_members, load_json
from data_prep.schema import CLEAR, CLOUD, SCHEMA_VERSION, BandStatistics, SiteArrays
from data_prep.statistics import Histograms, statistics_from_json
from data_prep.tar import TarWriter, Writable

MANIFEST, INDEX, FAULTS, LOSSES = "manifest.json", "index.parquet", "faults.jsonl", "losses.jsonl"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


class ShardWriter:
    """Turns sites into one tar, its index rows and its statistics."""

    def __init__(self, stream: Writable, name: str, split: str, codecs: CodecsConfig) -> None:
        self._tar, self._name, self._split, self._codecs = TarWriter(stream), name, split, codecs
        self.bytes_written = 0
        self.rows: list[dict[str, Any]] = []
        self.labels: set[str] = set()
        self.histograms = Histograms()
        self.classes: dict[str, list[str]] = {}
        self.radiometry: dict[str, int] = {}
        self.losses: list[dict[str, str]] = []

    def encode(self, site: SiteArrays) -> list[tuple[str, bytes]]:
        """Checks a site and encodes its members. Raises SampleError; nothing is written yet."""
        check_site(site)
        for label, names in site.classes.items():
            if self.classes.get(label, names) != names:
                raise SampleError(f"label {label}", f"has other class names than earlier sites: {', '.join(names)}")
        return list(encode_members(site, self._split, self._codecs))

    def add(self, site: SiteArrays, members: list[tuple[str, bytes]]) -> None:
        """Appends a site whose members `encode` has made."""
        entries = [self._tar.add(f"{site.key}.{suffix}", data) for suffix, data in members]
        info = load_json(members[0][1])
        self.rows.append(row_of(info, cloud_share(site), self._name, entries))
        self.labels |= {*info["scalars"], *info["labels"]}
        self.histograms.add(site)
        self.classes |= site.classes
        self.losses += losses_of(info)
        count_radiometry(self.radiometry, info)
        self.bytes_written = self._tar.position

    def close(self) -> tuple[str, int]:
        """Ends the tar; returns its sha256 and CRC-32C."""
        digests = self._tar.close()
        self.bytes_written = self._tar.position
        return digests


def statistics_splits(splits: Iterable[str]) -> tuple[str, ...]:
    """Of which splits a set's statistics are: train alone, because a model is normalised by them that is judged on the others; of all
    where nothing is train."""
    present = set(splits)
    return SPLITS[:1] if SPLITS[0] in present else tuple(split for split in SPLITS if split in present)


def losses_of(info: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a sample lacks of what the catalog lists, each with the sample's key."""
    return [{"site": info["key"], **loss} for loss in info.get("losses", [])]


def cloud_share(site: SiteArrays) -> float | None:
    """Cloudy among valid s2 pixels; None without s2."""
    if "s2" not in site.series:
        return None
    mask = site.series["s2"].mask_THW
    cloudy, clear = int((mask == CLOUD).sum()), int((mask == CLEAR).sum())
    return round(cloudy / max(cloudy + clear, 1), 6)


def count_radiometry(counts: dict[str, int], info: Mapping[str, Any]) -> None:
    """Adds one sample's dates to the summary: how many dates of each modality share baseline, offset, scale, orbit."""
    for name, entry in info["modalities"].items():
        for decision, orbit in zip(entry["decisions"], entry["orbits"]):
            facts = {k: v for k, v in decision.items() if k in RADIOMETRY_KEYS and v not in ("", None, [])}
            if orbit:
                facts["orbit"] = orbit
            line = json.dumps({"modality": name, **facts}, sort_keys=True)
            counts[line] = counts.get(line, 0) + 1


RADIOMETRY_KEYS = (
    "offset_applied",
    "gain",
    "baseline",
    "basis",
    "source_unit",
    "calibration",
    "corrected",
    "position",
    "flags",
)


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set, opened for reading.

    Attributes:
        url: its folder.
        manifest: content of manifest.json.
        manifest_sha256: of its bytes; names the data set in run records.
    """

    url: str
    manifest: dict[str, Any]
    manifest_sha256: str

    @staticmethod
    def open(url: str) -> ShardSet:
        """Raises UsageError if there is no manifest, or one this version cannot read."""
        place = storage.join(url, MANIFEST)
        try:
            data = storage.read_bytes(place)
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"{url} is not a shard set: {MANIFEST} is missing; make one with python -m data_prep build"
            ) from None
        except (OSError, PermissionError) as error:
            raise UsageError(f"{place} cannot be read: {error}") from None
        try:
            manifest = json.loads(data)
            version = manifest["schema"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{place} is damaged; rebuild it with python -m data_prep verify {url} --repair") from None
        if version != SCHEMA_VERSION:
            raise UsageError(f"{place} has schema {version}, this version reads {SCHEMA_VERSION}; build the set again")
        return ShardSet(url, manifest, hashlib.sha256(data).hexdigest())

    @functools.cached_property
    def index(self) -> pa.Table:
        """The whole index; see `read_index` for some of its columns."""
        return self.read_index()

    def read_index(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Some columns of the index, in shard order; only those are read. Raises UsageError for a missing or damaged file."""
        try:
            with self._index_file() as file:
                return file.read(None if columns is None else list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def index_columns(self) -> list[str]:
        """Names of the index's columns; no rows are read. Raises UsageError for a missing or damaged file."""
        try:
            with self._index_file() as file:
                return file.schema_arrow.names
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def index_batches(self, columns: Iterable[str], rows: int = 8192) -> Iterator[pa.RecordBatch]:
        """Some columns of the index, that many rows at a time: the whole of a large one does not fit into memory.

        columns: names, or `members.FIELD`; those that the index lacks are left out.

        Raises UsageError for a missing or damaged file.
        """
        try:
            with self._index_file() as file:
                yield from read_batches(file, columns, rows)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    @contextlib.contextmanager
    def _index_file(self) -> Iterator[pq.ParquetFile]:
        with pq.ParquetFile(self._checked_index[0]) as file:
            yield file

    @functools.cached_property
    def _checked_index(self) -> tuple[str, Any]:
        """Path of the index on this machine, once its sha256 has proven to be the manifest's, and what keeps a copy there."""
        place, kept = storage.join(self.url, INDEX), None
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(storage.open_read(place))
            if not storage.is_local(place):
                kept = tempfile.NamedTemporaryFile(prefix="geoloom-", suffix=f"-{INDEX}")  # noqa: SIM115  (lives as long as self)
            while block := source.read(8 << 20):
                digest.update(block)
                if kept is not None:
                    kept.write(block)
        if kept is not None:
            kept.flush()
        if digest.hexdigest() != self.manifest.get("index", {}).get("sha256"):
            raise pa.ArrowInvalid(f"its sha256 is not that of {MANIFEST}")
        return (storage.local_path(place) if kept is None else kept.name), kept

    def _unreadable(self, error: Exception) -> UsageError:
        place = storage.join(self.url, INDEX)
        return UsageError(
            f"{place} cannot be read ({error}); rebuild it with python -m data_prep verify {self.url} --repair"
        )

    @functools.cached_property
    def statistics(self) -> dict[str, BandStatistics]:
        """Per-band statistics by modality."""
        return statistics_from_json(self.manifest["statistics"])

    @property
    def num_samples(self) -> int:
        return int(self.manifest["counts"]["samples"])

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per label, index = value."""
        return self.manifest["classes"]

    def shard_url(self, name: str) -> str:
        return storage.join(self.url, name)

    def read_sample(self, row: int) -> SiteArrays:
        """Sample number `row` with all its pixels (for tools; training reads through `pipeline.reader`).

        Raises MemberError (naming shard and key) for bytes that do not match the index or do not decode.
        """
        entry = self.index.slice(row, 1).to_pylist()[0]
        url, start = self.shard_url(entry["shard"]), entry["offset"]
        data = storage.read_bytes(url, start, start + entry["length"])
        places = {m["name"]: m for m in entry["members"]}

        def read(suffix: str) -> bytes:
            place = places[suffix]
            content = data[place["offset"] - start : place["offset"] - start + place["length"]]
            if hashlib.sha256(content).hexdigest() != place["sha256"]:
                raise MemberError(f"{suffix} does not match its checksum")
            return content

        try:
            site, _ = decode_members(read, list(places))
        except MemberError as error:
            raise MemberError(f"{url}: {entry['key']}: {error}") from None
        site.classes = {name: self.classes[name] for name in (*site.scalars, *site.rasters) if name in self.classes}
        return site

    def rows_of(self, split: str) -> np.ndarray:
        """Global row numbers of a split's samples."""
        splits = np.asarray(self.read_index(["split"])["split"])
        return np.flatnonzero(splits == split)
