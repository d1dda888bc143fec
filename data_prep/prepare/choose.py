"""Which images of one sensor every site gets: pure functions of facts, nothing is read.

One overpass is one date: items of one solar day, orbit and platform belong together, whether a provider cut them into tiles or not. The
tile that covers the site wholly is taken (of twins the latest processing); only where none does, several are, for the reader to mosaic.
Dates are spread over the time asked for: it is cut into periods, every period's best image comes first (least cloud, then most of the
site covered), then every period's second best, and so on. The first `dates` are chosen, the next `spares` are ranked replacements.
hr: the image that covers most of the site (to a percent), the newest of equals.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import shapely

from data_prep.config import SensorConfig
from data_prep.prepare.items import placed

WHOLE = 0.999  # of a site: outlines in degrees, rounded by the provider
Image = tuple[int, ...]  # rows of the items that make one date


@dataclass(frozen=True)
class Choice:
    """Per site: chosen dates in order of time, spares in order of rank. why: "" or why the site has too few."""

    images: list[list[Image]]
    spares: list[list[Image]]
    why: list[str]


@dataclass
class _Dates:
    """Candidate dates (overpasses) of all sites, one row each."""

    site: np.ndarray
    time: np.ndarray
    cloud: np.ndarray
    cover: np.ndarray
    orbit: np.ndarray
    images: list[Image] = field(default_factory=list)

    def take(self, chosen: np.ndarray) -> _Dates:
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return _Dates(
            self.site[rows], self.time[rows], self.cloud[rows], self.cover[rows], self.orbit[rows], [self.images[i] for i in rows],
        )  # fmt: skip


def choose(sites: np.ndarray, lon: np.ndarray, items: pa.Table, sensor: SensorConfig, is_series: bool) -> Choice:
    """The dates of every site.

    Args:
        sites: polygons in degrees [S]; lon: longitudes of their centres, for the solar day.
        items: facts of the items of one sensor (`prepare.items`), sorted by time and id.
    """
    dates = _overpasses(sites, lon, items, sensor)
    dates = dates.take(dates.cover >= sensor.min_cover)
    if sensor.one_orbit:
        dates = dates.take(_main_orbit(dates, len(sites)))
    order = _ranked(dates, sensor) if is_series else _ranked_images(dates)
    dates = dates.take(order)
    wanted = sensor.dates if is_series else 1
    images: list[list[Image]] = [[] for _ in sites]
    spares: list[list[Image]] = [[] for _ in sites]
    times: list[list[int]] = [[] for _ in sites]
    for site, time, image in zip(dates.site.tolist(), dates.time.tolist(), dates.images):
        if len(images[site]) < wanted:
            images[site].append(image)
            times[site].append(time)
        elif len(spares[site]) < sensor.spares:
            spares[site].append(image)
    images = [[own[i] for i in np.argsort(when, kind="stable")] for own, when in zip(images, times)]
    least = min(sensor.min_dates, wanted)
    why = ["" if len(own) >= least else f"{len(own)} dates, min_dates={least}" for own in images]
    return Choice(images, spares, why)


def _overpasses(sites: np.ndarray, lon: np.ndarray, items: pa.Table, sensor: SensorConfig) -> _Dates:
    facts = {name: items[name].to_numpy() for name in ("f_time", "f_cloud", "f_orbit")}
    shapes = placed(items["f_geometry"].to_numpy(zero_copy_only=False))
    usable = ~(facts["f_cloud"] > sensor.max_cloud)  # NaN (not said) passes
    if sensor.orbits:
        usable &= np.isin(facts["f_orbit"], sensor.orbits)
    rows = np.flatnonzero(usable)
    site, item = (
        shapely.STRtree(shapes[rows]).query(sites, predicate="intersects") if len(rows) else np.empty((2, 0), int)
    )
    item = rows[item]
    shapely.prepare(shapes)
    cover = shapely.covers(shapes[item], sites[site]).astype(float)
    part = cover < 1
    cover[part] = shapely.area(shapely.intersection(shapes[item[part]], sites[site[part]])) / shapely.area(
        sites[site[part]]
    )
    cover[cover >= WHOLE] = 1.0
    touched = cover > 0
    site, item, cover = site[touched], item[touched], cover[touched]
    passes = (
        np.unique(items["f_pass"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
        if len(items)
        else np.empty(0, int)
    )
    version = (
        np.unique(items["f_version"].to_numpy(zero_copy_only=False), return_inverse=True)[1] if len(items) else passes
    )
    day = np.floor_divide(facts["f_time"][item] + np.round(lon[site] * 240).astype(np.int64), 86_400)
    orbit = facts["f_orbit"][item].astype(np.int64)
    code = (site, day, orbit, passes[item])
    order = np.lexsort((item, -version[item], -cover, passes[item], orbit, day, site))
    site, item, cover = site[order], item[order], cover[order]
    same = np.ones(len(order), bool)
    for key in code:
        same &= key[order] == np.roll(key[order], 1)
    starts = np.flatnonzero(~same) if len(order) else np.empty(0, int)
    if len(order) and (not len(starts) or starts[0] != 0):
        starts = np.concatenate([[0], starts])
    ends = np.append(starts[1:], len(order))
    first = item[starts]
    dates = _Dates(
        site[starts], facts["f_time"][first], facts["f_cloud"][first].astype(float), cover[starts].copy(), facts["f_orbit"][first],
        [(int(i),) for i in first],
    )  # fmt: skip
    for number in np.flatnonzero((dates.cover < 1) & (ends - starts > 1)):
        members = item[starts[number] : ends[number]]
        dates.images[number], dates.cover[number] = _mosaic(members, shapes, sites[dates.site[number]])
    return dates


def _mosaic(members: np.ndarray, shapes: np.ndarray, site: shapely.Geometry) -> tuple[Image, float]:
    """(rows that together cover most of the site, share): each adds at least WHOLE's slack to those before it."""
    joined, chosen, share = shapely.Polygon(), [], 0.0
    for row in members:
        grown = shapely.union(joined, shapely.intersection(shapes[row], site))
        now = shapely.area(grown) / shapely.area(site)
        if now > share + 1 - WHOLE:
            joined, share = grown, now
            chosen.append(int(row))
        if share >= WHOLE:
            return tuple(sorted(chosen)), 1.0
    return tuple(sorted(chosen)), share


