"""The ground truth of a simulated site: a map of materials on the hr grid, drawn from a scene category.

Dimension legend: H, W hr pixels · h, w cells of 10 m · M materials · P parcels.
Smooth random fields decide natural borders (shores, woods); a rotated, irregular grid of parcels decides fields; a street
grid with houses fills built-up ground. Scene categories differ in composition AND arrangement and overlap on purpose: a
probe has something true to find, and cannot find all of it in the mean colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.simulate.spectra import (
    ASPHALT,
    BARE,
    BROADLEAF,
    CEREAL,
    CLASS_OF_MATERIAL,
    CONIFER,
    GRASS,
    MAIZE,
    MATERIALS,
    RAPE,
    ROOF,
    WATER,
)

CELL_PX = 32  # hr pixels per 10 m cell: 0.3125 m each


@dataclass(frozen=True)
class SceneType:
    """Mean shares of (water, fields, broadleaf, conifer, built, bare); fields split into grass and crops by `grass`.

    parcel_m: mean side of a field. relief_m: correlation length of natural borders.
    """

    shares: tuple[float, float, float, float, float, float]
    grass: float
    parcel_m: float
    relief_m: float


SCENES: dict[str, SceneType] = {
    "lake": SceneType((0.60, 0.12, 0.10, 0.08, 0.04, 0.06), 0.6, 60, 90),
    "open-cropland": SceneType((0.02, 0.82, 0.05, 0.03, 0.04, 0.04), 0.1, 140, 60),
    "small-fields": SceneType((0.02, 0.80, 0.07, 0.03, 0.05, 0.03), 0.4, 35, 50),
    "pasture": SceneType((0.04, 0.76, 0.09, 0.05, 0.03, 0.03), 0.92, 80, 50),
    "broadleaf-forest": SceneType((0.03, 0.14, 0.64, 0.14, 0.02, 0.03), 0.7, 60, 80),
    "conifer-forest": SceneType((0.04, 0.10, 0.14, 0.64, 0.02, 0.06), 0.7, 60, 80),
    "village": SceneType((0.02, 0.46, 0.12, 0.05, 0.32, 0.03), 0.6, 45, 60),
    "town": SceneType((0.03, 0.09, 0.08, 0.03, 0.72, 0.05), 0.9, 40, 90),
}


@dataclass
class Ground:
    """A site's truth.

    Attributes:
        material_HW: uint8 index into MATERIALS on the hr grid.
        gain_HW: float32 brightness of the pixel's parcel, roof or stand relative to its material, around 1.
        rows_HW: float32 phase of field rows, radians.
        shares_hwM: float32 share of each material in each 10 m cell; sums to 1.
        landcover_hw: int16 class of most of the cell's area.
        moisture_db: how much stronger than usual the site's radar echo is.
    """

    material_HW: np.ndarray
    gain_HW: np.ndarray
    rows_HW: np.ndarray
    shares_hwM: np.ndarray
    landcover_hw: np.ndarray
    moisture_db: float = 0.0


def draw_ground(scene: str, side_m: int, rng: np.random.Generator) -> Ground:
    """Draws one site of a scene category. `side_m` is a multiple of 10."""
    kind, pixels = SCENES[scene], side_m // 10 * CELL_PX
    material, gain, rows = _fields(kind, pixels, rng)
    _paint_nature(material, gain, kind, rng)
    return ground_of(material, gain, rows)


def ground_of(material: np.ndarray, gain: np.ndarray, rows: np.ndarray, moisture_db: float = 0.0) -> Ground:
    """The truth of a finished map: shares and majority class of each 10 m cell."""
    shares = _cell_shares(material)
    by_class = np.stack([shares[..., c == CLASS_OF_MATERIAL].sum(-1) for c in range(CLASS_OF_MATERIAL.max() + 1)], -1)
    return Ground(material, gain, rows, shares, by_class.argmax(-1).astype(np.int16), moisture_db)


def smooth_noise(pixels: int, knots: int, rng: np.random.Generator) -> np.ndarray:
    """[pixels, pixels] float32 random field with `knots` values per side between its borders, cubic between them, std ~1."""
    knots = max(1, knots)
    coarse = rng.standard_normal((knots + 3, knots + 3), dtype=np.float32)
    weights = _spline_weights(pixels, knots)
    return 1.6 * (weights @ coarse @ weights.T)


def _spline_weights(pixels: int, knots: int) -> np.ndarray:
    """[pixels, knots + 3] uniform cubic B-spline weights at pixel centres."""
    at = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels * knots
    base = np.minimum(at.astype(np.int64), knots - 1)
    t = at - base
    parts = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    weights = np.zeros((pixels, knots + 3), np.float32)
    np.put_along_axis(weights, base[:, None] + np.arange(4), parts.astype(np.float32), 1)
    return weights


def rotated_metres(pixels: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances in metres along two perpendicular axes, turned by `angle`."""
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * (10 / CELL_PX)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return axis[None] * cos + axis[:, None] * sin, axis[:, None] * cos - axis[None] * sin


