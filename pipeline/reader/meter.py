"""Figures of a running reader, and statistics over several shard sets."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from data_prep.schema import BandStatistics
from pipeline.reader.faults import FaultLog


class Meter:
    """Counts since the last `read`."""

    def __init__(self) -> None:
        self._bytes, self._decode_s = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._samples, self._batches, self._waited_s, self._ready, self._room = 0, 0, 0.0, 0, 0

    def fill(self, ready: int, room: int) -> None:
        self._ready += ready
        self._room += room

    def batch(self, samples: int, waited_s: float) -> None:
        self._samples += samples
        self._batches += 1
        self._waited_s += waited_s

    def read(self, total_bytes: int, total_decode_s: float, faults: FaultLog) -> dict[str, float]:
        elapsed = max(time.monotonic() - self._since, 1e-9)
        figures = {
            "data/samples_per_s": self._samples / elapsed,
            "data/bytes_per_s": (total_bytes - self._bytes) / elapsed,
            "data/decode_ms": 1e3 * (total_decode_s - self._decode_s) / max(self._samples, 1),
            "data/wait_share": min(self._waited_s / elapsed, 1.0),
            "data/buffer_fill": self._ready / max(self._room, 1),
            "data/faults": float(faults.total),
            "data/quarantined": float(len(faults.quarantined)),
        }
        self._bytes, self._decode_s = total_bytes, total_decode_s
        self._reset()
        return figures


def pooled(parts: Sequence[dict[str, BandStatistics]]) -> dict[str, BandStatistics]:
    """Statistics of several sets together: counts, means and standard deviations exactly (law of total variance);
    percentiles, which do not pool, of the set with most pixels."""
    merged: dict[str, BandStatistics] = {}
    for modality in dict.fromkeys(name for part in parts for name in part):
        found = [part[modality] for part in parts if modality in part]
        if len(found) == 1:
            merged[modality] = found[0]
            continue
        bands = range(len(found[0].mean))
        count = tuple(sum(s.count[b] for s in found) for b in bands)
        mean = tuple(sum(s.count[b] * s.mean[b] for s in found) / max(count[b], 1) for b in bands)
        square = (
            sum(s.count[b] * (s.std[b] ** 2 + (s.mean[b] - mean[b]) ** 2) for s in found) / max(count[b], 1)
            for b in bands
        )
        largest = max(found, key=lambda s: sum(s.count))
        merged[modality] = BandStatistics(count, mean, tuple(math.sqrt(v) for v in square), largest.percentiles)
    return merged
