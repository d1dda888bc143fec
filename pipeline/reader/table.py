"""The index of one or several shard sets as the reader sees it: what it needs per sample, and nothing else.

Legend: N samples after the filters · D dates of one modality over all samples. What is looked up sample by sample is a
`memoryview` of a column (see `pipeline.reader.scan`): an element of it is a plain Python number, in a third of the time that
an array takes to make a scalar, and without a list of Python objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cluster.errors import UsageError
from data_prep.shards import ShardSet
from pipeline.config import DataConfig
from pipeline.reader.filters import Filters
from pipeline.reader.scan import Columns
from pipeline.reader.shared import hold
from pipeline.reader.views import SiteFacts


@dataclasses.dataclass(frozen=True)
class Members:
    """Places of one kind of member. offset_N, length_N: of its data in the tar. crc_N: CRC-32C.

    kind_N: -1 absent, else index into `scan.EXTENSIONS`, + `scan.UNCHECKED` if the index holds no checksum.
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


@dataclasses.dataclass(frozen=True)
class Table:
    """Samples that passed the filters, in storage order, over all shard sets.

    Attributes:
        sets: the opened shard sets.
        sizes: per set, samples of each shard.
        columns: the memory behind all that follows.
        shard_urls, shard_hashes, shard_N: URL and sha256 of each shard, and which one a sample lies in.
        start_N, stop_N: bytes of the tar from the first to the last needed member. stop = start where none exists.
        members: by stem (`s2`, `s2.mask`, `label.landcover`), in tar order.
        width_m_N, height_m_N: extent of the footprint.
        lonlat_N2: centre in WGS84 degrees. scene_N: scalar label "scene", -1 = none.
        label: name of the raster label that becomes `View.classes_BHW`; None if no sample has one.
        fingerprints: per set 16 hex digits of its content and of the rows taken.
    """

    sets: list[ShardSet]
    sizes: list[np.ndarray]
    columns: Columns
    keys: Keys
    shard_urls: list[str]
    shard_hashes: list[str]
    shard_N: memoryview
    start_N: memoryview
    stop_N: memoryview
    members: dict[str, Members]
    dates: dict[str, Dates]
    width_m_N: memoryview
    height_m_N: memoryview
    lonlat_N2: np.ndarray
    scene_N: memoryview
    label: str | None
    fingerprints: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Memory of all columns, shared with other processes or not."""
        return sum(column.nbytes for column in self.columns.values())

    def facts(self, row: int, modalities: Sequence[str]) -> SiteFacts:
        """What `views.plan` needs of a sample; absent modalities are left out."""
        clear = {
            m: self.dates[m].clear_D[self.dates[m].of(row)].astype(np.float64)  # limits are compared in float64
            for m in modalities
            if self.members[m].kind_N[row] >= 0
        }
        return SiteFacts(self.width_m_N[row], self.height_m_N[row], clear)


def load(data: DataConfig, modalities: Sequence[str], label: str | None = None) -> Table:
    """Opens the shard sets of `data.url` and applies its filters.

    Raises UsageError: no set there, no index, or no sample left (naming the filter that removed the last ones).
    """
    if not any(data.urls):
        raise UsageError("data.url is empty; pass data.url=FOLDER of a shard set made by python -m data_prep build")
    sets = [ShardSet.open(url) for url in data.urls]
    held = hold(sets, Filters.of(data, modalities), label, data.cache_dir)
    columns, label = held.columns, held.label
    shard_urls, shard_hashes = [], []
    for shardset, part in zip(sets, held.parts):
        hashes = {shard["name"]: shard["sha256"] for shard in shardset.manifest["shards"]}
        shard_hashes += [hashes[name] for name in part.shards]
        shard_urls += [shardset.shard_url(name) for name in part.shards]
    views = {name: column.data for name, column in columns.items()}
    stems = {stem: stem for m in modalities for stem in (m, f"{m}.mask")}
    if label is not None:
        stems[f"label.{label}"] = "label"
    return Table(
        sets, [np.array(part.sizes, np.int64) for part in held.parts], columns, Keys(columns["key.bytes"], columns["key.first"]),
        shard_urls, shard_hashes, views["shard"], views["start"], views["stop"],
        {stem: Members(*(views[f"{name}.{what}"] for what in ("offset", "length", "crc", "kind"))) for stem, name in stems.items()},
        {m: Dates(views[f"{m}.first"], views[f"{m}.whole"], columns[f"{m}.clear"], columns[f"{m}.doy"]) for m in modalities},
        views["width_m"], views["height_m"], columns["lonlat"].reshape(-1, 2), views["scene"], label,
        [part.fingerprint for part in held.parts],
    )  # fmt: skip
