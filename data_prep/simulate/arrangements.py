"""Scene types that the mean colour does not tell: the same covers in another arrangement, another order of seasons, another roughness.

    arrangement   two covers of a random pair, about half of the ground each       hr, and s2 and s1 where it is coarse
    rows          plants and the ground between them, 4 to 7 m apart               hr alone: a 10 m pixel averages them
    season        one crop calendar against another, equally long green            s2, weaker s1, by the *order* of their dates
    roughness     ploughed and rolled bare soil, the same colour                   s1 alone

Six groups (woods, open ground, vines, fields in rows, fields by season, bare soil). Within one the types have the same covers in the
same shares, and a site's covers vary in brightness and share, so that mean, spread and percentiles of the bands say the group and
little more. Every sensor tells some types that another cannot.
Patterns have a fixed size in metres; larger sites show more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.simulate.landcover import CELL_PX, Ground, ground_of, rotated_metres, smooth_noise
from data_prep.simulate.spectra import (
    ASPHALT,
    BARE,
    BROADLEAF,
    CEREAL,
    CONIFER,
    DOUBLE_CROP,
    EARLY_CROP,
    GRASS,
    LATE_CROP,
    MAIZE,
    MATERIALS,
    ROUGH,
    WATER,
)

Shape = Literal["bands", "patches", "clumps", "ring", "lattice", "straight", "curved", "crossed", "rings", "parcels"]
PERIOD_M = 120.0  # one ring per square of this side


@dataclass(frozen=True)
class HardType:
    """shape: how the two covers of a pair, drawn from `pairs` and put in either role, share the ground."""

    shape: Shape
    pairs: tuple[tuple[int, int], ...]


_WOODS = ((BROADLEAF, GRASS), (CONIFER, GRASS))
_OPEN = ((WATER, GRASS), (GRASS, BARE))
_VINES = ((BROADLEAF, BARE),)
_FIELDS = ((MAIZE, BARE), (CEREAL, BARE))
_SOILS = ((ROUGH, BARE),)

HARD: dict[str, HardType] = {
    "wood-bands": HardType("bands", _WOODS),
    "wood-patches": HardType("patches", _WOODS),
    "wood-clumps": HardType("clumps", _WOODS),
    "open-ring": HardType("ring", _OPEN),
    "open-lattice": HardType("lattice", _OPEN),
    "straight-rows": HardType("straight", _VINES),
    "curved-rows": HardType("curved", _VINES),
    "crossed-rows": HardType("crossed", _FIELDS),
    "ring-rows": HardType("rings", _FIELDS),
    "early-crop": HardType("parcels", ((EARLY_CROP, EARLY_CROP),)),
    "late-crop": HardType("parcels", ((LATE_CROP, LATE_CROP),)),
    "double-crop": HardType("parcels", ((DOUBLE_CROP, DOUBLE_CROP),)),
    "rotated-crops": HardType("parcels", ((EARLY_CROP, LATE_CROP),)),
    "rough-bands": HardType("bands", _SOILS),
    "rough-patches": HardType("patches", _SOILS),
    "rough-ring": HardType("ring", _SOILS),
}


def draw_hard(scene: str, side_m: int, rng: np.random.Generator) -> Ground:
    """Draws one site of a `HARD` type. `side_m` is a multiple of 10."""
    kind, pixels = HARD[scene], side_m // 10 * CELL_PX
    one, two = kind.pairs[rng.integers(len(kind.pairs))]
    if rng.random() < 0.5:
        one, two = two, one
    u, v = rotated_metres(pixels, rng.uniform(0, np.pi))
    parcel = _parcels(u, v, rng)
    share = rng.uniform(0.4, 0.6)
    first = rng.random(1024)[parcel] < share if kind.shape == "parcels" else _first(kind.shape, u, v, share, rng)
    material = np.where(first, one, two).astype(np.uint8)
    brightness = np.clip(rng.normal(1, 0.1, len(MATERIALS)), 0.7, 1.3).astype(np.float32)
    brightness[ROUGH] = brightness[BARE]  # the same soil
    spread = np.clip(rng.normal(1, 0.06, 1024), 0.8, 1.2).astype(np.float32)
    _paint_strays(material, u, rng)
    gain = brightness[material] * spread[parcel] * np.float32(rng.uniform(0.8, 1.12))
    rows = np.where((parcel % 2).astype(bool), u, v) * np.float32(2 * np.pi / 1.5)
    return ground_of(material, gain, rows, moisture_db=float(rng.normal(0, 1.0)))


def _first(shape: Shape, u: np.ndarray, v: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Where the first cover of the pair lies: bool [H, W], about `share` of it; u, v rotated metres."""
    pixels = len(u)
    metres = pixels * 10 / CELL_PX
    if shape in ("patches", "clumps"):
        size = rng.uniform(34, 46) if shape == "patches" else rng.uniform(11, 15)
        field = smooth_noise(pixels, round(metres / size), rng)
        return field > np.quantile(field[::8, ::8], 1 - share)
    if shape == "ring":
        radius, width = _radius(pixels, rng), share * 60
        return np.abs(radius - rng.uniform(33, 38)) < width / 2
    spacing = rng.uniform(4, 7)
    if shape == "bands":
        wave = _wave(u + 4 * smooth_noise(pixels, round(metres / 60), rng), rng.uniform(38, 56), rng)
    elif shape == "lattice":
        period, line = rng.uniform(28, 38), 1 - np.sqrt(1 - share)
        at_u, at_v = (_wave(axis, period, rng) < line for axis in (u, v))
        return at_u | at_v
    elif shape == "straight":
        wave = _wave(u, spacing, rng)
    elif shape == "curved":
        bend = rng.uniform(7, 12) * np.sin(v * (2 * np.pi / rng.uniform(50, 80)) + rng.uniform(0, 6.3))
        wave = _wave(u + bend.astype(np.float32), spacing, rng)
    elif shape == "crossed":
        at_u, at_v = (_wave(axis, spacing * 1.2, rng) < np.sqrt(share) for axis in (u, v))
        return at_u & at_v
    else:
        wave = _wave(_radius(pixels, rng), spacing, rng)
    return wave < share


