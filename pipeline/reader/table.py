"""The index of one or several shard sets as the reader sees it: what it needs per sample, and nothing else.

Legend: N rows of the index, over all sets · D dates of one modality over all rows. A run takes some of the rows: sample n of
the run is row `rows.of(n)`, and everything else is looked up by row, so that the columns are the ones that the set carries and
a filter copies nothing. What is looked up row by row is a `memoryview` of a column (see `data_prep.columns`): an element of it
is a plain Python number, in a third of the time that an array takes to make a scalar, and without a list of Python objects.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from cluster.errors import RunFailure, UsageError
from data_prep.column_file import Mapped, WrongColumns
from data_prep.columns import Columns, absent
from data_prep.shards import ShardSet
from pipeline.config import DataConfig
from pipeline.reader.filters import Filters
from pipeline.reader.shared import hold
from pipeline.reader.views import SiteFacts


@dataclasses.dataclass(frozen=True)
class Members:
    """Places of one kind of member. offset_N, length_N: of its data in the tar. crc_N: CRC-32C.

    kind_N: -1 absent, else index into `columns.EXTENSIONS`, + `columns.UNCHECKED` if the index holds no checksum.
    """

    offset_N: memoryview
    length_N: memoryview
    crc_N: memoryview
    kind_N: memoryview


@dataclasses.dataclass(frozen=True)
class Dates:
    """Dates of one modality: of sample n the entries first_N[n] up to first_N[n + 1]. doy 0 = unknown.

    whole_N: every pixel of every date of sample n is clear. clear_D: float32 shares, 1 = all, exactly.
    """

    first_N: memoryview
    whole_N: memoryview
    clear_D: np.ndarray
    doy_D: np.ndarray

    def of(self, row: int) -> slice:
        return slice(self.first_N[row], self.first_N[row + 1])


class Keys(Sequence[str]):
    """The keys of all samples: one piece of UTF-8, cut at first_N."""

    def __init__(self, utf8: np.ndarray, first_N: np.ndarray) -> None:
        self._utf8, self._first_N = utf8.data, first_N.data

    def __len__(self) -> int:
        return len(self._first_N) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]  # slices are not needed
        if not 0 <= row < len(self):
            raise IndexError(row)
        return str(self._utf8[self._first_N[row] : self._first_N[row + 1]], "utf-8")


class Rows:
    """Which rows of the index a run takes, ascending: a range where they lie together (as those of a split do), else a list."""

    def __init__(self, rows: np.ndarray) -> None:
        self._first, self._count = int(rows[0]), len(rows)
        together = int(rows[-1]) - self._first + 1 == self._count
        self._listed = None if together else rows.astype(np.int32 if rows[-1] < 1 << 31 else np.int64)

    def __len__(self) -> int:
        return self._count

    def of(self, samples: np.ndarray) -> np.ndarray:
        """Rows of some samples: int64 [len(samples)]."""
        if self._listed is None:
            return np.asarray(samples, np.int64) + self._first
        return self._listed[samples].astype(np.int64)

    def all(self) -> np.ndarray:
        return self.of(np.arange(self._count))

    def select(self, column_N: np.ndarray) -> np.ndarray:
        """The samples' elements of a column: a view of it where they lie together."""
        if self._listed is None:
            return column_N[self._first : self._first + self._count]
        return column_N[self._listed]


class Edges(Sequence[int]):
    """Where the bytes of a row begin (or end) in its shard, over the members that are read: made when asked for."""

    def __init__(self, members: Sequence[Members], end: bool) -> None:
        self._members, self._end = members, end

    def __len__(self) -> int:
        return len(self._members[0].kind_N)

    def __getitem__(self, row: int) -> int:  # type: ignore[override]  # slices are not needed
        there = [m for m in self._members if m.kind_N[row] >= 0]
        if self._end:
            return max((m.offset_N[row] + m.length_N[row] for m in there), default=0)
        return min((m.offset_N[row] for m in there), default=0)


@dataclasses.dataclass(frozen=True)
class Table:
    """Samples that passed the filters, in storage order, over all shard sets. `..._N` is by row, not by sample.

    Attributes:
        sets: the opened shard sets.
        rows: the row of each sample.
        sizes: per set, samples of each shard that has any.
        columns: the memory behind all that follows.
        shard_urls, shard_hashes, shard_N: URL and sha256 of each shard, and which one a row lies in.
        start_N, stop_N: bytes of the tar from the first to the last needed member. stop = start where none exists.
        members: by stem (`s2`, `s2.mask`, `label.landcover`), in tar order.
        width_m_N, height_m_N: extent of the footprint. scene_N: scalar label "scene", -1 = none.
        label: name of the raster label that becomes `View.classes_BHW`; None if no sample has one.
        fingerprints: per set 16 hex digits of its content and of the rows taken.
    """

    sets: list[ShardSet]
    rows: Rows
    sizes: list[np.ndarray]
    columns: Columns
    keys: Keys
    shard_urls: list[str]
    shard_hashes: list[str]
    shard_N: memoryview
    start_N: Sequence[int]
    stop_N: Sequence[int]
    members: dict[str, Members]
    dates: dict[str, Dates]
    width_m_N: memoryview
    height_m_N: memoryview
    scene_N: memoryview
    label: str | None
    fingerprints: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Memory of all columns, shared with other processes or not."""
        return sum(column.nbytes for column in self.columns.values())

    def check(self) -> None:
        """Raises RunFailure if the file behind the columns was written over in place: what is read from it is no longer the set that
        was opened."""
        if isinstance(self.columns, Mapped):
            try:
                self.columns.check()
            except WrongColumns as error:
                raise RunFailure(
                    f"{error}: this run reads from it and cannot go on. Put a new file in the place of an old one by a rename; start "
                    "again to read what is there now"
                ) from None

    def facts(self, row: int, modalities: Sequence[str]) -> SiteFacts:
        """What `views.plan` needs of a row; absent modalities are left out."""
        clear = {
            m: self.dates[m].clear_D[self.dates[m].of(row)].astype(np.float64)  # limits are compared in float64
            for m in modalities
            if self.members[m].kind_N[row] >= 0
        }
        return SiteFacts(self.width_m_N[row], self.height_m_N[row], clear)

    def lonlat(self, row: int) -> tuple[float, float]:
        """Centre of a row's bbox in WGS84 degrees, also across the antimeridian."""
        west, south, east, north = (float(self.columns[side][row]) for side in ("west", "south", "east", "north"))
        lon = (west + (east + 360 if east < west else east)) / 2
        return (lon - 360 if lon > 180 else lon), (south + north) / 2


