"""The reader for people who use `torch.utils.data.DataLoader`: same batches, same order, with any number of workers.

    loader = DataLoader(ReaderDataset(data, model, seed=0, batch_per_rank=32), batch_size=None, num_workers=4)

Worker w of n makes batches w, w + n, w + 2n, …, and DataLoader takes them in turn, so that the order is the reader's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from model.batch import Batch, ModalityView, View
from model.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.reader.reader import Reader


class ReaderDataset(IterableDataset[Batch]):
    """Yields batches (use `batch_size=None`). Arguments are `Reader`'s.

    In worker processes batches are copies. Without workers they live in re-used memory: see `Reader`.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, *, seed: int, batch_per_rank: int, rank: int = 0, world: int = 1,
        epochs: int | None = None, views: Literal["pretrain", "whole"] = "pretrain",
    ) -> None:  # fmt: skip
        self._data, self._model = data, model
        self._options: dict[str, Any] = {
            "seed": seed, "batch_per_rank": batch_per_rank, "rank": rank, "world": world, "epochs": epochs, "views": views,
        }  # fmt: skip
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn = (0, 1) if worker is None else (worker.id, worker.num_workers)
        with Reader(self._data, self._model, every=turn, **self._options) as reader:
            if self._state is not None:
                reader.load_state_dict(self._state)
            for batch in reader:
                yield batch if worker is None else copied(batch)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The reader state after so many batches were taken from the DataLoader since its iteration began: workers run
        ahead, so only the taker knows the number. Loads into a `Reader` too, on any world size."""
        with Reader(self._data, self._model, **self._options) as reader:
            if self._state is not None:
                reader.load_state_dict(self._state)
            return reader.state_after(batches)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on after `state`."""
        self._state = dict(state)


def copied(batch: Batch) -> Batch:
    """The batch in memory of its own."""
    memo: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if id(value) in memo:  # `whole` batches hold one view twice
            return memo[id(value)]
        new: Any
        if isinstance(value, Batch | View | ModalityView):
            new = dataclasses.replace(
                value, **{f.name: copy(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        elif isinstance(value, dict):
            new = {key: copy(item) for key, item in value.items()}
        elif isinstance(value, list):
            new = [copy(item) for item in value]
        else:
            new = value.clone() if hasattr(value, "clone") else value
        memo[id(value)] = new
        return new

    return copy(batch)
