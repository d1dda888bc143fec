"""Splits by place: a ground cell's hash decides train, val or probe, and a buffer keeps the splits apart.

Random splits leak: neighbouring tiles share weather, sensor passes and often ground. Here a cell is wholly in one split, which
one does not depend on what else is in the catalog (a set that grows keeps its splits), and sites of a training split that
lie within `buffer_m` of an evaluation site are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import shapely

from data_prep.config import SPLITS, SplitConfig
from data_prep.geo import METRES_PER_DEGREE, ground_cell, has_place, transformer
from data_prep.sources.records import SiteRecord

OVERLAP_SHARE = 0.02  # edges that only touch overlap by rounding; more than this share of a site is a real overlap


class Standing(Protocol):
    """Sites of an older part of a set (`data_prep.held`)."""

    @property
    def cells(self) -> Mapping[str, str]:
        """Split of every ground cell that has a site."""

    def near(self, records: Sequence[SiteRecord], buffer_m: float) -> Iterable[tuple[SiteRecord, str]]:
        """Its sites (and their splits) within the buffer of any of these."""


@dataclass(frozen=True)
class SplitResult:
    """splits: per record its split, or "" if it is left out by the buffer. report: goes to the manifest."""

    splits: list[str]
    report: dict[str, Any]


def assign(records: Sequence[SiteRecord], config: SplitConfig, held: Standing | None = None) -> SplitResult:
    """Split of every record, with the buffer applied.

    held: sites that stand already, in an older part of the set. They keep their splits: a new site of their cell joins them, and one
    within the buffer of a site of another split is left out.
    """
    known = held.cells if held is not None else {}
    cells = [cell_of(record, config) for record in records]
    drawn = {cell: known.get(cell) or draw(cell, config) for cell in dict.fromkeys(cells)}
    if len({*drawn, *known}) < config.min_cells and config.fractions.get(SPLITS[0], 0) > 0:
        # a handful of places cannot be split by place: an evaluation of one site says nothing
        drawn = {cell: known.get(cell, SPLITS[0]) for cell in drawn}
    splits = [drawn[cell] for cell in cells]
    before, overlapping = near_pairs(records, splits, config.buffer_m)
    losers = {min(pair, key=lambda i: SPLITS.index(splits[i])) for pair in before}
    if held is not None:
        near = list(held.near(records, config.buffer_m))
        joined = [*records, *(record for record, _ in near)], [*splits, *(split for _, split in near)]
        pairs, across = near_pairs(*joined, config.buffer_m)
        mixed = [pair for pair in pairs if (pair[0] < len(records)) != (pair[1] < len(records))]
        before, overlapping = [*before, *mixed], max(overlapping, across)
        losers |= {min(pair) for pair in mixed}
    kept = ["" if i in losers else split for i, split in enumerate(splits)]
    remaining = [i for i, split in enumerate(kept) if split]
    after, _ = near_pairs([records[i] for i in remaining], [kept[i] for i in remaining], config.buffer_m)
    report = {
        "buffer_m": config.buffer_m,
        "cells": {split: sum(1 for its in drawn.values() if its == split) for split in SPLITS},
        "pairs_overlapping": overlapping,
        "pairs_within_buffer": len(before),
        "left_out": {split: sum(1 for i in losers if splits[i] == split) for split in SPLITS},
        "pairs_within_buffer_after": len(after),
    }
    return SplitResult(kept, report)


def cell_of(record: SiteRecord, config: SplitConfig) -> str:
    """The ground cell that decides: the catalog's, or one of `cell_m` around the centre. Without a place: the catalog's group."""
    if record.cell and (config.cell_m is None or not has_place(record.crs)):
        return record.cell
    west, south, east, north = record.bbox_wgs84
    middle = (west + east + (360 if west > east else 0)) / 2
    lon = (middle + 180) % 360 - 180
    return ground_cell(lon, (south + north) / 2, (config.cell_m or 10_000.0) / 1000)


def draw(cell: str, config: SplitConfig) -> str:
    """The split of a cell: its hash is a number in [0, 1) that falls into one of the fractions."""
    digest = hashlib.sha256(f"{config.seed}:{cell}".encode()).digest()
    number, bound = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    chosen = [split for split in SPLITS if config.fractions.get(split, 0) > 0]
    for split in chosen:
        bound += config.fractions[split]
        if number < bound:
            return split
    return chosen[-1]


def near_pairs(
    records: Sequence[SiteRecord], splits: Sequence[str], buffer_m: float
) -> tuple[list[tuple[int, int]], int]:
    """(pairs of sites of different splits that are nearer than `buffer_m` or overlap, how many of them overlap).

    Made-up coordinates are near nothing: patches without a place are kept apart by their groups alone.
    """
    placed = [has_place(record.crs) for record in records]
    evaluation = [i for i, split in enumerate(splits) if split != SPLITS[0] and placed[i]]
    if not evaluation:
        return [], 0
    boxes = shapely.box(*np.array([_unwrapped(record.bbox_wgs84) for record in records]).T)
    tree = shapely.STRtree(boxes[evaluation])
    found = set()
    for turn in (0.0, 360.0, -360.0):  # the antimeridian has neighbours on its other side
        moved = grown_boxes([record.bbox_wgs84 for record in records], buffer_m, turn)
        for i, j in zip(*tree.query(moved, predicate="intersects")):
            other = evaluation[j]
            if splits[i] != splits[other] and placed[i]:
                found.add((min(int(i), other), max(int(i), other)))
    pairs, overlapping = [], 0
    for i, j in sorted(found):
        distance, share = separation(records[i], records[j])
        overlapping += share > OVERLAP_SHARE
        if distance < buffer_m or share > OVERLAP_SHARE:
            pairs.append((i, j))
    return pairs, overlapping


def grown_boxes(boxes: Sequence[tuple[float, float, float, float]], buffer_m: float, turn: float = 0.0) -> np.ndarray:
    """Boxes in degrees (west, south, east, north), grown by the buffer and a little more, and moved by `turn` degrees of longitude."""
    west, south, east, north = np.array([_unwrapped(box) for box in boxes]).T
    grow_y = buffer_m / METRES_PER_DEGREE * 1.01
    grow_x = grow_y / np.maximum(np.cos(np.radians(np.maximum(abs(south), abs(north)) + grow_y)), 1e-3)
    return shapely.box(west - grow_x + turn, south - grow_y, east + grow_x + turn, north + grow_y)


def separation(one: SiteRecord, other: SiteRecord) -> tuple[float, float]:
    """(distance in metres, overlap as a share of the smaller footprint) of two sites, on the plane around the first."""
    lon0, lat0 = one.bbox_wgs84[0], one.bbox_wgs84[1]
    a, b = (_plane_polygon(record, lon0, lat0) for record in (one, other))
    share = shapely.area(shapely.intersection(a, b)) / max(min(shapely.area(a), shapely.area(b)), 1e-9)
    return float(shapely.distance(a, b)), float(share)


def _plane_polygon(record: SiteRecord, lon0: float, lat0: float) -> shapely.Polygon:
    xmin, ymin, xmax, ymax = record.footprint
    lon, lat = transformer(record.crs, "EPSG:4326").transform([xmin, xmax, xmax, xmin], [ymin, ymin, ymax, ymax])
    east = (np.asarray(lon) - lon0 + 180) % 360 - 180
    scale = math.cos(math.radians(lat0))
    return shapely.Polygon(np.column_stack([east * scale, np.asarray(lat) - lat0]) * METRES_PER_DEGREE)


def _unwrapped(bbox: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    west, south, east, north = bbox
    return west, south, east + (360 if west > east else 0), north