def _fields(kind: SceneType, pixels: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parcels of grass and crops with farm roads between some of them."""
    angle = rng.uniform(0, np.pi / 2)
    u, v = rotated_metres(pixels, angle)
    reach = pixels * 10 / CELL_PX * 1.5
    strips = np.cumsum(kind.parcel_m * rng.uniform(0.6, 1.4, int(2 * reach / kind.parcel_m / 0.6) + 2)) - reach
    strip = np.searchsorted(strips, u.ravel()).reshape(u.shape)
    shift = rng.uniform(-1, 1, len(strips) + 1).astype(np.float32) * kind.parcel_m
    row = np.floor((v + shift[strip] + 4 * reach) / (kind.parcel_m * 1.6)).astype(np.int64)
    parcel = (strip * 1009 + row) % 4096  # a parcel's number in the random tables below
    crops = rng.choice([CEREAL, MAIZE, RAPE], 4096, p=[0.5, 0.3, 0.2])
    table = np.where(rng.random(4096) < kind.grass, GRASS, crops).astype(np.uint8)
    material = table[parcel]
    gain = rng.normal(1, 0.09, 4096).astype(np.float32)[parcel]
    rows = np.where((parcel % 2).astype(bool), u, v) * np.float32(2 * np.pi / 1.5)
    edge = np.abs(u - strips[np.clip(strip, 0, len(strips) - 1)])
    material[(edge < 2.2) & (strip % 3 == 0)] = ASPHALT
    return material, gain, rows


def _paint_nature(material: np.ndarray, gain: np.ndarray, kind: SceneType, rng: np.random.Generator) -> None:
    """Lays water, woods, built-up ground and bare ground over the fields, each on its share of the area."""
    pixels = len(material)
    shares = np.array(kind.shares) * rng.gamma(5.0, 0.2, 6)  # a site departs from its category's mean
    shares /= shares.sum()
    knots = round(pixels * 10 / CELL_PX / kind.relief_m)
    free = np.ones(material.shape, bool)
    for name in rng.permutation(["water", "broadleaf", "conifer", "built", "bare"]):
        share = shares[["water", "fields", "broadleaf", "conifer", "built", "bare"].index(name)]
        field = smooth_noise(pixels, knots, rng) + 0.12 * smooth_noise(pixels, knots * 6, rng)
        sample = field[::8, ::8][free[::8, ::8]]
        if sample.size == 0:
            break
        left = free.mean()
        here = free & (field > np.quantile(sample, max(0.0, 1 - share / max(left, 1e-6))))
        free &= ~here
        if name == "built":
            _paint_built(material, gain, here, rng)
            continue
        material[here] = {"water": WATER, "broadleaf": BROADLEAF, "conifer": CONIFER, "bare": BARE}[name]
        gain[here] = 1 + 0.05 * field[here] / 2


def _paint_built(material: np.ndarray, gain: np.ndarray, here: np.ndarray, rng: np.random.Generator) -> None:
    """Streets on a rotated grid, one house per lot, gardens of grass and some trees around it."""
    u, v = rotated_metres(len(material), rng.uniform(0, np.pi / 2))
    lot_u, lot_v = rng.uniform(14, 24), rng.uniform(16, 28)
    iu, iv = np.floor(u / lot_u).astype(np.int64), np.floor(v / lot_v).astype(np.int64)
    fu, fv = u / lot_u - iu, v / lot_v - iv
    lot = (iu * 613 + iv * 31) % 1024
    margin = rng.uniform(0.08, 0.26, 1024).astype(np.float32)[lot]
    house = (np.abs(fu - 0.5) < 0.5 - margin) & (np.abs(fv - 0.5) < 0.5 - margin) & (rng.random(1024)[lot] < 0.88)
    street = (iu % 3 == 0) & (fu < 0.3) | (iv % 4 == 0) & (fv < 0.28)
    built = np.where(rng.random(1024)[lot] < 0.35, ASPHALT, GRASS).astype(np.uint8)
    built[rng.random(1024)[lot] < 0.1] = BROADLEAF
    built[house] = ROOF
    built[street] = ASPHALT
    roof_gain = np.clip(rng.normal(1, 0.25, 1024), 0.5, 1.7).astype(np.float32)[lot]
    material[here] = built[here]
    gain[here] = np.where(built == ROOF, roof_gain, 1)[here]


def _cell_shares(material: np.ndarray) -> np.ndarray:
    """[h, w, M] share of each material in each cell of CELL_PX x CELL_PX pixels."""
    cells = len(material) // CELL_PX
    index = np.arange(len(material)) // CELL_PX
    flat = (index[:, None] * cells + index[None]) * len(MATERIALS) + material
    counts = np.bincount(flat.ravel(), minlength=cells * cells * len(MATERIALS))
    return (counts / CELL_PX**2).reshape(cells, cells, len(MATERIALS)).astype(np.float32)
