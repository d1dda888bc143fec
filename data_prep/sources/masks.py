"""Mask rasters of every kind → validity codes: NODATA, CLEAR, CLOUD."""

from __future__ import annotations

import functools

import numpy as np

from data_prep.config import QualityConfig
from data_prep.harmonise import SCL_CLOUD, SCL_NODATA
from data_prep.schema import CLEAR, CLOUD, NODATA

# A mask that says no more than "cloud" has a handful of codes; one with numbers between these is a probability in percent.
PROBABILITY_RANGE = (10, 100)
# Landsat Collection 2 QA_PIXEL: bit 0 is fill; 1 dilated cloud, 2 cirrus, 3 cloud, 4 cloud shadow
QA_FILL, QA_CLOUD = 0b1, 0b11110


def mask_codes(values_HW: np.ndarray, kind: str, quality: QualityConfig) -> np.ndarray:
    """Codes uint8 [h, w] of a mask of one of `records.MASKS`; clouds grown by `quality.cloud_dilate_px`.

    A probability is in percent or a share of 1, a clear score a share of 1 or in percent; NaN is NODATA.
    """
    if kind == "scl":
        codes = scl_codes(values_HW)
    elif kind == "qa_pixel":
        bits = values_HW.astype(np.int64)
        codes = np.where(bits & QA_CLOUD, CLOUD, CLEAR).astype(np.uint8)
        codes[(bits & QA_FILL) != 0] = NODATA
    elif kind == "cloud":
        codes = np.where(values_HW != 0, CLOUD, CLEAR).astype(np.uint8)
    else:
        share = values_HW.astype(np.float32) / (100.0 if values_HW.dtype.kind in "ui" else 1.0)
        if kind == "cloud_probability":
            cloudy = share >= np.float32(quality.cloud_probability / 100)
        else:
            cloudy = share < np.float32(quality.clear_score)
        codes = np.where(cloudy, CLOUD, CLEAR).astype(np.uint8)
        codes[~np.isfinite(share)] = NODATA
    return grown(codes, quality.cloud_dilate_px)


def grown(codes_HW: np.ndarray, pixels: int) -> np.ndarray:
    """CLOUD grown over CLEAR by a disc of `pixels`; NODATA stays."""
    if not pixels or not (codes_HW == CLOUD).any():
        return codes_HW
    cloudy = codes_HW == CLOUD
    height, width = cloudy.shape
    padded, wide = np.pad(cloudy, pixels), np.zeros_like(cloudy)
    for row in range(-pixels, pixels + 1):
        reach = int((pixels**2 - row**2) ** 0.5)
        for col in range(-reach, reach + 1):
            wide |= padded[pixels + row : pixels + row + height, pixels + col : pixels + col + width]
    return np.where(wide & (codes_HW == CLEAR), CLOUD, codes_HW).astype(np.uint8)


def told_by_numbers(kind: str, sample: np.ndarray) -> str:
    """The kind of a mask whose numbers show it to be another: a "cloud" raster that holds percentages is a probability."""
    if kind != "cloud" or sample.size == 0:
        return kind
    low, high = PROBABILITY_RANGE
    between = np.unique(sample[(sample > low) & (sample < high)])
    return "cloud_probability" if len(between) >= 2 and sample.max() <= high else kind


def scl_codes(scl: np.ndarray) -> np.ndarray:
    """Validity codes of a Sentinel-2 scene classification: nodata and defective → NODATA, cloud, shadow, cirrus → CLOUD."""
    return _scl_table()[np.minimum(scl.astype(np.int64), 255)]


@functools.cache
def _scl_table() -> np.ndarray:
    table = np.full(256, CLEAR, dtype=np.uint8)
    table[list(SCL_NODATA)] = NODATA
    table[list(SCL_CLOUD)] = CLOUD
    return table
