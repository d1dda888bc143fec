"""Which rows of an index a run takes: the filters of `data.*`, on one batch of rows at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Filters:
    """All that decides which rows are taken, and nothing else: it is part of the name of shared columns. See `DataConfig`."""

    modalities: tuple[str, ...]
    split: str
    require: tuple[str, ...]
    max_cloud: float | None
    date_range: tuple[str, str] | None
    bbox: tuple[float, float, float, float] | None
    unflagged: bool = False

    @staticmethod
    def of(data: DataConfig, modalities: Sequence[str]) -> Filters:
        return Filters(
            tuple(modalities),
            data.split,
            tuple(data.require),
            data.max_cloud,
            data.date_range,
            data.bbox,
            data.unflagged,
        )

    def masks(self, index: pa.RecordBatch) -> Iterator[tuple[str, np.ndarray]]:
        """(what is asked, which rows have it: bool [rows]) of every filter that is set; the same filters for every batch."""
        yield f"modalities {', '.join(self.modalities)}", _num_held(index, self.modalities) > 0
        if self.split:
            yield f"data.split={self.split}", _truth(pc.equal(index["split"], self.split))
        if self.require:
            wanted = set(self.require)
            yield f"data.require={list(self.require)}", _num_held(index, sorted(wanted)) == len(wanted)
        if self.max_cloud is not None:
            clear = pc.less_equal(pc.fill_null(index["cloud"], 0.0), self.max_cloud)
            yield f"data.max_cloud={self.max_cloud}", _truth(clear)
        if self.unflagged:
            # sets from before the column have no corrected date
            known = "flagged_dates" in index.schema.names
            flags = pc.fill_null(index["flagged_dates"], 0) if known else pa.array([0] * len(index))
            yield "data.unflagged=true", _truth(pc.equal(flags, 0))
        if self.date_range is not None:
            first, last = (
                pc.utf8_slice_codeunits(pc.fill_null(index[f"datetime_{end}"], ""), 0, 10) for end in ("start", "end")
            )
            inside = pc.and_(pc.less_equal(first, self.date_range[1]), pc.greater_equal(last, self.date_range[0]))
            yield f"data.date_range={list(self.date_range)}", _truth(inside)
        if self.bbox is not None:
            yield f"data.bbox={list(self.bbox)}", _meets(index, self.bbox)


def _truth(values: pa.BooleanArray) -> np.ndarray:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def _num_held(index: pa.RecordBatch, names: Sequence[str]) -> np.ndarray:
    """How many of the modalities each row has (a row lists none twice): int64 [rows]."""
    lists = index["modalities"]
    row_M = np.repeat(np.arange(len(lists)), pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False))
    found = _truth(pc.is_in(lists.flatten(), pa.array(names, pa.string())))
    return np.bincount(row_M[found], minlength=len(lists))


def _meets(index: pa.RecordBatch, bbox: tuple[float, float, float, float]) -> np.ndarray:
    """Whether a sample's bbox meets `bbox`; either may cross the antimeridian (west > east)."""
    west, south, east, north = sides(index)
    east = np.where(east < west, east + 360, east)
    box_east = bbox[2] + 360 if bbox[2] < bbox[0] else bbox[2]
    meets = np.zeros(len(west), bool)
    for shift in (-360, 0, 360):
        meets |= (west + shift <= box_east) & (east + shift >= bbox[0])
    return meets & (south <= bbox[3]) & (north >= bbox[1])


def sides(index: pa.RecordBatch) -> list[np.ndarray]:
    """West, south, east, north of each row's bbox in degrees: float64 [rows] each."""
    box = index["bbox"]
    return [np.asarray(pc.struct_field(box, side), np.float64) for side in ("xmin", "ymin", "xmax", "ymax")]
