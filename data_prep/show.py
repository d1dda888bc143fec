"""Contact sheet of a shard set: per sample one row with hr, s2 in true colour over time, s1, their masks and label rasters."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA, Series, SiteArrays, band_indices
from data_prep.shards import ShardSet

MASK_COLOURS = {NODATA: "#303030", CLEAR: "#8fc98f", CLOUD: "#f2f2f2"}
NODATA_RGB = (0.85, 0.1, 0.6)  # a colour that no sensor shows, so that a hole never passes for water or shadow


def sheet(shards: ShardSet, samples: int = 8, s2_dates: int = 6, s1_dates: int = 3) -> bytes:
    """PNG of `samples` rows spread evenly over the set. Raises MemberError for a sample that does not read."""
    rows = np.unique(np.linspace(0, shards.num_samples - 1, min(samples, shards.num_samples)).astype(int))
    index = shards.read_index(["shard", "split"])
    sites = [(shards.read_sample(int(row)), index["shard"][int(row)].as_py()) for row in rows]
    return draw(sites, s2_dates, s1_dates)


def draw(sites: Sequence[tuple[SiteArrays, str]], s2_dates: int = 6, s1_dates: int = 3) -> bytes:
    """PNG of (site, caption) rows."""
    names = sorted({name for site, _ in sites for name in site.rasters})
    s2_columns = min(s2_dates, max((len(s.series["s2"].datetimes) for s, _ in sites if "s2" in s.series), default=0))
    s1_columns = min(s1_dates, max((len(s.series["s1"].datetimes) for s, _ in sites if "s1" in s.series), default=0))
    has_hr = any("hr" in site.series for site, _ in sites)
    columns = has_hr + s2_columns + bool(s2_columns) + s1_columns + bool(s1_columns) + len(names)
    figure, axes = plt.subplots(
        len(sites), columns, figsize=(1.75 * columns + 0.4, 2.1 * len(sites) + 0.3), squeeze=False
    )
    for line, (site, caption) in zip(axes, sites):
        cells = iter(line)
        if has_hr:
            _image(next(cells), site.series.get("hr"), "hr", 0)
        _series(cells, site.series.get("s2"), "s2", s2_columns)
        _series(cells, site.series.get("s1"), "s1", s1_columns)
        for name in names:
            _labels(next(cells), site, name)
        scalars = " ".join(f"{name}={_class(site, name, value)}" for name, value in site.scalars.items())
        line[0].set_title(f"{site.key} {scalars}\n{caption}", fontsize=7, loc="left")
    figure.tight_layout(pad=0.4, h_pad=1.0)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return stream.getvalue()


def colours(series: Series, modality: str, date: int) -> np.ndarray:
    """[H, W, 3] in 0-1 of one date: the bands and value range of `ModalitySpec`, nodata in magenta."""
    spec = MODALITIES[modality]
    bands = band_indices(modality, spec.shown)
    low, high = spec.shown_range
    image_CHW = (series.pixels_TCHW[date, bands].astype(np.float32) - low) / (high - low)
    if len(set(spec.shown)) == 2:  # two bands (s1): the cross channel is some 7 dB weaker; blue is their difference
        image_CHW[2] = np.clip(image_CHW[0] - image_CHW[1], 0, 1) * 1.7
        image_CHW[1] += 0.27
    image_HWC = np.moveaxis(np.clip(np.nan_to_num(image_CHW), 0, 1), 0, -1)
    if modality == "s2":
        image_HWC = image_HWC ** (1 / 1.6)  # reflectance is linear, a screen is not
    image_HWC[series.mask_THW[date] == NODATA] = NODATA_RGB
    return image_HWC


def chosen_dates(series: Series, number: int) -> list[int]:
    """Up to `number` dates, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, len(series.datetimes) - 1, min(number, len(series.datetimes)))})


def _series(cells: Iterator[Axes], series: Series | None, name: str, columns: int) -> None:
    """`columns` date images and one mask strip."""
    if not columns:
        return
    dates = chosen_dates(series, columns) if series is not None else []
    for i in range(columns):
        _image(next(cells), series if i < len(dates) else None, name, dates[i] if i < len(dates) else 0)
    axis = next(cells)
    _bare(axis)
    if series is None:
        return
    strip = np.concatenate([series.mask_THW[date] for date in dates], axis=1 if len(dates) < 2 else 0)
    axis.imshow(
        strip, cmap=ListedColormap(list(MASK_COLOURS.values())), vmin=0, vmax=2, interpolation="nearest", aspect="auto"
    )
    axis.set_xlabel(f"{name} masks, {np.mean(series.mask_THW == CLEAR):.0%} clear", fontsize=6, labelpad=2)


def _image(axis: Axes, series: Series | None, name: str, date: int) -> None:
    _bare(axis)
    if series is None:
        axis.text(
            0.5, 0.5, f"no {name}", ha="center", va="center", fontsize=7, color="#999999", transform=axis.transAxes
        )
        return
    axis.imshow(colours(series, name, date), interpolation="nearest")
    when = series.datetimes[date][:10] or "date unknown"
    count = f" {date + 1}/{len(series.datetimes)}" if MODALITIES[name].is_series else f" {series.gsd_m:.2g} m"
    axis.set_xlabel(f"{name} {when}{count}", fontsize=6, labelpad=2)


def _labels(axis: Axes, site: SiteArrays, name: str) -> None:
    _bare(axis)
    if name not in site.rasters:
        return
    raster, classes = site.rasters[name], site.classes.get(name, [])
    count = max(len(classes), int(raster.max()) + 1, 1)
    palette = ListedColormap([plt.get_cmap("tab20")(i % 20) for i in range(count)])
    palette.set_under("#303030")
    axis.imshow(raster, cmap=palette, vmin=-0.5, vmax=count - 0.5, interpolation="nearest")
    labelled = raster[raster >= 0]
    mostly = f", mostly {_class(site, name, int(np.bincount(labelled).argmax()))}" if labelled.size else ""
    axis.set_xlabel(f"{name}{mostly}", fontsize=6, labelpad=2)


def _class(site: SiteArrays, label: str, value: int) -> str:
    names = site.classes.get(label, [])
    return names[value] if 0 <= value < len(names) else str(value)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
