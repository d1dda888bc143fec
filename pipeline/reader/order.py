"""Which sample comes at which position: pure functions of (seed, epoch, position), so that nobody has to remember it.

One epoch over a shard set:

1. Each shard is cut into blocks of `block_samples` neighbouring samples (the first cut at a random phase, so that blocks
   differ from epoch to epoch).
2. The blocks of all shards are permuted together. The index makes any block as near as any other, so there is no reason to
   permute shards first and then stay inside a few of them, as sequential tar readers must.
3. Every `interleave` consecutive blocks form a group; the samples of a group are permuted.

So a reader needs `interleave * block_samples` samples in reach at a time, reads runs of neighbouring bytes, and yet a batch
mixes samples of many shards. `shuffle_quality` puts figures on it. `interleave=1` gives each rank whole blocks, which makes
for the largest ranges; it costs nothing in mixing when the global batch is larger than a group anyway.

How well it mixes (`shuffle_quality`; 100 shards of 1,000; 1 = as a full shuffle): distinct shards in a batch of 256 / of 1,024

    block_samples, interleave    4, 8: 0.54 / 0.93    16, 8 (default): 0.23 / 0.52    16, 1: 0.17 / 0.49    64, 8: 0.12 / 0.22

`data_prep build` scatters places over shards, so that neighbours in a shard are not neighbours on the ground; a set that
keeps the source's order wants smaller blocks.

The stream of training is endless: stream number n belongs to epoch n // N at position n % N of a set of N samples. Global
batch k is stream numbers [k·G, (k+1)·G); rank r of W takes the r-th of W equal parts. Nothing depends on W but that cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline.reader.keyed import bits, permutation

MIX_PERIOD = 1000  # in every MIX_PERIOD draws each part of a mixture has exactly its share


class EpochOrder:
    """The order of one epoch over shards that hold `sizes` samples each; samples are numbered shard by shard.

    Memory: about 40 bytes per block. `samples` is a pure function; the small cache of groups only saves time.
    """

    def __init__(self, sizes: np.ndarray, seed: int, epoch: int, block_samples: int, interleave: int) -> None:
        self.count, self._key, self._interleave = int(sizes.sum()), (seed, epoch), interleave
        starts, lengths = _blocks(np.asarray(sizes, np.int64), block_samples, (seed, epoch))
        order = permutation(len(starts), *self._key, "blocks")
        self._starts, self._lengths = starts[order], lengths[order]
        ends = np.cumsum(self._lengths)
        self._group_ends = ends[
            np.minimum(np.arange(interleave - 1, len(ends) + interleave - 1, interleave), len(ends) - 1)
        ]
        self._cache: dict[int, np.ndarray] = {}

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Sample numbers (int64) at the positions [start, stop) of the epoch."""
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"positions {start} to {stop} are outside an epoch of {self.count} samples")
        parts = []
        while start < stop:
            group = int(np.searchsorted(self._group_ends, start, side="right"))
            begin = int(self._group_ends[group - 1]) if group else 0
            end = min(stop, int(self._group_ends[group]))
            parts.append(self._group(group)[start - begin : end - begin])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _group(self, group: int) -> np.ndarray:
        cached = self._cache.get(group)
        if cached is not None:
            return cached
        blocks = slice(group * self._interleave, (group + 1) * self._interleave)
        runs = [np.arange(s, s + n) for s, n in zip(self._starts[blocks], self._lengths[blocks])]
        samples = np.concatenate(runs)
        samples = samples[permutation(len(samples), *self._key, "group", group)]
        if len(self._cache) >= 4:
            self._cache.clear()
        self._cache[group] = samples
        return samples