def _wave(distance: np.ndarray, period: float, rng: np.random.Generator) -> np.ndarray:
    """0..1, rising along each period of a distance in metres."""
    turns = distance / np.float32(period) + np.float32(rng.random())
    return turns - np.floor(turns)


def _radius(pixels: int, rng: np.random.Generator) -> np.ndarray:
    """[H, W] metres to the middle of the ring's square; a site of up to PERIOD_M shows one ring."""
    metres = pixels * 10 / CELL_PX
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * np.float32(10 / CELL_PX)
    middle = metres / 2 + rng.uniform(-12, 12, 2)
    x, y = (
        (axis - at + PERIOD_M / 2) % PERIOD_M - PERIOD_M / 2 if metres > 1.5 * PERIOD_M else axis - at for at in middle
    )
    return np.hypot(x[None], y[:, None]).astype(np.float32)


def _parcels(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of the parcel of each pixel, below 1024: shifted strips 25 to 45 m wide, cut every 40 to 70 m."""
    width, length = rng.uniform(25, 45), rng.uniform(40, 70)
    strip = np.floor(u / width + rng.random()).astype(np.int64)
    shift = rng.random(1024)[strip % 1024]
    return (strip * 131 + np.floor(v / length + shift).astype(np.int64)) % 1024


def _paint_strays(material: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> None:
    """What any of these sites may have: a track, some trees or a pond, up to a tenth of the ground."""
    pixels = len(material)
    field = smooth_noise(pixels, max(2, round(pixels * 10 / CELL_PX / 25)), rng)
    cover = (BROADLEAF, CONIFER, WATER, GRASS)[rng.integers(4)]
    material[field > np.quantile(field[::8, ::8], 1 - rng.uniform(0, 0.08))] = cover
    if rng.random() < 0.4:
        middle = u.mean() + rng.uniform(-30, 30)
        material[np.abs(u - np.float32(middle)) < 1.8] = ASPHALT
