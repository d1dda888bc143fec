"""Whole sites as a `View`, without chance: centred crop, unturned, dates spread evenly, colours as they are.

Dimension legend: B sites · T dates · C bands · H, W canvas pixels.
Works on any `SiteArrays` (a shard's sample, a catalog's site), so probes, `embed` and tests see the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.schema import CLEAR, MODALITIES, Series, SiteArrays
from data_prep.shards import ShardSet
from model.batch import ModalityView, View
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.geometry import GRID_M
from pipeline.reader.views import NEUTRAL, SiteFacts, dates_wanted, plan_whole

WHOLE_DATES = {"s2": 24, "s1": 12}  # a whole-site view shows at most so many, evenly spaced
WHOLE_PX = 64  # and at most so many 10 m pixels per side (or what training sees, if that is more)


def whole_view(shardset: ShardSet, rows: Sequence[int], trained: ViewConfig) -> ViewConfig:
    """The view that shows whole sites: canvas sides from the largest of `rows`, every date of the one with the most.

    Bounded by WHOLE_PX and WHOLE_DATES. hr keeps the metres per pixel of the training view `trained`; smaller sites, and sites with
    fewer dates, are padded with what is invalid.
    """
    sensors = [name for name in MODALITIES if f"{name}_shape" in shardset.index_columns()]
    table = shardset.read_index(["footprint", *(f"{name}_shape" for name in sensors)]).take(list(rows))
    west, south, east, north = np.array(table["footprint"].to_pylist(), float).T
    largest = int(np.floor(max((east - west).max(), (north - south).max()) / GRID_M + 1e-6))
    side = max(1, min(largest, max(WHOLE_PX, trained.series_px)))
    most = {
        name: max((shape[0] for shape in table[f"{name}_shape"].to_pylist() if shape), default=1) for name in sensors
    }
    dates = {f"{name}_dates": max(1, min(bound, most.get(name, 1))) for name, bound in WHOLE_DATES.items()}
    return ViewConfig(max(1, round(side * trained.hr_px / trained.series_px)), side, **dates)


def view_of_sites(
    sites: Sequence[SiteArrays],
    view: ViewConfig,
    modalities: Sequence[str],
    label: str | None = None,
    min_clear: float = DataConfig().min_clear,
) -> View:
    """The view of whole sites: all modalities cover the centred square of `view.series_px * 10` m.

    What a site lacks (a modality, a date, ground outside its footprint) is invalid. `label`: raster to carry along.
    """
    side_m = view.series_px * GRID_M
    parts = {}
    for name in modalities:
        pixels = view.hr_px if name == "hr" else view.series_px
        parts[name] = _stack(
            [_one_modality(site, name, view, pixels, side_m, min_clear) for site in sites], side_m / pixels
        )
    classes = None
    if label is not None:
        classes = torch.from_numpy(np.stack([_label_canvas(site, label, view.series_px) for site in sites]))
    return View(
        parts,
        torch.tensor(NEUTRAL).repeat(len(sites), 1),
        classes,
        torch.full((len(sites),), side_m, dtype=torch.float32),
    )


def _one_modality(
    site: SiteArrays, name: str, view: ViewConfig, pixels: int, side_m: float, min_clear: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float]]:
    """x [T, C, H, W], valid [T, H, W], day of year [T], and the crop's west and north edge in site metres."""
    dates = dates_wanted(view, name) if MODALITIES[name].is_series else 1
    dtype = torch.float32 if name == "s1" else getattr(torch, MODALITIES[name].dtype)
    x = torch.zeros(dates, len(MODALITIES[name].bands), pixels, pixels, dtype=dtype)
    valid = torch.zeros(dates, pixels, pixels, dtype=torch.bool)
    doy = torch.zeros(dates, dtype=torch.int16)
    west, south, east, north = site.footprint
    width_m, height_m = east - west, north - south
    x0, y0 = (float(np.floor((room - side_m) / 2 / GRID_M) * GRID_M) for room in (width_m, height_m))
    series = site.series.get(name)
    if series is None:
        return x, valid, doy, (x0, y0)
    for t, date in enumerate(chosen_dates(site, name, view, min_clear)):
        x[t], valid[t] = _canvas(series, date, x0, y0, side_m, pixels, dtype)
        doy[t] = _day_of_year(series.datetimes[date])
    return x, valid, doy, (x0, y0)


