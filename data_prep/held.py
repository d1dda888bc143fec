"""What a finished set holds already, as far as an addition must know it: keys, the split of every ground cell, sites that lie near.

The index is read some thousand rows at a time. Of every site 8 bytes are kept (a hash of its key; two of 20 million sites share one with a
probability of 1e-5), of every ground cell its split, and of sites beside new ones what the buffer needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely

from data_prep.geo import has_place
from data_prep.shards import ShardSet
from data_prep.sources.records import SiteRecord
from data_prep.split import grown_boxes


@dataclass(frozen=True)
class Held:
    """Attributes:
    hashes: of the keys, sorted, uint64; removed: keys that were taken out, and stay out.
    cells: split of every ground cell.
    """

    shardset: ShardSet
    hashes: np.ndarray
    removed: frozenset[str]
    cells: dict[str, str]

    @staticmethod
    def read(shardset: ShardSet, removed: Iterable[str]) -> Held:
        """Raises UsageError for an index that is missing or damaged."""
        hashes, cells = [np.empty(0, np.uint64)], dict[str, str]()
        for batch in shardset.index_batches(["key", "cell", "split"]):
            hashes.append(key_hashes(batch["key"].to_pylist()))
            pairs = pa.table({"cell": batch["cell"], "split": batch["split"]}).group_by(["cell", "split"]).aggregate([])
            cells.update(zip(pairs["cell"].to_pylist(), pairs["split"].to_pylist()))
        return Held(shardset, np.sort(np.concatenate(hashes)), frozenset(removed), cells)

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of these keys the set holds: bool [N]."""
        own = key_hashes(keys)
        if not len(self.hashes):
            return np.zeros(len(own), bool)
        at = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        return self.hashes[at] == own

    def near(self, records: Sequence[SiteRecord], buffer_m: float) -> Iterator[tuple[SiteRecord, str]]:
        """Sites of the set within the buffer of any of these, or that overlap one, and the split of each."""
        placed = [record.bbox_wgs84 for record in records if has_place(record.crs)]
        if not placed:
            return
        tree = shapely.STRtree(np.concatenate([grown_boxes(placed, buffer_m, turn) for turn in (0.0, 360.0, -360.0)]))
        for batch in self.shardset.index_batches(["key", "cell", "split", "crs", "footprint", "bbox"]):
            box = batch["bbox"]
            sides = [box.field(side).to_numpy() for side in ("xmin", "ymin", "xmax", "ymax")]
            sides[2] = sides[2] + 360.0 * (sides[0] > sides[2])
            found, _ = tree.query(shapely.box(*sides), predicate="intersects")
            for row in batch.take(pa.array(np.unique(found))).to_pylist():
                if has_place(row["crs"]):
                    bbox = tuple(row["bbox"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
                    record = SiteRecord(row["key"], row["cell"], row["crs"], tuple(row["footprint"]), bbox, ())
                    yield record, row["split"]


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """uint64 of each key."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys], np.uint64
    )
