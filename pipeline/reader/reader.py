"""The reader: shard sets → batches, exact and elastic.

What comes next is computed, never remembered (`pipeline.reader.order`), and augmentation is keyed by sample
(`pipeline.reader.views`), so a reader's whole state is one number, and any number of ranks and threads deliver the same
batches. Threads decode straight into re-used batch memory; they beat processes because the decoders let go of the GIL.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import numpy as np
import torch

from cluster.errors import RunFailure, UsageError
from data_prep.schema import BandStatistics
from model.batch import Batch
from model.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.reader import table as tables
from pipeline.reader.buffers import BatchBuffers
from pipeline.reader.device import DeviceStage
from pipeline.reader.faults import FaultLog, RetryPolicy
from pipeline.reader.fetch import open_fetcher
from pipeline.reader.meter import Meter, pooled
from pipeline.reader.order import Drawn, Stream, rank_part
from pipeline.reader.sample import SampleReader

STATE_SCHEMA = 1


class Reader:
    """Yields the batches of one rank, for ever or for a number of epochs.

    A yielded batch lives in re-used memory: it is valid until `hold` more batches have been asked for. Clone what is kept.

    Endless (epochs=None): global batch k is stream numbers [k·G, (k+1)·G), G = batch_per_rank · world; batches straddle
    epochs and nothing is dropped. With epochs: the last global batch holds what is left, split as evenly as can be; every
    rank yields the same number of batches of the same shape, and rows beyond a rank's part are blank (key "", position -1,
    nothing valid).

    Args:
        data, model: what to read, and for which modalities.
        seed: of order and augmentation.
        batch_per_rank: sites per yielded batch.
        rank, world: of this process.
        epochs: stop after so many; None = endless.
        views: "pretrain" = u, v and local views, augmented; "whole" = one centred view per site, without chance (`u is v`).
        device: a CUDA device: batches arrive there, copied one ahead from pinned memory. None or "cpu": stay on the CPU.
        hold: how many yielded batches stay valid.
        label: raster label for `View.classes_BHW`; None = the first one of the set.
        policy: of retries; None = from `data`.
        every: (w, n): of this rank's batches only w, w + n, w + 2n, … (for n workers that take turns).

    Raises:
        UsageError: no shard set, nothing left after the filters, batch_per_rank < 1.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, *, seed: int, batch_per_rank: int, rank: int = 0, world: int = 1,
        epochs: int | None = None, views: Literal["pretrain", "whole"] = "pretrain",
        device: torch.device | str | None = None, hold: int = 2, label: str | None = None, policy: RetryPolicy | None = None,
        every: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        if batch_per_rank < 1 or not 0 <= rank < world:
            raise UsageError(
                f"a reader needs batch_per_rank >= 1 and 0 <= rank < world, found {batch_per_rank}, {rank}, {world}"
            )
        self.data, self.seed, self.rank, self.world, self.batch_per_rank = data, seed, rank, world, batch_per_rank
        self.table = tables.load(data, model.modalities, label)
        self._stream = self._open_stream()
        self._epochs, self._hold = epochs, max(hold, 1)
        self._device = torch.device(device) if device is not None and torch.device(device).type == "cuda" else None
        self.faults = FaultLog(int(data.error_budget * len(self.table) / world))
        policy = policy or RetryPolicy(retries=data.retries, timeout_s=data.timeout_s)
        self._fetcher = open_fetcher(self.table, data, policy, self.faults)
        self._samples = SampleReader(self.table, data, model.modalities, seed, self._fetcher, self.faults, views)
        configs = self._samples.configs
        self._new_buffers = functools.partial(
            BatchBuffers,
            batch_per_rank,
            configs,
            model.modalities,
            self.table.label is not None,
            self._device is not None,
        )
        self._ring: list[BatchBuffers] = []
        self._pool = ThreadPoolExecutor(data.threads, "reader") if data.threads else None
        self._every = every
        self._base = 0  # stream number of the first batch
        self._meter = Meter()
        self._restart()

    # --- what it is

    @property
    def statistics(self) -> dict[str, BandStatistics]:
        """Per-band statistics of the set, or of all sets together (all splits, as the manifests hold them)."""
        return pooled([shardset.statistics for shardset in self.table.sets])

    @property
    def manifest_sha256(self) -> str:
        """Of the one set's manifest, or of all of them joined."""
        found = [shardset.manifest_sha256 for shardset in self.table.sets]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in `View.classes_BHW`, index = value; None without a raster label."""
        return None if self.table.label is None else self.table.sets[0].classes.get(self.table.label)

    @property
    def epoch_samples(self) -> int:
        return self._stream.epoch_samples

    @property
    def global_batch(self) -> int:
        return self.batch_per_rank * self.world

    @property
    def buffer_bytes(self) -> int:
        """Memory of the batch buffers in use, at most `prefetch_batches + hold` of them; with `data.read_ahead_mb` (object
        storage) and a scratch of a few samples per thread, all that a reader holds."""
        return sum(buffers.num_bytes for buffers in self._ring)

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far; the disk cache does not count."""
        return self._fetcher.bytes_read

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Where the batch after the last yielded one begins; the same on every rank, for any world size and threads."""
        return self._state_at(self._next)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state that this reader will have after yielding so many batches from where it was loaded or made."""
        start = self._base + batches * self.global_batch
        return self._state_at(start if self._epochs is None else min(start, self._epochs * self.epoch_samples))

    def _state_at(self, number: int) -> dict[str, Any]:
        return {
            "schema": STATE_SCHEMA, "samples": number, "epoch": number // self.epoch_samples,
            "position": number % self.epoch_samples, "seed": self.seed, "sets": self.table.fingerprints,
            "order": self._order_fingerprint(), "drawn": self._stream.drawn(number),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], changed_data: bool = False) -> None:
        """Continues after `state`. Raises UsageError if it belongs to other data, another order or another seed.

        changed_data: other data is meant. The stream goes on after as many samples, in the order that the new set has there.
        """
        if state.get("schema") != STATE_SCHEMA:
            raise UsageError(f"reader state has schema {state.get('schema')!r}, this version reads {STATE_SCHEMA}")
        mine = {"seed": self.seed, "sets": self.table.fingerprints, "order": self._order_fingerprint()}
        hints = {
            "seed": "train.seed", "sets": "the shard sets or the filters of data.*",
            "order": "data.block_samples, data.interleave or data.weights",
        }  # fmt: skip
        for name, value in mine.items():
            if name == "sets" and changed_data:
                continue
            if state.get(name) != value:
                raise UsageError(
                    f"cannot resume the data order: {hints[name]} differ from the checkpoint's ({state.get(name)} there, {value} "
                    "here); restore them, or start with --resume never"
                )
        self._drain()
        self._base = int(state["samples"])
        self._restart()

    def _order_fingerprint(self) -> str:
        settings = [self.data.block_samples, self.data.interleave, list(self.data.weights)]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    # --- batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stage is None:
            batch, self._next, _ = self._take()
        else:
            batch, self._next = self._stage.next(self._take)
        return batch

    def _open_stream(self) -> Stream:
        sizes = self.table.sizes if self.data.weights else [np.concatenate(self.table.sizes)]
        return Stream(sizes, self.data.weights, self.seed, self.data.block_samples, self.data.interleave)

    def _restart(self) -> None:
        self._next = self._base  # stream number after the last yielded batch
        self._submitted = 0
        self._ahead: deque[tuple[BatchBuffers, list[Future[None]], int]] = deque()
        self._free = deque(self._ring)
        self._held: deque[BatchBuffers] = deque()
        self._stage: DeviceStage | None = None if self._device is None else DeviceStage(self._device)
        self._ticket = 0

    def _bounds(self, k: int) -> tuple[int, int, int] | None:
        """(first, last) stream number of this rank's part of global batch k after the start, and the end of the batch."""
        k = self._every[0] + k * self._every[1]
        start, count = self._base + k * self.global_batch, self.global_batch
        if self._epochs is not None:
            count = min(count, self._epochs * self.epoch_samples - start)
        if count <= 0:
            return None
        first, last = rank_part(start, count, self.rank, self.world)
        return first, last, start + count

    def _rows_ahead(self, stream: Stream) -> Iterator[int]:
        """The rows of this rank from the start on, for reading ahead (in another thread, so on a stream of its own)."""
        k = 0
        while (bounds := self._bounds(k)) is not None:
            yield from self.table.rows.of(stream.at(bounds[0], bounds[1]).sample).tolist()
            k += 1

    def _submit(self) -> bool:
        """Starts the next batch that is not yet under way; false when there is none, or no memory for it."""
        bounds = self._bounds(self._submitted)
        buffers = None if bounds is None else self._free_buffers()
        if bounds is None or buffers is None:
            return False
        self.table.check()  # of a file that was cut, reading further than it goes would end the process (SIGBUS)
        if self._submitted == 0:
            self._fetcher.follow(self._rows_ahead(self._open_stream()))
        first, last, end = bounds
        if buffers.copied is not None:
            buffers.copied.synchronize()
        drawn, count = self._stream.at(first, last), last - first
        buffers.filled = count
        for i in range(count, self.batch_per_rank):
            buffers.blank(i)
        if self._pool is None:
            self._fill(buffers, drawn, 0, count, self._ticket)
            futures = []
        else:
            number = min(self.data.threads, max(count, 1))
            cuts = [count * n // number for n in range(number + 1)]
            futures = [
                self._pool.submit(self._fill, buffers, drawn, a, b, self._ticket + a)
                for a, b in itertools.pairwise(cuts)
                if b > a
            ]
        self._ticket += count
        self._submitted += 1
        self._ahead.append((buffers, futures, end))
        return True

    def _free_buffers(self) -> BatchBuffers | None:
        if not self._free and len(self._ring) < self.data.prefetch_batches + self._hold:
            self._ring.append(self._new_buffers())
            self._free.append(self._ring[-1])
        return self._free.popleft() if self._free else None

    def _fill(self, buffers: BatchBuffers, drawn: Drawn, first: int, last: int, ticket: int) -> None:
        rows = self.table.rows.of(drawn.sample[first:last]).tolist()
        for i, row in enumerate(rows, first):
            self._samples.fill(buffers, i, row, int(drawn.epoch[i]), int(drawn.position[i]), ticket + i - first)

    def _take(self) -> tuple[Batch, int, BatchBuffers]:
        """The next batch in CPU memory, the stream number after it, and its buffers. Raises StopIteration."""
        while len(self._held) >= self._hold:
            self._free.append(self._held.popleft())
        ahead = 1 if self._pool is None else self.data.prefetch_batches
        began = time.monotonic()
        while len(self._ahead) < ahead and self._submit():
            pass
        if not self._ahead:
            raise StopIteration
        self._meter.fill(sum(all(f.done() for f in fs) for _, fs, _ in list(self._ahead)), ahead)
        buffers, futures, end = self._ahead[0]
        try:
            for future in futures:
                future.result()
        except CancelledError:
            self._ahead.clear()
        finally:
            self.table.check()  # before what came of it, batch or error, is believed
        if not self._ahead:
            raise RunFailure("the reader was closed")
        self._ahead.popleft()
        self._held.append(buffers)
        batch = buffers.batch()
        batch.metrics["data_wait_s"] = time.monotonic() - began
        self._meter.batch(buffers.filled, batch.metrics["data_wait_s"])
        return batch, end, buffers

    # --- figures and end

    def metrics(self) -> dict[str, float]:
        """Figures since the last call: samples and bytes per second, decode time, share of time the caller waited, how full
        the prefetch queue was found, faults so far."""
        return self._meter.read(self._fetcher.bytes_read, self._samples.decode_s, self.faults)

    def _drain(self) -> None:
        under_way = [
            future for _, futures, _ in list(self._ahead) for future in futures
        ]  # another thread may take meanwhile
        self._ahead.clear()
        for future in under_way:
            future.cancel()
        wait(under_way)

    def close(self) -> None:
        """Stops threads and lets go of files and memory. A closed reader yields nothing."""
        self._fetcher.close()
        self._drain()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._ring.clear()
        self._free.clear()
        self._held.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
