"""Which rows of an index a run takes: the filters of `data.*`, on the columns of one set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from cluster.errors import UsageError
from data_prep.columns import UNKNOWN_DAY, Columns
from data_prep.config import SPLITS
from data_prep.schema import MODALITIES
from pipeline.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Filters:
    """All that decides which rows are taken. See `DataConfig`."""

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

    def rows(self, columns: Columns, where: str) -> np.ndarray:
        """Numbers of the rows that pass all filters, ascending: int64.

        Raises UsageError if none is left, naming the filter that removed the last ones. where: URL of the set.
        """
        before = len(columns["shard"])
        if not before:
            raise UsageError(f"{where}: the index is empty")
        keep = np.ones(before, bool)
        for name, mask in self.masks(columns):
            keep &= mask
            left = int(np.count_nonzero(keep))
            if not left:
                raise UsageError(f"{where}: no sample left after {name} ({before} before it)")
            before = left
        first, last = int(keep.argmax()), len(keep) - int(keep[::-1].argmax())
        if last - first == before:  # together, as the rows of a split are
            return np.arange(first, last)
        return np.flatnonzero(keep)

    def masks(self, columns: Columns) -> Iterator[tuple[str, np.ndarray]]:
        """(what is asked, which rows have it: bool [N]) of every filter that is set."""
        held = columns["modalities"]
        yield f"modalities {', '.join(self.modalities)}", (held & _bits(self.modalities)) > 0
        if self.split:
            code = SPLITS.index(self.split) if self.split in SPLITS else -1
            yield f"data.split={self.split}", columns["split"] == code
        if self.require:
            known = all(name in MODALITIES for name in self.require)
            wanted = _bits(self.require)
            yield f"data.require={list(self.require)}", ((held & wanted) == wanted) & known
        if self.max_cloud is not None:
            cloud = np.nan_to_num(columns["cloud"].astype(np.float64))  # as limits are; without s2 nothing is cloudy
            yield f"data.max_cloud={self.max_cloud}", cloud <= self.max_cloud
        if self.unflagged:  # sets from before the column have no corrected date
            yield "data.unflagged=true", ~columns.get("flagged", np.zeros(len(held), bool))
        if self.date_range is not None:
            first, last = (_day(text) for text in self.date_range)
            known_day = columns["day_last"] != UNKNOWN_DAY
            inside = (columns["day_first"] <= last) & (columns["day_last"] >= first)
            yield f"data.date_range={list(self.date_range)}", inside & known_day
        if self.bbox is not None:
            yield f"data.bbox={list(self.bbox)}", _meets(columns, self.bbox)


def _bits(names: Sequence[str]) -> np.uint8:
    return np.uint8(sum(1 << i for i, name in enumerate(MODALITIES) if name in names))


def _day(text: str) -> int:
    """Days since 1970. Raises UsageError."""
    try:
        return int(np.datetime64(text, "D").astype(np.int64))
    except ValueError:
        raise UsageError(f"data.date_range: {text!r} is not a day such as 2021-03-31") from None


def _meets(columns: Columns, bbox: tuple[float, float, float, float]) -> np.ndarray:
    """Whether a sample's bbox meets `bbox`; either may cross the antimeridian (west > east)."""
    west, south, east, north = (columns[side] for side in ("west", "south", "east", "north"))
    east = np.where(east < west, east + 360, east)
    box_east = bbox[2] + 360 if bbox[2] < bbox[0] else bbox[2]
    meets = np.zeros(len(west), bool)
    for shift in (-360, 0, 360):
        meets |= (west + shift <= box_east) & (east + shift >= bbox[0])
    return meets & (south <= bbox[3]) & (north >= bbox[1])
