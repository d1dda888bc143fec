"""What each view of a site shows: crop, turn, dates and colour parameters, drawn as a pure function of a key.

Every view draws from its own key (seed, epoch, sample key, view number), so that pixels do not depend on the layout of the
run, and more local views change nothing for u and v.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.schema import MODALITIES
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.geometry import GRID_M, HR_GRID_M, Crop, origin, overlapping_origin
from pipeline.reader.keyed import uniforms

# Columns of View.photometric_BP; must be model.augment.PHOTOMETRIC (a test holds it). The values here change nothing.
PHOTOMETRIC = (
    "brightness", "contrast", "saturation", "hue", "blur_sigma", "solarize_threshold", "grayscale", "s2_gain", "s1_offset_db",
)  # fmt: skip
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0)

JITTER_SHARE, GRAY_SHARE, BLUR_SHARE, SOLARIZE_SHARE = 0.8, 0.2, 0.5, 0.1  # of the views
STRENGTH = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}  # DINO's (arXiv 2104.14294, appendix)
BLUR_SIGMA = (0.1, 2.0)  # hr pixels
DB_PER_JITTER = 10.0  # of s1: 5 % of reflectance go with half a decibel
MILD = (0.5, 0.5, 1.0, 0.2, 0.5, 0.0, 0.0, 1.0, 1.0)  # shares of the way from NEUTRAL, by column of PHOTOMETRIC


@dataclasses.dataclass(frozen=True)
class SiteFacts:
    """What is known of a site before its pixels are read.

    Attributes:
        width_m, height_m: extent of the footprint on the ground.
        clear: per present modality, the share of clear pixels of each date (its length is the number of dates).
    """

    width_m: float
    height_m: float
    clear: Mapping[str, np.ndarray]

    @property
    def grid_m(self) -> float:
        """Metres between possible edges of a crop: those of the series' pixels, where the site has one."""
        return GRID_M if not self.clear or any(MODALITIES[name].is_series for name in self.clear) else HR_GRID_M


@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """One view of one site. dates: per modality the chosen date indices, ascending. jitter_days: shift of their day of year."""

    crop: Crop
    dates: Mapping[str, np.ndarray]
    jitter_days: Mapping[str, np.ndarray] | None
    photometric_P: np.ndarray


def dates_wanted(view: ViewConfig, modality: str) -> int:
    """Canvas dates of a modality: `<modality>_dates` of the view's config, 1 where it has none (hr)."""
    return int(getattr(view, f"{modality}_dates", 1))


def plan(site: SiteFacts, data: DataConfig, seed: int, epoch: int, key: str) -> list[ViewPlan]:
    """Plans of u, v and the local views of one site."""
    u = _plan_view(site, data, data.views_global, (seed, epoch, key, 0), None)
    v = _plan_view(site, data, data.views_global, (seed, epoch, key, 1), [u.crop])
    crops = [u.crop, v.crop]
    return [u, v, *(
        _plan_view(site, data, data.views_local, (seed, epoch, key, 2 + i), crops) for i in range(data.local_views)
    )]  # fmt: skip


def plan_whole(site: SiteFacts, view: ViewConfig, min_clear: float = 0.0) -> ViewPlan:
    """The plan of a view without chance: the centred crop, unturned, dates spread evenly, colours as they are."""
    side = view.series_px * GRID_M
    x0, y0 = (np.floor((room - side) / 2 / GRID_M) * GRID_M for room in (site.width_m, site.height_m))
    dates = {}
    for modality, clear in site.clear.items():
        usable = np.flatnonzero(clear >= min_clear) if min_clear > 0 else np.arange(len(clear))
        if len(usable) == 0:
            usable = np.arange(len(clear))
        dates[modality] = usable[_evenly(len(usable), dates_wanted(view, modality))]
    return ViewPlan(Crop(float(x0), float(y0), side), dates, None, np.array(NEUTRAL, np.float32))


@functools.lru_cache(maxsize=1024)
def _evenly(there: int, wanted: int) -> np.ndarray:
    return np.linspace(0, there - 1, min(wanted, there)).round().astype(int)


