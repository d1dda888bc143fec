"""Do the pixels agree with what the row declares? A wrong unit or a shuffled order is refused before a score exists.

What each check can see, measured on 5 real Sentinel-2 sets and 500 scenes (tests/unit/test_evaluate_radiometry.py has the cases):
spectra are smooth, so the path through the bands in the order of their wavelengths is short: at most 1.9 times the shortest path
there is, while shuffled orders take 2 to 4 times. What it cannot see: two bands of the visible exchanged (B02 and B04).

Legend: P pixels · C bands of the sensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cluster.errors import UsageError
from data_prep.harmonise import backscatter_unit, dark_floors, judge
from data_prep.schema import MODALITIES
from data_prep.sources.records import SourceFault
from pipeline.evaluate.bands import Bands

MIN_PIXELS = 500
LONGEST = 2.1  # path over the declared order / shortest path; shuffled medians are 2.0 to 4.0, true ones 1.0 to 1.9
BETTER = 0.85  # another provider's order with a path this much shorter is the true one
# Orders that providers use: the sensor's own, and the 10 m bands first (TreeSatAI, Earth Engine exports by resolution)
TEN_METRE_FIRST = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")
# Correlation of log reflectance between the bands of `s2`, over 500 scenes of Sentinel-2 L2A (unlabelled/s2_l2a_500.npz, every
# fourth pixel). Only its asymmetry is used: B02 … B12 against B12 … B02.
CORRELATION = np.array([
    [1.00, .87, .93, .63, .29, .26, .26, .25, .46, .62], [.87, 1.00, .92, .90, .68, .65, .65, .64, .78, .85],
    [.93, .92, 1.00, .79, .48, .45, .44, .44, .65, .78], [.63, .90, .79, 1.00, .90, .88, .87, .88, .95, .96],
    [.29, .68, .48, .90, 1.00, 1.00, .99, 1.00, .94, .86], [.26, .65, .45, .88, 1.00, 1.00, .99, 1.00, .94, .84],
    [.26, .65, .44, .87, .99, .99, 1.00, .99, .93, .84], [.25, .64, .44, .88, 1.00, 1.00, .99, 1.00, .94, .85],
    [.46, .78, .65, .95, .94, .94, .93, .94, 1.00, .97], [.62, .85, .78, .96, .86, .84, .84, .85, .97, 1.00],
])  # fmt: skip
REVERSED = 0.95


def check_unit(bands: Bands, raw_PC: np.ndarray, where: str) -> None:
    """Raises UsageError where numbers (bands of the sensor, any pixels of one file) cannot be in the declared unit."""
    numbers = raw_PC[np.isfinite(raw_PC)]
    if not numbers.size:
        return
    top = float(np.percentile(numbers, 99))
    wrong = ""
    if bands.unit == "reflectance x 10000" and 0 < top <= 2.0:
        wrong = f"the 99th percentile is {top:.3g}, as of reflectance 0-1"
    elif bands.unit == "reflectance x 10000" and raw_PC.dtype == np.uint8:
        wrong = "they are 8-bit numbers, as of a picture"
    elif bands.unit == "reflectance" and top > 3.0:
        wrong = f"the 99th percentile is {top:.3g}, as of reflectance x 10000"
    elif bands.unit == "uint8" and raw_PC.dtype == np.uint8 and top <= 1:
        wrong = "none is above 1, as of reflectance or of a mask"
    elif bands.unit in ("dB", "linear"):
        try:
            seen, _ = backscatter_unit(raw_PC.reshape(-1), bands.unit, where)
        except SourceFault as fault:
            wrong = str(fault)
        else:
            wrong = f"they are {seen}" if seen != bands.unit else ""
    if wrong:
        raise UsageError(
            f"{where}: {bands.sensor} is declared in {bands.unit}, but {wrong}; convert the files or mend the row"
        )


def check_set(bands: Bands, samples: Iterable[np.ndarray], where: str) -> list[str]:
    """Checks the pixels of a whole set, [P, C] arrays in the sensor's band order as `to_model` returns them (valid ones only).

    Returns notes worth naming beside a score. Raises UsageError where the band order cannot be the declared one.
    """
    x_PC = np.concatenate([np.asarray(sample, np.float64) for sample in samples] or [np.zeros((0, 1))])
    if len(x_PC) < MIN_PIXELS:
        return (
            [f"{bands.sensor}: {len(x_PC)} pixels are too few to check the band order"] if bands.sensor != "hr" else []
        )
    if bands.sensor == "s1":
        vv, vh = (float(np.median(x_PC[:, i])) for i in range(2))
        if vh > vv:
            raise UsageError(
                f"{where}: VH ({vh:.1f} dB) is above VV ({vv:.1f} dB), which no ground is: the bands of s1 are exchanged; "
                f"declared order: {', '.join(bands.order)}"
            )
        return []
    if bands.sensor != "s2":
        return []
    if fault := order_fault(x_PC):
        raise UsageError(f"{where}: the bands of s2 are not in the declared order {', '.join(bands.order)}: {fault}")
    histograms = {
        band: np.bincount(np.clip(x_PC[:, i], 0, 65535).astype(np.int64), minlength=65536)
        for i, band in enumerate(MODALITIES["s2"].bands)
    }
    evidence = judge(*dark_floors(histograms))
    if evidence.verdict == "present":
        return [
            f"s2: the dark floor is {evidence.floor_dn} in {evidence.band}: the +1000 offset seems to be left in (offset {bands.offset:g} declared)"
        ]
    return []


def order_fault(x_PC: np.ndarray) -> str:
    """Why ten columns of reflectance cannot be B02 … B12 in the sensor's order; empty if they can."""
    names = MODALITIES["s2"].bands
    logs_PC = np.log(np.clip(x_PC[:: max(1, len(x_PC) // 4000)], 1, None))
    apart_CC = np.abs(logs_PC[:, :, None] - logs_PC[:, None, :]).mean(0)
    declared, shortest = _length(apart_CC, range(len(names))), _shortest(apart_CC)
    if declared > LONGEST * shortest:
        return f"the spectrum jumps {declared / shortest:.1f} times as much as the smoothest order of the same numbers"
    for fed, told in ((TEN_METRE_FIRST, names), (names, TEN_METRE_FIRST)):  # the file is one, the row says the other
        if _length(apart_CC, [fed.index(band) for band in told]) < BETTER * declared:
            return f"they look like {', '.join(fed)} read as {', '.join(told)}"
    if logs_PC.std(0).min() > 0:
        found_CC = np.corrcoef(logs_PC.T)
        straight, backwards = (float(np.square(found_CC[::s, ::s] - CORRELATION).mean()) ** 0.5 for s in (1, -1))
        if backwards < REVERSED * straight:
            return "they look like the reverse order"
    return ""


def _length(apart_CC: np.ndarray, path: Iterable[int]) -> float:
    steps = list(path)
    return float(apart_CC[steps[:-1], steps[1:]].sum())


def _shortest(apart_CC: np.ndarray) -> float:
    """Length of the shortest open path through all bands found by nearest neighbours and 2-opt from every start."""
    best = np.inf
    for start in range(len(apart_CC)):
        path, rest = [start], set(range(len(apart_CC))) - {start}
        while rest:
            path.append(min(rest, key=lambda band: apart_CC[path[-1], band]))
            rest.remove(path[-1])
        improved = True
        while improved:
            improved = False
            for i in range(len(path) - 1):
                for j in range(i + 1, len(path)):
                    turned = path[:i] + path[i : j + 1][::-1] + path[j + 1 :]
                    if _length(apart_CC, turned) < _length(apart_CC, path) - 1e-12:
                        path, improved = turned, True
        best = min(best, _length(apart_CC, path))
    return float(best)
