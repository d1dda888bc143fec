"""Per-band statistics over CLEAR pixels: exact, streamed, mergeable in any order.

Every stored type has at most 65,536 values, so a band's histogram over *stored codes* loses nothing: counts are integers,
their sums do not depend on order or on the number of workers, and mean, std and percentiles follow from them exactly.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.index import read_parquet
from data_prep.schema import CLEAR, MODALITIES, BandStatistics, SiteArrays

PERCENTILES = (1, 2, 50, 98, 99)
PIECE = 1 << 18

_SCHEMA = pa.schema([("modality", pa.string()), ("band", pa.int16()), ("code", pa.int32()), ("count", pa.int64())])


class Histograms:
    """Counts of stored codes per modality and band, int64 [C, codes]."""

    def __init__(self) -> None:
        self.counts: dict[str, np.ndarray] = {}

    def add(self, site: SiteArrays) -> None:
        """Counts the CLEAR pixels of all dates of all modalities of a site."""
        for name, series in site.series.items():
            codes_TCHW, clear_THW = stored_codes(series.pixels_TCHW), series.mask_THW == CLEAR
            counts = self._of(name)
            for codes_CHW, clear_HW in zip(codes_TCHW, clear_THW):
                whole = bool(clear_HW.all())
                for band, codes_HW in enumerate(codes_CHW):
                    _count(counts[band], codes_HW.reshape(-1) if whole else codes_HW[clear_HW])

    def merge(self, other: Histograms) -> None:
        for name, counts in other.counts.items():
            self._of(name)[...] += counts

    def take_out(self, other: Histograms) -> None:
        """Undoes a `merge`: counts are whole numbers, so nothing of it is left."""
        for name, counts in other.counts.items():
            self._of(name)[...] -= counts

    def to_bytes(self) -> bytes:
        """A small Parquet file of the non-zero counts, in a fixed order."""
        columns: dict[str, list[Any]] = {field.name: [] for field in _SCHEMA}
        for name in MODALITIES:
            if name not in self.counts:
                continue
            bands, codes = np.nonzero(self.counts[name])
            columns["modality"].append(pa.array([name] * len(bands), pa.string()))
            columns["band"].append(pa.array(bands.astype(np.int16)))
            columns["code"].append(pa.array(codes.astype(np.int32)))
            columns["count"].append(pa.array(self.counts[name][bands, codes]))
        arrays = {
            field.name: pa.chunked_array(columns[field.name], type=field.type).combine_chunks() for field in _SCHEMA
        }
        stream = io.BytesIO()
        pq.write_table(pa.table(arrays, _SCHEMA), stream, compression="zstd")
        return stream.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Histograms:
        histograms = Histograms()
        table = read_parquet(data, _SCHEMA.names)
        names = np.asarray(table["modality"])
        band, code, count = (table[column].to_numpy() for column in ("band", "code", "count"))
        for name in MODALITIES:
            chosen = names == name
            if chosen.any():
                np.add.at(histograms._of(name), (band[chosen], code[chosen]), count[chosen])
        return histograms

    def finish(self) -> dict[str, BandStatistics]:
        """Statistics of every modality that has a CLEAR pixel."""
        done = {}
        for name, counts in self.counts.items():
            values = code_values(MODALITIES[name].dtype, counts.shape[1])
            order = np.argsort(values, kind="stable")
            bands = [_band(values[order], band[order]) for band in counts]
            if any(count for count, *_ in bands):
                columns = list(zip(*bands))
                done[name] = BandStatistics(columns[0], columns[1], columns[2], columns[3])
        return {name: done[name] for name in MODALITIES if name in done}

    def _of(self, name: str) -> np.ndarray:
        if name not in self.counts:
            spec = MODALITIES[name]
            codes = 256 if np.dtype(spec.dtype).itemsize == 1 else 65536
            self.counts[name] = np.zeros((len(spec.bands), codes), np.int64)
        return self.counts[name]


def stored_codes(pixels: np.ndarray) -> np.ndarray:
    """The stored bits as unsigned codes (float32 is first rounded to float16: statistics to 3 digits are enough there)."""
    if pixels.dtype == np.float32:
        pixels = pixels.astype(np.float16)
    return pixels if pixels.dtype.kind == "u" else pixels.view(np.uint16)


def code_values(dtype: str, num_codes: int) -> np.ndarray:
    """float64 value of every code; codes that are no number (NaN patterns) sort last and are never counted."""
    codes = np.arange(num_codes, dtype=np.uint16)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return codes.view(np.float16).astype(np.float64)
    return codes.view(kind).astype(np.float64) if kind.itemsize == 2 else codes.astype(np.float64)


def statistics_json(statistics: Mapping[str, BandStatistics]) -> dict[str, Any]:
    """The manifest's form: `{modality: {"bands", "count", "mean", "std", "percentiles"}}`."""
    return {
        name: {"bands": list(MODALITIES[name].bands), **json.loads(json.dumps(entry.to_dict()))}
        for name, entry in statistics.items()
    }


def statistics_from_json(tree: Mapping[str, Any]) -> dict[str, BandStatistics]:
    """Inverse of `statistics_json`."""
    return {
        name: BandStatistics(
            tuple(entry["count"]), tuple(entry["mean"]), tuple(entry["std"]),
            tuple(tuple(band) for band in entry["percentiles"]),
        )
        for name, entry in tree.items()
    }  # fmt: skip


def statistics_sha256(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _count(counts: np.ndarray, codes: np.ndarray) -> None:
    """Adds to `counts` how often each code occurs. In pieces, whose copies as int64 (bincount makes them) stay in the cache;
    bytes of a large image two at a time, as one code of 16 bits, for half the work."""
    if codes.dtype == np.uint8 and len(codes) >= 8 * PIECE:
        pairs = np.zeros(1 << 16, np.int64)
        even = len(codes) // 2 * 2
        _count(pairs, codes[:even].view(np.uint16))
        counts += pairs.reshape(256, 256).sum(0) + pairs.reshape(256, 256).sum(1)
        codes = codes[even:]
    for start in range(0, len(codes), PIECE):
        found = np.bincount(codes[start : start + PIECE])
        counts[: len(found)] += found


def _band(values: np.ndarray, counts: np.ndarray) -> tuple[int, float, float, tuple[float, ...]]:
    """(count, mean, std, percentiles) of one band; values ascending. Percentiles are nearest-rank: a value that occurs."""
    used = counts > 0
    values, counts = values[used], counts[used]
    total = int(counts.sum())
    if total == 0:
        return 0, 0.0, 0.0, (0.0,) * len(PERCENTILES)
    mean = math.fsum(v * n for v, n in zip(values.tolist(), counts.tolist())) / total
    variance = math.fsum((v - mean) ** 2 * n for v, n in zip(values.tolist(), counts.tolist())) / total
    ranks = [max(math.ceil(total * share / 100), 1) for share in PERCENTILES]
    cumulative = np.cumsum(counts)
    return total, mean, math.sqrt(variance), tuple(float(values[np.searchsorted(cumulative, rank)]) for rank in ranks)
