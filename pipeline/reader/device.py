"""Copies batches to a CUDA device one ahead of their use, from page-locked memory, on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from model.batch import Batch
from pipeline.reader.buffers import BatchBuffers, tensors


class DeviceStage:
    """Holds the one batch that is already on its way."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)
        self._staged: deque[tuple[Batch, int, torch.cuda.Event]] = deque()

    def next(self, take: Callable[[], tuple[Batch, int, BatchBuffers]]) -> tuple[Batch, int]:
        """The next batch on the device, and the stream number after it. `take` gives batches in CPU memory.

        Raises StopIteration at the end. The current stream of the device waits for the copy; the host does not.
        """
        while len(self._staged) < 2:
            try:
                batch, end, buffers = take()
            except StopIteration:
                break
            with torch.cuda.stream(self._copies):
                moved = batch.to(self._device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._copies)
            buffers.copied = done  # the buffers are not filled again before the copy is done
            self._staged.append((moved, end, done))
        if not self._staged:
            raise StopIteration
        batch, end, done = self._staged.popleft()
        compute = torch.cuda.current_stream(self._device)
        done.wait(compute)
        for tensor in tensors(batch):
            tensor.record_stream(compute)  # the allocator must not hand it out again while `compute` uses it
        return batch, end
