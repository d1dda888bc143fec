"""A shard set at a glance: where its samples lie and how good they are; what could not be had, by reason."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from data_prep.config import SPLITS
from data_prep.prepare.picture import COLOURS
from data_prep.schema import MODALITIES
from data_prep.shards import FAULTS, LOSSES, ShardSet
from data_prep.status import kind_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = 200_000  # places on the map


@dataclass
class Overview:
    """sensors: per modality {"samples", "dates" (mean), "clear" (share), "orbits" {name: dates}}; placed: samples with a place.

    lon, lat, split, clear, dates: of those that are shown; clear and dates of the first series.
    """

    placed: int = 0
    sensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(self.columns.get(name, [np.empty(0)]))


def overview(shards: ShardSet) -> Overview:
    """Read from the index, some thousand rows at a time; of large sets every n-th place is kept for the map."""
    found, stride, start = Overview(), max(shards.num_samples // SHOWN, 1), 0
    wanted = ["split", "bbox", "place", *(f"{m}_{what}" for m in MODALITIES for what in ("clear", "orbits"))]
    orbits: dict[str, Counter[str]] = {}
    for batch in shards.index_batches(wanted):
        for name in MODALITIES:
            if f"{name}_clear" in batch.schema.names:
                _count(found, orbits, name, batch)
        placed = pc.is_null(batch["place"]).to_numpy(zero_copy_only=False)
        found.placed += int(placed.sum())
        rows = np.flatnonzero(placed & ((np.arange(start, start + batch.num_rows) % stride) == 0))
        start += batch.num_rows
        _keep(found, batch.take(pa.array(rows)))
    for name, its in found.sensors.items():
        its["clear"] = its.pop("clear_sum") / max(its["dates"], 1)
        its["dates"] = its["dates"] / max(its["samples"], 1)
        its["orbits"] = dict(orbits[name].most_common())
    return found


def _count(found: Overview, orbits: dict[str, Counter[str]], name: str, batch: pa.RecordBatch) -> None:
    shares = batch[f"{name}_clear"]
    lengths = pc.fill_null(pc.list_value_length(shares), 0).to_numpy(zero_copy_only=False)
    if not lengths.any():
        return
    its = found.sensors.setdefault(name, {"samples": 0, "dates": 0, "clear_sum": 0.0})
    its["samples"] += int((lengths > 0).sum())
    its["dates"] += int(lengths.sum())
    its["clear_sum"] += float(np.nansum(shares.flatten().to_numpy(zero_copy_only=False)))
    counts = pc.value_counts(batch[f"{name}_orbits"].flatten()).to_pylist()
    orbits.setdefault(name, Counter()).update({row["values"]: row["counts"] for row in counts if row["values"]})


def _keep(found: Overview, batch: pa.RecordBatch) -> None:
    box = batch["bbox"]
    west, south, east, north = (box.field(side).to_numpy() for side in ("xmin", "ymin", "xmax", "ymax"))
    middle = (west + (east + 360 * (west > east))) / 2
    kept = {
        "lon": (middle + 180) % 360 - 180,
        "lat": (south + north) / 2,
        "split": np.array(batch["split"].to_pylist(), object),
    }
    series = next((m for m in ("s2", *MODALITIES) if m in found.sensors and MODALITIES[m].is_series), None)
    if series is not None:
        shares = batch[f"{series}_clear"]
        lengths = pc.fill_null(pc.list_value_length(shares), 0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(shares.flatten().to_numpy(zero_copy_only=False)))])
        kept |= {"dates": lengths, "clear": (total[ends[1:]] - total[ends[:-1]]) / np.maximum(lengths, 1)}
    for name, values in kept.items():
        found.columns.setdefault(name, []).append(values)


def draw_overview(found: Overview, title: str) -> bytes:
    """PNG: the splits, dates per sample, clear share, and dates per orbit."""
    lon, lat, split = (found.column(name) for name in ("lon", "lat", "split"))
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    size = float(np.clip(3000 / max(len(lon), 1), 0.3, 12))
    for name in SPLITS:
        chosen = split == name
        if chosen.any():
            axes[0, 0].scatter(
                lon[chosen], lat[chosen], s=size, c=COLOURS[name], label=name, linewidths=0, rasterized=True
            )
    axes[0, 0].set_title(f"{title}: {found.placed} samples", fontsize=9, loc="left")
    if len(lon):
        axes[0, 0].legend(markerscale=max(6 / size, 1), fontsize=8)
    for axis, name, label in ((axes[0, 1], "dates", "dates per sample"), (axes[1, 0], "clear", "clear share")):
        values = found.column(name)
        if len(values) == len(lon) and len(lon):
            dots = axis.scatter(lon, lat, s=size, c=values.astype(float), cmap="viridis", linewidths=0, rasterized=True)
            figure.colorbar(dots, ax=axis, shrink=0.8)
        axis.set_title(label, fontsize=9, loc="left")
    bars = [
        (f"{name} {orbit}", count)
        for name, its in found.sensors.items()
        for orbit, count in list(its["orbits"].items())[:8]
    ]
    axes[1, 1].barh([name for name, _ in bars][::-1], [count for _, count in bars][::-1], color="#3465a4")
    axes[1, 1].set_title("dates per orbit", fontsize=9, loc="left")
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100, metadata={"Software": ""})
    plt.close(figure)
    return stream.getvalue()


def faulty(url: str) -> dict[str, list[dict[str, Any]]]:
    """{"sites", "dates"}: what could not be had, as {"why", "count", "first"}, the most frequent reason first."""
    return {kind: _reasons(url, file) for kind, file in (("sites", FAULTS), ("dates", LOSSES))}


def _reasons(url: str, file: str) -> list[dict[str, Any]]:
    try:
        lines = storage.read_bytes(storage.join(url, file)).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for entry in map(json.loads, lines):
        why = kind_of(entry["why"])
        counts[why] += 1
        first.setdefault(why, f"{entry['site']}: {entry['asset']}")
    return [{"why": why, "count": count, "first": first[why]} for why, count in counts.most_common()]
