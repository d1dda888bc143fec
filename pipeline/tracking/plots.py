"""Pictures that go with a run: loss curves, and which expert takes how much of which modality. From metrics lines alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.tracking.experts import LOAD


def loss_plot(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """PNG of the loss and its terms over samples seen; None with fewer than two lines."""
    keys = sorted({key for line in lines for key in line if key.split("/")[0] == "loss"})
    if len(lines) < 2 or not keys:
        return None
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows), layout="constrained")
    for number, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, number + 1)
        points = [(line["samples"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2)
        axes.set_title(key, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_xlabel("samples seen", fontsize=8)
    return _png(figure)


def expert_loads(lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str]] | None:
    """Share of tokens [row, expert] at the last line that has loads, and the row names `layer n · modality`."""
    for line in reversed(lines):
        found = {
            match.groups(): float(line[key]) for key in line if line[key] is not None and (match := LOAD.match(key))
        }
        if found:
            rows = sorted({(int(layer), modality) for layer, modality, _ in found})
            experts = 1 + max(int(expert) for _, _, expert in found)
            loads = np.array([[found.get((str(n), m, str(e)), 0.0) for e in range(experts)] for n, m in rows])
            return loads, [f"layer {n} · {m}" for n, m in rows]
    return None


def expert_plot(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """PNG heat map of `expert_loads`; None for a dense model."""
    loads = expert_loads(lines)
    if loads is None:
        return None
    from matplotlib.figure import Figure

    values, names = loads
    figure = Figure(figsize=(1.5 + 0.5 * values.shape[1], 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_title("share of tokens per expert", fontsize=9)
    figure.colorbar(image)
    return _png(figure)


def feature_picture(features_hwD: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: the first three principal components of a site's features as colours (1-99 % stretched)."""
    flat = features_hwD.reshape(-1, features_hwD.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, vt = np.linalg.svd(flat, full_matrices=False)
    parts = np.zeros((len(flat), 3))
    kept = vt[:3]
    parts[:, : len(kept)] = flat @ kept.T
    low, high = np.percentile(parts, [1, 99], axis=0)
    scaled = (parts - low) / np.maximum(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).astype(np.uint8).reshape(*features_hwD.shape[:2], 3)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()
