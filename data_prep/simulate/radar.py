"""Sentinel-1 over a simulated site: multi-look speckled backscatter in dB on ascending and descending orbits."""

from __future__ import annotations

import numpy as np

from data_prep.simulate.landcover import Ground
from data_prep.simulate.spectra import ROOF, backscatter

LOOKS = 4.4  # equivalent number of looks of GRD at 10 m (Sentinel-1 product specification, IW high resolution)


def observe_s1(
    ground: Ground, days: list[int], orbits: list[str], shift_days: float, rng: np.random.Generator
) -> np.ndarray:
    """float32 [T, 2, h, w] VV and VH in dB, NaN = nodata.

    Powers of the materials in a cell add up linearly; speckle multiplies them with Gamma(LOOKS, 1 / LOOKS), drawn per
    pixel, band and date; soil moisture moves a date by about 0.7 dB; houses answer one orbit more than the other by how
    their walls face it; some frames miss a corner or all of the site.
    """
    cells = len(ground.shares_hwM)
    out = np.empty((len(days), 2, cells, cells), np.float32)
    facing = rng.normal(0, 1.2)
    for t, (day, orbit) in enumerate(zip(days, orbits, strict=True)):
        table_db = backscatter(day, shift_days) + rng.normal(0, 0.7) + ground.moisture_db
        table_db[ROOF] += facing if orbit == "ascending" else -facing
        power_hwC = ground.shares_hwM @ (10 ** (table_db / 10)).astype(np.float32)
        power_hwC *= rng.gamma(LOOKS, 1 / LOOKS, power_hwC.shape)
        kind, column = rng.random(), int(rng.integers(1, cells + 1))
        frame = 10 * np.log10(power_hwC).transpose(2, 0, 1)
        if kind < 0.06:
            frame[:, :, :column] = np.nan
        elif kind < 0.09:
            frame[:] = np.nan
        out[t] = frame
    return out
