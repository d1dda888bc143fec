"""What the ground looks like: materials, their reflectance in the ten Sentinel-2 bands through the year, their backscatter.

Dimension legend: M materials · C Sentinel-2 bands (storage order of `data_prep.schema`).
Reflectance is x 10000. The figures are round numbers of the size that published spectral libraries give for mid-latitude
ground (dark water, red edge of vegetation, bright bare soil in the short-wave infrared); phenology is the usual double
logistic curve of greenness over the day of year (Beck et al. 2006, eq. 1), mixed linearly between a green and a bare state.
"""

from __future__ import annotations

import numpy as np

CLASSES = ("water", "crop", "grass", "forest-deciduous", "forest-conifer", "built", "bare")

MATERIALS = (
    "water", "cereal", "maize", "rape", "grass", "broadleaf", "conifer", "roof", "asphalt", "bare",
    "early crop", "late crop", "double crop", "rough bare",
)  # fmt: skip
(
    WATER, CEREAL, MAIZE, RAPE, GRASS, BROADLEAF, CONIFER, ROOF, ASPHALT, BARE, EARLY_CROP, LATE_CROP, DOUBLE_CROP, ROUGH,
) = range(len(MATERIALS))  # fmt: skip
CLASS_OF_MATERIAL = np.array([0, 1, 1, 1, 2, 3, 4, 5, 5, 6, 1, 1, 1, 6], np.int16)
SECOND_GREEN = 115.0  # days from the first to the second harvest of the double crop

_SOIL = (900, 1150, 1450, 1750, 2000, 2150, 2300, 2450, 3050, 2650)
_BARE = (1300, 1700, 2200, 2500, 2650, 2750, 2850, 2950, 3700, 3400)
_CROP = (320, 640, 330, 980, 2900, 3800, 4050, 4150, 1950, 950)
#            B02   B03   B04   B05   B06   B07   B08   B8A   B11   B12
_GREEN_MC = np.array([
            [350,  300,  210,  180,  150,  140,  120,  110,  70,   50],
            _CROP,
            [300,  600,  300,  900,  3000, 4000, 4250, 4350, 1750, 800],
            [340,  690,  360,  1050, 2950, 3750, 4000, 4100, 1900, 900],
            [380,  720,  470,  1150, 2600, 3200, 3400, 3500, 2150, 1180],
            [230,  430,  240,  780,  2250, 2950, 3150, 3250, 1550, 720],
            [180,  310,  190,  470,  1300, 1600, 1700, 1750, 830,  390],
            [1250, 1420, 1700, 1850, 1950, 2050, 2120, 2200, 2450, 2300],
            [880,  980,  1060, 1130, 1190, 1240, 1290, 1330, 1430, 1380],
            _BARE,
            _CROP, _CROP, _CROP,
            _BARE,
], np.float32)  # fmt: skip
_BARE_MC = np.array([
            [420,  380,  300,  250,  200,  180,  160,  150,  90,   60],
            _SOIL, _SOIL, _SOIL,
            [650,  880,  1050, 1400, 1850, 2050, 2200, 2400, 2900, 2050],
            [480,  600,  720,  920,  1200, 1350, 1450, 1600, 1950, 1350],
            [170,  280,  190,  430,  1100, 1330, 1400, 1450, 760,  370],
            [1250, 1420, 1700, 1850, 1950, 2050, 2120, 2200, 2450, 2300],
            [880,  980,  1060, 1130, 1190, 1240, 1290, 1330, 1430, 1380],
            _BARE,
            _SOIL, _SOIL, _SOIL,
            _BARE,
], np.float32)  # fmt: skip
# greenness: day of green-up, day of browning, days each takes, greenness in winter
_SEASON_M4 = np.array([
    [130, 260, 25, 0.2], [75, 195, 14, 0.25], [155, 272, 12, 0.0], [60, 190, 14, 0.35], [85, 305, 20, 0.35],
    [112, 298, 10, 0.0], [100, 290, 30, 0.3], [0, 400, 10, 1.0], [0, 400, 10, 1.0], [0, 400, 10, 1.0],
    [75, 165, 7, 0.08], [190, 280, 7, 0.08], [75, 120, 7, 0.08], [0, 400, 10, 1.0],
], np.float32)  # fmt: skip
# backscatter in dB, (VV, VH), green and bare state; the season moves it as it moves greenness
_GREEN_DB_M2 = np.array([
    [-20.5, -27.5], [-12.8, -18.2], [-9.6, -15.2], [-9.2, -14.6], [-12.2, -18.8],
    [-9.4, -14.2], [-8.6, -13.6], [-4.8, -12.6], [-15.5, -23.0], [-12.6, -21.5],
    [-10.2, -15.6], [-10.2, -15.6], [-10.2, -15.6], [-8.2, -17.4],
], np.float32)  # fmt: skip
_BARE_DB_M2 = np.array([
    [-20.5, -27.5], [-11.2, -20.4], [-11.8, -21.0], [-11.4, -19.8], [-13.4, -20.6],
    [-10.6, -16.4], [-8.9, -14.2], [-4.8, -12.6], [-15.5, -23.0], [-12.6, -21.5],
    [-12.0, -20.6], [-12.0, -20.6], [-12.0, -20.6], [-8.2, -17.4],
], np.float32)  # fmt: skip


def greenness(day_of_year: float, shift_days: float = 0.0) -> np.ndarray:
    """[M] in 0..1: double logistic of the day of year; `shift_days` > 0 means a later spring and an earlier autumn."""
    winter_M = _SEASON_M4[:, 3]
    curve_M = _double_logistic(day_of_year, shift_days)
    second = _double_logistic(day_of_year - SECOND_GREEN, shift_days)[DOUBLE_CROP]
    curve_M[DOUBLE_CROP] = max(curve_M[DOUBLE_CROP], second)
    return (winter_M + (1 - winter_M) * curve_M).astype(np.float32)


def _double_logistic(day_of_year: float, shift_days: float) -> np.ndarray:
    rise, fall, pace, _ = _SEASON_M4.T
    up = 1 / (1 + np.exp(-(day_of_year - rise - shift_days) / pace))
    down = 1 / (1 + np.exp((day_of_year - fall + shift_days) / pace))
    return np.asarray(up * down)


def reflectance(day_of_year: float, shift_days: float = 0.0) -> np.ndarray:
    """[M, C] surface reflectance x 10000 on a day; rape flowers yellow for some weeks after its green-up."""
    green_M1 = greenness(day_of_year, shift_days)[:, None]
    table_MC = green_M1 * _GREEN_MC + (1 - green_M1) * _BARE_MC
    flowering = np.exp(-(((day_of_year - shift_days - 122) / 11) ** 2))
    table_MC[RAPE, 1:3] += flowering * np.array([700, 900], np.float32)
    return table_MC


def backscatter(day_of_year: float, shift_days: float = 0.0) -> np.ndarray:
    """[M, 2] mean backscatter in dB, VV and VH."""
    green_M1 = greenness(day_of_year, shift_days)[:, None]
    return green_M1 * _GREEN_DB_M2 + (1 - green_M1) * _BARE_DB_M2