def _blocks(sizes: np.ndarray, block: int, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cuts of all shards: (first sample, number of samples) of each block, in shard order."""
    phase = (bits(len(sizes), *key, "phase") % np.uint64(block)).astype(np.int64)
    phase = np.minimum(phase, np.maximum(sizes - 1, 0))  # length of the odd first block; 0 = none
    number = (phase > 0) + -(-(sizes - phase) // block)
    shards = np.repeat(np.arange(len(sizes)), number)
    first_of_shard = np.cumsum(number) - number
    nth = np.arange(len(shards)) - first_of_shard[shards]
    lead = phase[shards]
    begin = np.where(lead > 0, np.where(nth > 0, lead + (nth - 1) * block, 0), nth * block)
    end = np.where((lead > 0) & (nth == 0), lead, np.minimum(begin + block, sizes[shards]))
    shard_start = np.cumsum(sizes) - sizes
    return shard_start[shards] + begin, end - begin


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Draws of the stream: which sample (numbered over all parts), in which epoch of its part, at which position there."""

    sample: np.ndarray
    epoch: np.ndarray
    position: np.ndarray
    part: np.ndarray


class Stream:
    """The endless stream over one part, or over several mixed by weights.

    Args:
        parts: per part the number of samples of each of its shards. Samples are numbered through all parts.
        weights: share of each part in the draws; exact in every MIX_PERIOD draws (largest remainders), whatever the parts'
            sizes. One part: ignored.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], weights: Sequence[float], seed: int, block_samples: int, interleave: int
    ) -> None:
        self.parts = [np.asarray(part, np.int64) for part in parts]
        self.counts = [int(part.sum()) for part in self.parts]
        self._first = np.cumsum([0, *self.counts])
        self._settings = (seed, block_samples, interleave)
        self._quotas = quotas(weights if len(self.parts) > 1 else [1.0])
        self._orders: dict[tuple[int, int], EpochOrder] = {}

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch: each once for one part; as many draws as there are samples for a mixture."""
        return sum(self.counts)

    def drawn(self, number: int) -> list[int]:
        """How many samples of each part stand before stream number `number`: the mixing counters, never stored."""
        if len(self.parts) == 1:
            return [number]
        periods, rest = divmod(number, MIX_PERIOD)
        inside = np.bincount(self._slots(periods)[:rest], minlength=len(self.parts))
        return [int(c) for c in periods * self._quotas + inside]

    def at(self, start: int, stop: int) -> Drawn:
        """The draws of stream numbers [start, stop)."""
        part = np.zeros(stop - start, np.int64)
        if len(self.parts) > 1:
            pieces = [self._slots(p) for p in range(start // MIX_PERIOD, -(-stop // MIX_PERIOD))]
            offset = start // MIX_PERIOD * MIX_PERIOD
            part = np.concatenate([np.empty(0, np.int64), *pieces])[start - offset : stop - offset]
        sample, epoch, position = (np.empty(stop - start, np.int64) for _ in range(3))
        for index, before in enumerate(self.drawn(start)):
            where = np.flatnonzero(part == index)
            own = np.arange(before, before + len(where))
            epoch[where], position[where] = own // self.counts[index], own % self.counts[index]
            sample[where] = self._first[index] + self._samples(index, before, before + len(where))
        return Drawn(sample, epoch, position, part)

    def _slots(self, period: int) -> np.ndarray:
        slots = np.repeat(np.arange(len(self.parts)), self._quotas)
        return slots[permutation(MIX_PERIOD, self._settings[0], "mix", period)]

    def _samples(self, part: int, start: int, stop: int) -> np.ndarray:
        pieces, count = [np.empty(0, np.int64)], self.counts[part]
        while start < stop:
            epoch, position = divmod(start, count)
            end = min(count, position + stop - start)
            pieces.append(self._order(part, epoch).samples(position, end))
            start += end - position
        return np.concatenate(pieces)

    def _order(self, part: int, epoch: int) -> EpochOrder:
        order = self._orders.get((part, epoch))
        if order is None:
            seed, block_samples, interleave = self._settings
            order = EpochOrder(self.parts[part], seed, epoch, block_samples, interleave)
            for old in [key for key in self._orders if key[0] == part and key[1] < epoch - 1]:
                del self._orders[old]
            self._orders[part, epoch] = order
        return order


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Draws of each part in one MIX_PERIOD: int64, sum MIX_PERIOD, largest remainders. A positive weight gets at least 1."""
    share = np.asarray(weights, np.float64)
    if len(share) == 0 or not np.isfinite(share).all() or (share < 0).any() or share.sum() <= 0:
        raise ValueError("weights must be finite, not negative, and not all zero")
    exact = share / share.sum() * MIX_PERIOD
    whole = np.maximum(np.floor(exact).astype(np.int64), share > 0)
    while whole.sum() != MIX_PERIOD:
        step = 1 if whole.sum() < MIX_PERIOD else -1
        gap = np.where((share > 0) & (whole + step > 0), (exact - whole) * step, -np.inf)
        whole[int(np.argmax(gap))] += step
    return whole


def rank_part(start: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """Contiguous part of `count` stream numbers from `start` that rank takes: as even as can be, in rank order."""
    return start + count * rank // world, start + count * (rank + 1) // world


def shuffle_quality(samples: np.ndarray, sizes: np.ndarray, batch: int = 256) -> dict[str, float]:
    """Figures of how well an order mixes, each relative to a full shuffle's expectation (1 = as good).

    shards_per_batch: distinct shards in a batch, against a full shuffle.
    spread: mean distance in the order between samples that are neighbours in storage, against N / 3.
    same_shard_neighbours: share of consecutive samples from one shard (a plain share; full shuffle: the shards' size share).
    """
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[samples]
    batches = [shard_of[i : i + batch] for i in range(0, len(samples) - batch + 1, batch)]
    distinct = float(np.mean([len(np.unique(b)) for b in batches])) if batches else float("nan")
    share = np.asarray(sizes) / np.sum(sizes)
    place = np.empty(len(samples), np.int64)
    place[samples] = np.arange(len(samples))
    return {
        "shards_per_batch": distinct / float(np.sum(1 - (1 - share) ** batch)),
        "spread": float(np.mean(np.abs(np.diff(place)))) / (len(samples) / 3),
        "same_shard_neighbours": float(np.mean(shard_of[1:] == shard_of[:-1])),
    }
