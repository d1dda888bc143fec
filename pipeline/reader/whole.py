"""Sites without chance, for probes and embeddings: the centred crop, unturned, dates spread evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.shards import ShardSet
from model.batch import Batch, View
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader import table as tables
from pipeline.reader.buffers import BatchBuffers
from pipeline.reader.faults import FaultLog, RetryPolicy
from pipeline.reader.fetch import open_fetcher
from pipeline.reader.sample import SampleReader


class WholeSites:
    """Random access to sites of a split: the same rows give the same pixels, always.

    Args:
        shardset: an opened set, or its URL.
        split: of the index; "" takes all.
        modalities: in the model's order; a site that has none of them is left out.
        view: canvas and greatest number of dates; by default the global view of a `DataConfig`.
        label: name of the raster label for `View.classes_BHW`; None = the first one there is.
    """

    def __init__(
        self, shardset: ShardSet | str, split: str, modalities: Sequence[str], view: ViewConfig | None = None,
        label: str | None = None,
    ) -> None:  # fmt: skip
        url = shardset if isinstance(shardset, str) else shardset.url
        self._data = DataConfig(url=url, split=split, views_global=view or ViewConfig(), error_budget=0.0)
        self._modalities = tuple(modalities)
        self.table = tables.load(self._data, self._modalities, label)
        faults = FaultLog(0)
        self._fetcher = open_fetcher(self.table, self._data, RetryPolicy(), faults)
        self._samples = SampleReader(self.table, self._data, self._modalities, 0, self._fetcher, faults, "whole")

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Those samples (numbered within the split) as a batch of its own memory; `u` and `v` are the one view.

        Raises RunFailure for a sample that cannot be read.
        """
        buffers = BatchBuffers(len(rows), self._samples.configs, self._modalities, self.table.label is not None)
        in_index = self.table.rows.of(np.asarray(rows, np.int64)).tolist()
        self._fetcher.follow(iter(in_index))
        for i, (number, row) in enumerate(zip(rows, in_index)):
            self._samples.fill(buffers, i, row, 0, int(number), i)
        return buffers.batch()

    def close(self) -> None:
        self._fetcher.close()


def whole_site_view(
    shardset: ShardSet | str, rows: Sequence[int] | np.ndarray, modalities: Sequence[str], view: ViewConfig | None = None,
    split: str = "",
) -> View:  # fmt: skip
    """One view of the sites `rows` (numbered within `split`): see `WholeSites`, which keeps files open between calls."""
    sites = WholeSites(shardset, split, modalities, view)
    try:
        return sites.batch(rows).u
    finally:
        sites.close()