def chosen_dates(site: SiteArrays, name: str, view: ViewConfig, min_clear: float) -> list[int]:
    """Indices of the dates of a modality that a view shows, ascending."""
    west, south, east, north = site.footprint
    clear_T = (site.series[name].mask_THW == CLEAR).mean((1, 2))
    plan = plan_whole(SiteFacts(east - west, north - south, {name: clear_T}), view, min_clear)
    return [int(date) for date in plan.dates[name][: dates_wanted(view, name)]]


def _canvas(
    series: Series, date: int, x0_m: float, y0_m: float, side_m: float, pixels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One date on the canvas. Source pixels are averaged where they are finer than the canvas, else the nearest is taken;
    a canvas pixel is valid if all its source pixels are."""
    gsd = series.transform[0]
    rows, columns = (
        (y0_m + (np.arange(pixels) + 0.5) * side_m / pixels) / gsd,
        (x0_m + (np.arange(pixels) + 0.5) * side_m / pixels) / gsd,
    )
    height, width = series.mask_THW.shape[1:]
    source = torch.from_numpy(np.nan_to_num(series.pixels_TCHW[date].astype(np.float32)))
    clear = torch.from_numpy(series.mask_THW[date] == CLEAR)
    factor = side_m / pixels / gsd
    if factor > 1.01:  # finer source: average over the canvas pixel's footprint
        n = max(1, round(side_m / gsd))
        top, left = round(y0_m / gsd), round(x0_m / gsd)
        room = (
            -left,
            left + n - width,
            -top,
            top + n - height,
        )  # ground outside the site is padded, or cut off where negative
        x = F.adaptive_avg_pool2d(F.pad(source, room), pixels)
        valid = F.adaptive_avg_pool2d(F.pad(clear.float()[None], room), pixels)[0] > 0.999
        return _cast(x, dtype), valid
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = torch.from_numpy(((r >= 0) & (r < height))[:, None] & ((c >= 0) & (c < width))[None])
    r, c = np.clip(r, 0, height - 1), np.clip(c, 0, width - 1)
    return _cast(source[:, r][:, :, c], dtype), clear[r][:, c] & inside


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if dtype.is_floating_point else x.round().to(dtype)


def _stack(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float]]], gsd_m: float
) -> ModalityView:
    affines = [[[gsd_m, 0.0, x0], [0.0, gsd_m, y0]] for _, _, _, (x0, y0) in parts]
    return ModalityView(
        torch.stack([x for x, _, _, _ in parts]), torch.stack([valid for _, valid, _, _ in parts]),
        torch.stack([doy for _, _, doy, _ in parts]), torch.full((len(parts),), gsd_m, dtype=torch.float32),
        torch.tensor(affines, dtype=torch.float64),
    )  # fmt: skip


def _label_canvas(site: SiteArrays, label: str, pixels: int) -> np.ndarray:
    """int16 [pixels, pixels] of the centred square on the 10 m grid, -1 = unlabelled or outside."""
    canvas = np.full((pixels, pixels), -1, np.int16)
    raster = site.rasters.get(label)
    if raster is None:
        return canvas
    height, width = raster.shape
    west, south, east, north = site.footprint
    top, left = (int(np.floor((room - pixels * GRID_M) / 2 / GRID_M)) for room in (north - south, east - west))
    r0, c0, r1, c1 = max(top, 0), max(left, 0), min(top + pixels, height), min(left + pixels, width)
    if r1 > r0 and c1 > c0:
        canvas[r0 - top : r1 - top, c0 - left : c1 - left] = raster[r0:r1, c0:c1]
    return canvas


def _day_of_year(text: str) -> int:
    """1-366; 0 for an unknown date."""
    try:
        return datetime.fromisoformat(text).timetuple().tm_yday
    except ValueError:
        return 0