def load(data: DataConfig, modalities: Sequence[str], label: str | None = None) -> Table:
    """Opens the shard sets of `data.url` and applies its filters.

    Raises UsageError: no set there, no index or not the manifest's, no sample left (naming the filter that removed the last).
    """
    if not any(data.urls):
        raise UsageError("data.url is empty; pass data.url=FOLDER of a shard set made by python -m data_prep build")
    sets = [ShardSet.open(url) for url in data.urls]
    columns = hold(sets, modalities, data.cache_dir)
    taken = _taken(sets, columns, Filters.of(data, modalities))
    rows = Rows(taken[0] if len(taken) == 1 else np.concatenate(taken))
    label = label or _first_raster(columns, rows)
    stems = [stem for m in modalities for stem in (m, f"{m}.mask")] + ([f"label.{label}"] if label else [])
    members = {
        stem: Members(*(_view(columns, f"{stem}.{w}") for w in ("offset", "length", "crc", "kind"))) for stem in stems
    }
    listed = [(shardset, shard) for shardset in sets for shard in shardset.manifest["shards"]]
    kept = list(members.values())
    return Table(
        sets, rows, _sizes(sets, columns, taken), columns, Keys(columns["key.bytes"], columns["key.first"]),
        [shardset.shard_url(shard["name"]) for shardset, shard in listed], [shard["sha256"] for _, shard in listed],
        columns["shard"].data, Edges(kept, False), Edges(kept, True), members,
        {m: Dates(_view(columns, f"{m}.first"), _view(columns, f"{m}.whole"), _column(columns, f"{m}.clear"),
                  _column(columns, f"{m}.doy")) for m in modalities},
        columns["width_m"].data, columns["height_m"].data, columns["scene"].data, label,
        [_fingerprint(shardset, rows_n) for shardset, rows_n in zip(sets, _local(sets, taken))],
    )  # fmt: skip


def _taken(sets: Sequence[ShardSet], columns: Columns, filters: Filters) -> list[np.ndarray]:
    """Per set the rows taken, numbered over all sets."""
    found, first = [], 0
    for shardset in sets:
        part = slice(first, first + shardset.num_samples)
        its = {name: column[part] for name, column in columns.items() if "." not in name}
        rows = filters.rows(its, shardset.url)
        found.append(rows + first if first else rows)
        first += shardset.num_samples
    return found


def _local(sets: Sequence[ShardSet], taken: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows taken, numbered within each set."""
    firsts = np.cumsum([0, *(shardset.num_samples for shardset in sets)])
    return [rows - first if first else rows for rows, first in zip(taken, firsts)]


def _sizes(sets: Sequence[ShardSet], columns: Columns, taken: Sequence[np.ndarray]) -> list[np.ndarray]:
    total = sum(len(shardset.manifest["shards"]) for shardset in sets)
    counts = [np.bincount(Rows(rows).select(columns["shard"]), minlength=total) for rows in taken]
    return [count[count > 0].astype(np.int64) for count in counts]


def _fingerprint(shardset: ShardSet, rows: np.ndarray) -> str:
    digest = hashlib.sha256(str(shardset.manifest.get("content_sha256") or shardset.manifest_sha256).encode())
    digest.update(np.ascontiguousarray(rows, np.int64).data)
    return digest.hexdigest()[:16]


def _first_raster(columns: Columns, rows: Rows) -> str | None:
    """The label raster that the first sample with one has; of several, the first by name."""
    found = []
    for name in sorted(columns):
        if name.startswith("label.") and name.endswith(".kind"):
            there = rows.select(columns[name]) >= 0
            if there.any():
                found.append((int(there.argmax()), name.removeprefix("label.").removesuffix(".kind")))
    return min(found)[1] if found else None


def _column(columns: Columns, name: str) -> np.ndarray:
    held = columns.get(name)
    return absent(name, len(columns["shard"])) if held is None else held


def _view(columns: Columns, name: str) -> memoryview:
    return _column(columns, name).data
