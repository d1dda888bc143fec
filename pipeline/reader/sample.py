"""One sample into its row of a batch: plan its views, get its bytes, check them, decode, place."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import google_crc32c
import numpy as np

from data_prep.codec import Member, MemberError, open_member
from data_prep.columns import EXTENSIONS, UNCHECKED
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.assemble import SiteMembers, fill_site
from pipeline.reader.buffers import BatchBuffers
from pipeline.reader.faults import BadSample, FaultLog
from pipeline.reader.fetch import Fetcher, Parts
from pipeline.reader.table import Members, Table
from pipeline.reader.views import ViewPlan, plan, plan_whole


class WrongBytes(BadSample):
    """The bytes that came are not the ones the index describes; reading again may help."""


class SampleReader:
    """Fills rows of batches. Thread-safe; holds no state between samples but counters."""

    def __init__(
        self, table: Table, data: DataConfig, modalities: Sequence[str], seed: int, fetcher: Fetcher, faults: FaultLog,
        views: Literal["pretrain", "whole"],
    ) -> None:  # fmt: skip
        self._table, self._data, self._modalities, self._seed = table, data, tuple(modalities), seed
        self._fetcher, self._faults, self._whole = fetcher, faults, views == "whole"
        self.configs: list[ViewConfig] = [data.views_global]
        if not self._whole:
            self.configs = [data.views_global] * 2 + [data.views_local] * data.local_views
        self.decode_s = 0.0

    def plans(self, row: int, epoch: int) -> list[ViewPlan]:
        """The view plans of a sample in an epoch; no pixels are read."""
        facts = self._table.facts(row, self._modalities)
        if self._whole:
            return [plan_whole(facts, self._data.views_global, self._data.min_clear)]
        return plan(facts, self._data, self._seed, epoch, self._table.keys[row])

    def fill(self, buffers: BatchBuffers, i: int, row: int, epoch: int, position: int, ticket: int) -> None:
        """Writes row i of the buffers. A sample that cannot be read becomes a blank row and is quarantined.

        Raises RunFailure: storage unreachable, or more bad samples than the budget allows.
        """
        table = self._table
        plans = self.plans(row, epoch)
        try:
            try:
                self._fill_from(self._fetcher.get(ticket, row), plans, buffers, i, row)
            except (WrongBytes, MemberError, IndexError, ValueError) as error:
                self._faults.count("checksum" if isinstance(error, WrongBytes) else "decode")
                self._fill_from(self._fetcher.again(row), plans, buffers, i, row)
        except (BadSample, MemberError, IndexError, ValueError) as error:
            buffers.blank(i)
            shard = table.shard_urls[table.shard_N[row]]
            self._faults.quarantine(table.keys[row], f"{error} ({shard}, from byte {table.start_N[row]})")
        finally:
            self._fetcher.release(ticket)
        buffers.keys[i], buffers.position_B[i] = table.keys[row], position
        buffers.scene_B[i], buffers.lonlat_B2[i] = table.scene_N[row], table.lonlat(row)

    def _fill_from(self, parts: Parts, plans: list[ViewPlan], buffers: BatchBuffers, i: int, row: int) -> None:
        began = time.thread_time()
        members = SampleMembers(self._table.members, parts, row, self._table.keys[row], self._data.verify_checksums)
        dates = {m: self._table.dates[m] for m in self._modalities if m in members}
        doy = {m: d.doy_D[d.of(row)] for m, d in dates.items()}
        clear = {m: None if d.whole_N[row] else d.clear_D[d.of(row)] for m, d in dates.items()}
        fill_site(SiteMembers(members, doy, clear, self._table.width_m_N[row]), plans, buffers.views, i)
        self.decode_s += time.thread_time() - began


class SampleMembers(Mapping[str, Member]):
    """The members of one sample, each read, checked and opened when it is asked for. A member is valid until another one of
    its slot is asked for, so modalities are done one after another."""

    def __init__(self, places: Mapping[str, Members], parts: Parts, row: int, key: str, check: bool) -> None:
        self._places, self._parts, self._row, self._key, self._check = places, parts, row, key, check

    def __getitem__(self, stem: str) -> Member:
        place, row = self._places[stem], self._row
        kind = place.kind_N[row]
        if kind < 0:
            raise BadSample(f"{self._key}.{stem} is missing")
        data = self._parts.part(place.offset_N[row], place.length_N[row], _slot(stem))
        if self._check and not kind & UNCHECKED and _crc32c(data) != place.crc_N[row]:
            raise WrongBytes(f"{self._key}.{stem} does not match its checksum")
        return open_member(data, EXTENSIONS[kind & ~UNCHECKED])

    def __contains__(self, stem: object) -> bool:
        place = self._places.get(str(stem))
        return place is not None and place.kind_N[self._row] >= 0

    def __iter__(self) -> Iterator[str]:
        return (stem for stem in self._places if stem in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@functools.cache
def _slot(stem: str) -> int:
    """Pixels, masks and labels each have a buffer: a mask is read while the pixels are still looked at."""
    return 2 if stem.startswith("label.") else int(stem.endswith(".mask"))


def _crc32c(data: memoryview) -> int:
    """CRC-32C of a view; the library takes read-only arrays without a copy, but no memoryview."""
    return google_crc32c.value(np.frombuffer(data.toreadonly(), np.uint8))
