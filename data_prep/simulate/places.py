"""Where and when simulated sites are seen: footprints on 10 m grids of UTM zones, and real acquisition calendars."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

SITES_PER_PLACE = 2
_ZONES = (31, 32, 33, 34, 35, 36)
_COLUMNS, _ROWS, _STEP_M = 16, 100, 20_000  # places per zone, 20 km apart: a split by place never shares ground
MAX_SITES = len(_ZONES) * _COLUMNS * _ROWS * SITES_PER_PLACE


@dataclass(frozen=True)
class Place:
    """A site's footprint: UTM zone (north), and its bounds (xmin, ymin, xmax, ymax) in metres, multiples of 10."""

    key: str
    zone: int
    bounds: tuple[int, int, int, int]

    @property
    def epsg(self) -> int:
        return 32600 + self.zone


@dataclass(frozen=True)
class Calendar:
    """Acquisitions of one site, ascending in time.

    Attributes:
        s2: times of the Sentinel-2 dates; s2_products: their names; s2_baselines: processing baselines ("03.01", "05.10");
            s2_offsets: BOA_ADD_OFFSET per date, -1000 from baseline 04.00 on, else 0. Reprocessed products (N0500)
            carry it on older acquisitions too: the acquisition date tells nothing.
        s1: times of the Sentinel-1 dates, with products and orbit states.
        hr: time of the flight.
        shift_days: how late this place's spring is.
    """

    s2: list[datetime]
    s2_products: list[str]
    s2_baselines: list[str]
    s2_offsets: list[int]
    s1: list[datetime]
    s1_products: list[str]
    s1_orbits: list[str]
    hr: datetime
    shift_days: float


def place_of(index: int, side_m: int, seed: int) -> Place:
    """Footprint of site number `index`: places are drawn without repetition, their sites stand side by side."""
    slot, member = divmod(index, SITES_PER_PLACE)
    slots = np.random.default_rng([seed, 1]).permutation(MAX_SITES // SITES_PER_PLACE)
    zone, cell = divmod(int(slots[slot]), _COLUMNS * _ROWS)
    row, column = divmod(cell, _COLUMNS)
    x = 350_000 + column * _STEP_M + member * 10 * round(side_m * 1.5 / 10)
    y = 4_450_000 + row * _STEP_M
    key = f"sim{_ZONES[zone]}N_{row:03d}_{column * SITES_PER_PLACE + member:02d}"
    return Place(key, _ZONES[zone], (x, y, x + side_m, y + side_m))


def calendar_of(index: int, place: Place, seed: int, num_s2: int, num_s1: int) -> Calendar:
    """Dates of one year of a site, shared rhythm within a place: s2 every 5 days, s1 every 6 days on alternating orbits."""
    rng = np.random.default_rng([seed, 2, index // SITES_PER_PLACE])
    start = datetime(2021, 1, 1, tzinfo=UTC) + timedelta(days=int(rng.integers(0, 500)))
    reprocessed = rng.random() < 0.4
    orbit, tile = int(rng.integers(1, 143)), f"T{place.zone}U{''.join(rng.choice(list('ABCDEFGH'), 2))}"
    shift = 12 * (place.bounds[1] - 5_450_000) / 1_000_000 + float(rng.normal(0, 5))
    s2 = [start + timedelta(days=int(5 * k), hours=10, minutes=30, seconds=31) for k in _choose(rng, 73, num_s2)]
    baselines = [_baseline(t, reprocessed) for t in s2]
    products = [
        f"S2{'AB'[k % 2]}_MSIL2A_{_stamp(t)}_N{b.replace('.', '')}_R{orbit:03d}_{tile}_{_stamp(t + timedelta(hours=5))}"
        for k, (t, b) in enumerate(zip(s2, baselines, strict=True))
    ]
    slots = _choose(rng, 60, num_s1)
    orbits = ["ascending" if k % 2 else "descending" for k in slots]
    hours = {"ascending": timedelta(hours=17, minutes=8), "descending": timedelta(hours=5, minutes=26)}
    s1 = [start + timedelta(days=6 * k) + hours[o] for k, o in zip(slots, orbits, strict=True)]
    s1_products = [
        f"S1A_IW_GRDH_1SDV_{_stamp(t)}_{_stamp(t + timedelta(seconds=25))}_{40000 + k:06d}"
        for t, k in zip(s1, slots, strict=True)
    ]
    flight = datetime(start.year, 6, 1, 9, 40, tzinfo=UTC) + timedelta(days=int(rng.integers(-60, 100)))
    offsets = [-1000 if b >= "04.00" else 0 for b in baselines]
    return Calendar(s2, products, baselines, offsets, s1, s1_products, orbits, flight, shift)


def day_of_year(time: datetime) -> int:
    """1-366."""
    return time.timetuple().tm_yday


def iso(time: datetime) -> str:
    """`2022-07-06T10:30:31Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _choose(rng: np.random.Generator, slots: int, count: int) -> list[int]:
    return sorted(int(k) for k in rng.choice(slots, min(count, slots), replace=False))


def _baseline(time: datetime, reprocessed: bool) -> str:
    if time >= datetime(2022, 12, 6, tzinfo=UTC):
        return "05.09"
    if reprocessed:
        return "05.00"
    return "04.00" if time >= datetime(2022, 1, 25, tzinfo=UTC) else "03.01"


def _stamp(time: datetime) -> str:
    return time.strftime("%Y%m%dT%H%M%S")
