"""What the numbers in a published file mean, and their way to what the model reads. Declared per row, never guessed from counts.

Dimension legend: T dates · F bands of the file · C bands of the sensor · H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import UsageError
from data_prep.harmonise import Decision, backscatter, reflectance
from data_prep.schema import MODALITIES

Unit = Literal["uint8", "reflectance x 10000", "reflectance", "dB", "linear"]
UNITS: dict[str, tuple[Unit, ...]] = {
    "hr": ("uint8", "reflectance x 10000"), "s2": ("reflectance x 10000", "reflectance"), "s1": ("dB", "linear"),
}  # fmt: skip


@dataclass(frozen=True)
class Bands:
    """How one sensor's pixels lie in the files of a data set.

    Attributes:
        sensor: the modality of the model (`MODALITIES`) that takes them.
        order: name of every band of the file, in file order; those the sensor has no use for are dropped by name.
        unit: what a number means, see UNITS.
        offset: DN added before scaling, e.g. -1000 for Sentinel-2 from processing baseline 04.00 on.
        gsd_m: metres per pixel.
        shown: hr from reflectance: the reflectances x 10000 that become 0 and 255.
        note: what a reader of the score should know (top-of-atmosphere pixels, say).
    """

    sensor: str
    order: tuple[str, ...]
    unit: Unit
    gsd_m: float
    offset: float = 0.0
    shown: tuple[float, float] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.sensor not in MODALITIES:
            raise UsageError(f"bands of an unknown sensor {self.sensor!r}; known are {', '.join(MODALITIES)}")
        if self.unit not in UNITS[self.sensor]:
            raise UsageError(
                f"{self.sensor} in unit {self.unit!r}: undeclared; it must be {' or '.join(UNITS[self.sensor])}"
            )
        missing = [band for band in MODALITIES[self.sensor].bands if band not in self.order]
        if missing or len(set(self.order)) != len(self.order):
            what = f"has no {missing[0]}" if missing else "names a band twice"
            raise UsageError(
                f"{self.sensor} band order {', '.join(self.order)} {what}; the sensor needs each band once"
            )
        if (self.shown is not None) != (self.sensor == "hr" and self.unit != "uint8"):
            raise UsageError("`shown` goes with hr made from reflectance, and only with it")

    @property
    def picked(self) -> list[int]:
        """Position in the file of each band of the sensor, in the sensor's order."""
        return [self.order.index(band) for band in MODALITIES[self.sensor].bands]

    def describe(self) -> str:
        """`s2 from B01 B02 … (reflectance x 10000, offset -1000, 10 m)`."""
        offset = f", offset {self.offset:g}" if self.offset else ""
        return f"{self.sensor} from {' '.join(self.order)} ({self.unit}{offset}, {self.gsd_m:g} m)"


def to_model(bands: Bands, raw_TFHW: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as the model's sensors store them, and which pixels are valid.

    Returns:
        x_TCHW: hr uint8, s2 uint16 reflectance x 10000 (0 where invalid), s1 float32 dB (NaN where invalid). valid_THW: bool.

    Raises:
        UsageError: another number of bands than declared, or a dtype that cannot hold the declared unit.
    """
    if raw_TFHW.ndim != 4 or raw_TFHW.shape[1] != len(bands.order):
        found = raw_TFHW.shape[1] if raw_TFHW.ndim == 4 else f"an array of shape {raw_TFHW.shape}"
        raise UsageError(f"{where}: {found} bands, declared are {len(bands.order)} ({', '.join(bands.order)})")
    x_TCHW = raw_TFHW[:, bands.picked]
    if bands.sensor == "hr":
        return _optical(bands, x_TCHW, where)
    dates = [_series(bands, x_CHW) for x_CHW in x_TCHW]
    return np.stack([x for x, _ in dates]), np.stack([ok for _, ok in dates])


def _optical(bands: Bands, x_TCHW: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    valid_THW = np.ones((x_TCHW.shape[0], *x_TCHW.shape[2:]), bool)
    if bands.shown is None:
        if x_TCHW.dtype != np.uint8:
            raise UsageError(
                f"{where}: {x_TCHW.dtype} numbers where 0-255 in uint8 are declared; convert them, or mend the row"
            )
        return x_TCHW, valid_THW
    low, high = bands.shown
    shown = (x_TCHW.astype(np.float32) + bands.offset - low) / (high - low) * 255
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8), valid_THW & (x_TCHW != 0).any(1)


def _series(bands: Bands, x_CHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if bands.sensor == "s1":
        return backscatter(x_CHW, bands.unit, None)
    gain = 10_000.0 if bands.unit == "reflectance" else 1.0
    return reflectance(x_CHW, Decision(bands.offset * gain if gain != 1.0 else bands.offset, gain, "declared"), None)
