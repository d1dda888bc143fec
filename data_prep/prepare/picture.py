"""The map of a sites file: where they lie, coloured by split."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from data_prep.config import SPLITS

COLOURS = {"train": "#3465a4", "val": "#e69f00", "probe": "#cc2222"}


def draw_map(
    lon: np.ndarray,
    lat: np.ndarray,
    groups: np.ndarray,
    title: str,
    names: Sequence[str] = SPLITS,
    colours: dict[str, str] = COLOURS,
) -> bytes:
    """PNG of places in degrees, one colour per group; a set across the antimeridian is shown around it."""
    lon = np.asarray(lon, float)
    if lon.size and lon.max() - lon.min() > 180 and not ((lon > -90) & (lon < 90)).any():
        lon = lon % 360
    figure, axis = plt.subplots(figsize=(9, 5.2))
    size = float(np.clip(3000 / max(len(lon), 1), 0.3, 12))
    for name in names:
        chosen = groups == name
        if chosen.any():
            axis.scatter(
                lon[chosen], lat[chosen], s=size, c=colours.get(name), label=name, linewidths=0, rasterized=True
            )
    middle = float(np.mean(lat)) if len(lat) else 0.0
    axis.set_aspect(1 / max(np.cos(np.radians(np.clip(middle, -75, 75))), 0.2), adjustable="datalim")
    axis.set_xlabel("longitude")
    axis.set_ylabel("latitude")
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=9, loc="left")
    if len(lon):
        axis.legend(markerscale=max(6 / size, 1), fontsize=8, loc="best")
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return stream.getvalue()