def _plan_view(
    site: SiteFacts, data: DataConfig, view: ViewConfig, key: tuple[int | str, ...], others: list[Crop] | None
) -> ViewPlan:
    """others: none for u, [u] for v, [u, v] for a local view."""
    number_of_dates = sum(len(clear) for clear in site.clear.values())
    draws = uniforms(16 + 2 * number_of_dates, *key)
    side = _side(view, data.scale, draws[0], site.grid_m)
    crop = Crop(*_place(site, side, others, draws[1], draws[2]), side, int(draws[3] * 8))
    dates, jitter, at, days = {}, {}, 16, data.date_jitter_days
    for modality, clear in site.clear.items():
        chosen = choose_dates(clear, dates_wanted(view, modality), data.min_clear, draws[at : at + len(clear)])
        dates[modality] = chosen
        if days:
            spread = draws[at + len(clear) : at + 2 * len(clear)][chosen]
            jitter[modality] = np.floor(spread * (2 * days + 1)).astype(np.int16) - days
        at += 2 * len(clear)
    photometric = draw_photometric(draws[4:16], data.photometric, data.series_jitter)
    return ViewPlan(crop, dates, jitter if days else None, photometric)


def _side(view: ViewConfig, scale: tuple[float, float], u: float, grid_m: float) -> float:
    """Ground side in metres, a multiple of the site's grid: the canvas side times a factor drawn from `scale`."""
    factor = scale[0] + (scale[1] - scale[0]) * u
    return max(1, round(view.series_px * GRID_M / grid_m * factor)) * grid_m


def _place(site: SiteFacts, side: float, others: list[Crop] | None, ux: float, uy: float) -> tuple[float, float]:
    grid = site.grid_m
    if not others:
        return origin(0.0, site.width_m, side, ux, grid), origin(0.0, site.height_m, side, uy, grid)
    if len(others) == 1:
        return (
            overlapping_origin(site.width_m, side, others[0].x0_m, ux, grid),
            overlapping_origin(site.height_m, side, others[0].y0_m, uy, grid),
        )
    # a local view lies in the box around u and v: it shares ground with at least one of them
    west, north = (max(0.0, min(getattr(c, axis) for c in others)) for axis in ("x0_m", "y0_m"))
    east = min(site.width_m, max(c.x0_m + c.side_m for c in others))
    south = min(site.height_m, max(c.y0_m + c.side_m for c in others))
    return origin(west, east, side, ux, grid), origin(north, south, side, uy, grid)


def choose_dates(clear: np.ndarray, wanted: int, min_clear: float, u: np.ndarray) -> np.ndarray:
    """Indices of at most `wanted` dates, ascending: drawn among the dates with enough clear pixels; if those are too few,
    the clearest of the rest; a date without a clear pixel never."""
    priority = np.where(clear >= min_clear, u, 2.0 - clear)
    usable = np.flatnonzero(clear > 0)
    chosen = usable[np.argsort(priority[usable], kind="stable")[:wanted]]
    return np.sort(chosen)


def draw_photometric(u: Sequence[float] | np.ndarray, strength: str = "dino", series_jitter: float = 0.0) -> np.ndarray:
    """float32 [P] from 11 uniforms: colour jitter, blur, solarize and grayscale, each on its share of the views; gain and offset of
    series within ± series_jitter and ± DB_PER_JITTER · series_jitter.

    mild: half of DINO's brightness, contrast and blur, a fifth of its hue, no solarize, no grayscale: what two flights over one
    place differ in. DINO's own strength takes away the colours that tell ground apart.
    """
    values = list(NEUTRAL)
    if series_jitter:
        values[7] += series_jitter * (2 * u[9] - 1)
        values[8] += DB_PER_JITTER * series_jitter * (2 * u[10] - 1)
    if strength == "none":
        return np.array(values, np.float32)
    if u[0] < JITTER_SHARE:
        for index, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            values[index] += STRENGTH[name] * (2 * u[1 + index] - 1)
    if u[5] < BLUR_SHARE:
        values[4] = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[6]
    if u[7] < SOLARIZE_SHARE:
        values[5] = 0.5
    if u[8] < GRAY_SHARE:
        values[6] = 1.0
    if strength == "mild":
        values = [n + share * (v - n) for n, v, share in zip(NEUTRAL, values, MILD)]
    return np.array(values, np.float32)