def _main_orbit(dates: _Dates, count: int) -> np.ndarray:
    """Dates of each site's most frequent orbit (of equals the lowest number)."""
    pairs, inverse, number = np.unique(
        np.stack([dates.site, dates.orbit.astype(np.int64)]), axis=1, return_inverse=True, return_counts=True
    )
    best = np.full(count, -1)
    for pair in np.lexsort((-pairs[1], number)):
        best[pairs[0][pair]] = pair
    return best[dates.site] == inverse.reshape(-1)


def _ranked(dates: _Dates, sensor: SensorConfig) -> np.ndarray:
    """Order: by site; every period's best, every period's second best, …; among those the clearest first."""
    site, time = dates.site, dates.time
    if not len(site):
        return np.empty(0, int)
    cloud = np.nan_to_num(dates.cloud, nan=50.0)  # not said: neither clear nor cloudy
    first, last = _window(site, time, sensor)
    if sensor.period_days is not None:
        period = np.floor_divide(time - first, int(sensor.period_days * 86_400))
    else:
        period = np.minimum(np.floor_divide((time - first) * sensor.dates, last - first + 1), sensor.dates - 1)
    order = np.lexsort((time, -dates.cover, cloud, period, site))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(site[order]) != 0) | (np.diff(period[order]) != 0)
    place = np.arange(len(order)) - np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    level = np.empty(len(order), int)
    level[order] = place
    return np.lexsort((time, -dates.cover, cloud, level, site))


def _ranked_images(dates: _Dates) -> np.ndarray:
    cloud = np.nan_to_num(dates.cloud, nan=50.0)
    return np.lexsort((cloud, -dates.time, -np.round(dates.cover, 2), dates.site))


def _window(site: np.ndarray, time: np.ndarray, sensor: SensorConfig) -> tuple[np.ndarray, np.ndarray]:
    """First and last second of the time to spread over, per date: as configured, else what the site's dates span."""
    size = int(site.max()) + 1
    first, last = np.full(size, np.iinfo(np.int64).max), np.full(size, np.iinfo(np.int64).min)
    np.minimum.at(first, site, time)
    np.maximum.at(last, site, time)
    begin, end = first[site], last[site]
    if sensor.start:
        begin = np.full(len(site), seconds_of(sensor.start))
    if sensor.end:
        end = np.full(len(site), seconds_of(sensor.end) + 86_399)
    return begin, end


def seconds_of(day: str) -> int:
    """The first second of a day in UTC."""
    return int(dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC).timestamp())
