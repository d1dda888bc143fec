"""The optical sensors over a simulated site: Sentinel-2 L2A digital numbers with clouds, and an aerial RGB image.

Dimension legend: T dates · C bands · H, W hr pixels · h, w cells of 10 m · M materials.
"""

from __future__ import annotations

import numpy as np

from data_prep.simulate.landcover import CELL_PX, Ground, smooth_noise
from data_prep.simulate.spectra import (
    ASPHALT,
    BROADLEAF,
    CEREAL,
    CONIFER,
    DOUBLE_CROP,
    EARLY_CROP,
    GRASS,
    LATE_CROP,
    MAIZE,
    MATERIALS,
    RAPE,
    ROOF,
    WATER,
    greenness,
    reflectance,
)

# codes of the cloud raster: any non-zero pixel is unusable
CLOUDED, SHADOWED = 1, 2

# path radiance left by atmospheric correction, per band: haze is blue
_HAZE_C = np.array([260, 200, 150, 130, 110, 100, 90, 85, 40, 25], np.float32)
_CLOUD_C = np.array([7200, 7000, 6900, 6900, 6950, 7000, 7050, 7000, 5200, 4300], np.float32)


def observe_s2(
    ground: Ground, days: list[int], shift_days: float, offsets: list[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Digital numbers uint16 [T, C, h, w] (0 = nodata) and a cloud raster uint8 [T, h, w] (0 = clear).

    DN = reflectance x 10000 - offset, as products state it: `offsets` holds BOA_ADD_OFFSET per date, -1000 or 0.
    Per date: sun and haze of the day, 1.5 % noise, clouds with the shadow they throw, a missing swath corner, or nothing.
    """
    cells = len(ground.shares_hwM)
    gain_hw1 = ground.gain_HW.reshape(cells, CELL_PX, cells, CELL_PX).mean((1, 3))[..., None]
    dn = np.zeros((len(days), len(_HAZE_C), cells, cells), np.uint16)
    clouded = np.zeros((len(days), cells, cells), np.uint8)
    cover = _cloud_covers(len(days), rng)
    for t, day in enumerate(days):
        surface_hwC = (ground.shares_hwM @ reflectance(day, shift_days)) * gain_hw1
        surface_hwC = surface_hwC * rng.normal(1, 0.05) + _HAZE_C * rng.gamma(1.0, 0.35)
        cloud, shadow = _clouds(cells, cover[t], rng)
        surface_hwC *= (1 - 0.55 * shadow)[..., None]
        surface_hwC += cloud[..., None] * (_CLOUD_C * rng.uniform(0.7, 1.1) - surface_hwC)
        surface_hwC *= 1 + 0.015 * rng.standard_normal(surface_hwC.shape, dtype=np.float32)
        numbers = np.clip(np.rint(surface_hwC) - offsets[t], 1, 65535).astype(np.uint16).transpose(2, 0, 1)
        dn[t] = np.where(_missing_corner(cells, rng), 0, numbers)
        clouded[t] = np.where(cloud > 0.15, CLOUDED, np.where(shadow > 0.25, SHADOWED, 0))
    return dn, clouded


def _cloud_covers(num_dates: int, rng: np.random.Generator) -> np.ndarray:
    """Cloud share per date: near half clear, some broken, some overcast; at least two dates of a site stay clear."""
    kinds = rng.choice(3, num_dates, p=[0.5, 0.35, 0.15])
    kinds[rng.choice(num_dates, min(2, num_dates), replace=False)] = 0
    return np.choose(kinds, [np.zeros(num_dates), rng.uniform(0.1, 0.6, num_dates), rng.uniform(0.85, 1, num_dates)])


def _clouds(cells: int, cover: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Opacity of cloud and of its shadow [h, w] in 0..1; the shadow lies 60-200 m away from the sun."""
    field = smooth_noise(cells, max(2, cells // 6), rng)
    reach = int(rng.integers(6, 20))
    east, north = int(rng.integers(3, 10)), int(rng.integers(2, 8))
    if cover <= 0:
        return np.zeros((cells, cells), np.float32), np.zeros((cells, cells), np.float32)
    cloud = np.clip((field - np.quantile(field, 1 - cover)) * 2.5, 0, 1).astype(np.float32)
    shadow = np.roll(cloud, (min(north, reach), -east), (0, 1)) * (1 - cloud)
    return cloud, shadow.astype(np.float32)


def _missing_corner(cells: int, rng: np.random.Generator) -> np.ndarray:
    """True where the swath ends: nothing on most dates, a diagonal cut on some, the whole site on few."""
    kind, angle, depth = rng.random(), rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.5)
    if kind < 0.9:
        return np.full((cells, cells), kind < 0.03)
    axis = (np.arange(cells) + 0.5) / cells * 2 - 1
    return axis[None] * np.cos(angle) + axis[:, None] * np.sin(angle) > depth


_SOWN = (CEREAL, MAIZE, RAPE, EARLY_CROP, LATE_CROP, DOUBLE_CROP)
# texture of each material at hr: (white noise, 1.25 m noise, relief of crowns or waves, crown size m), shares of brightness
_TEXTURE = {
    WATER: (0.02, 0.02, 0.05, 6.0), CEREAL: (0.03, 0.03, 0.0, 4.0), MAIZE: (0.05, 0.05, 0.0, 4.0), RAPE: (0.04, 0.03, 0.0, 4.0),
    GRASS: (0.04, 0.07, 0.0, 4.0), BROADLEAF: (0.06, 0.05, 0.55, 7.0), CONIFER: (0.08, 0.08, 0.6, 3.5),
    ROOF: (0.03, 0.0, 0.0, 4.0), ASPHALT: (0.04, 0.03, 0.0, 4.0),
    EARLY_CROP: (0.03, 0.03, 0.0, 4.0), LATE_CROP: (0.03, 0.03, 0.0, 4.0), DOUBLE_CROP: (0.03, 0.03, 0.0, 4.0),
}  # fmt: skip


def observe_hr(ground: Ground, day: int, shift_days: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, H, W]: colours from the same reflectances as s2 (B04, B03, B02), texture and shadow by material.

    The camera's exposure and colour balance vary from site to site, as they do between flights.
    """
    pixels = len(ground.material_HW)
    rgb_MC = reflectance(day, shift_days)[:, [2, 1, 0]]
    shade = ground.gain_HW * _texture(ground, greenness(day, shift_days), rng)
    shade *= _house_shadow(ground.material_HW)
    balance = rng.normal(1, 0.06, 3).astype(np.float32) * rng.uniform(0.85, 1.2)
    haze = rng.uniform(0, 250)
    out = np.empty((3, pixels, pixels), np.uint8)
    for c in range(3):
        linear = (rgb_MC[:, c][ground.material_HW] * shade + haze) * (balance[c] / 2600)
        out[c] = np.clip(255 * np.sqrt(np.clip(linear, 0, 1)), 1, 255)
    return out


def _texture(ground: Ground, green_M: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[H, W] brightness factor around 1."""
    pixels = len(ground.material_HW)
    metres = pixels * 10 / CELL_PX
    white = rng.standard_normal((pixels, pixels), dtype=np.float32)
    medium = smooth_noise(pixels, round(metres / 1.25), rng)
    large = _hillshade(smooth_noise(pixels, round(metres / 7.0), rng))
    small = _hillshade(smooth_noise(pixels, round(metres / 3.5), rng))
    amounts = np.zeros((len(MATERIALS), 4), np.float32)
    amounts[:, :2] = 0.05, 0.05
    for material, (w, m, relief, size) in _TEXTURE.items():
        amounts[material] = w, m, relief if size > 5 else 0, relief if size <= 5 else 0
    per_pixel = amounts[ground.material_HW]
    factor = (
        1
        + per_pixel[..., 0] * white
        + per_pixel[..., 1] * medium
        + per_pixel[..., 2] * large
        + per_pixel[..., 3] * small
    )
    sown = np.isin(np.arange(len(MATERIALS)), _SOWN) * (0.16 - 0.08 * green_M)
    return np.clip(factor + sown[ground.material_HW].astype(np.float32) * np.sin(ground.rows_HW), 0.25, 2.2)


def _hillshade(height: np.ndarray) -> np.ndarray:
    """Slope towards a sun in the south-east, std ~1."""
    slope = np.zeros_like(height)
    slope[1:, 1:] = height[1:, 1:] - height[:-1, :-1]
    return slope / max(float(slope.std()), 1e-6) * 0.6


def _house_shadow(material: np.ndarray) -> np.ndarray:
    """0.55 in the strip of shadow north-west of roofs (about 3 m), 1 elsewhere."""
    roof = material == ROOF
    thrown = np.zeros_like(roof)
    for step in (3, 6, 9):
        thrown[:-step, :-step] |= roof[step:, step:]
    return np.where(thrown & ~roof, np.float32(0.55), np.float32(1))
