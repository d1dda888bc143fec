"""Radiometry: which offset and scale a file has, what its pixels say about it, and the numbers we store.

Metadata decides, pixels cross-check. Sentinel-2 digital numbers carry +1000 from processing baseline 04.00 on (and in
Collection-1 reprocessing of *older* acquisitions, so the date is no signal). Provider metadata is sometimes wrong. The dark
floor (0.1-percentile of non-zero pixels, lowest over the bands) tells: a file without the offset has some band with dark pixels
well below 900, one with it has none below about 1,000. A bright floor in one band proves nothing (snow, cloud, desert), so the
minimum over bands is judged; L1C has B10 (cirrus), whose floor is about 10 without and 1,010 with the offset.

Every date is judged by its own pixels: a series may mix baselines. Numbers that are no digital numbers (reflectance as a share of
1, from xarray and Earth Engine exports) are told by their size. A date whose metadata and pixels disagree is a contradiction, and
`quality.on_contradiction` says what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.sources.records import Asset, SourceFault

OFFSET_DN = -1000
OFFSET_FROM_BASELINE = 4.0
FLOOR_PERCENT = 0.1
# Floors below ABSENT_BELOW cannot carry the offset (sen2cor's slightly negative reflectances reach about -150).
ABSENT_BELOW = 800
# Floors in this range mean "offset left in"; above it every band is bright and the pixels cannot tell.
PRESENT_RANGE = (900, 1400)
MIN_EVIDENCE_PIXELS = 500
# A reflectance of 1 is 10000 DN. Numbers of which 99 % lie below UNIT_TOP are shares of 1; a declared scale that would put the
# brightest percent above BRIGHTEST or all of it below DIMMEST (x 10000) cannot be right.
UNIT_TOP = 2.0
BRIGHTEST, DIMMEST = 100_000.0, 1.0
# Below a reflectance of -0.1 nothing is measured: an undeclared fill value (-9999, -32768).
LOWEST_REFLECTANCE = -1000.0
# Sentinel-2 scene classification (SCL) codes.
SCL_NODATA = (0, 1)
SCL_CLOUD = (3, 8, 9, 10)
# Far below any sensor's noise floor (-22 to -30 dB): border pixels interpolated towards nothing, seen in real series (-118 dB).
LOWEST_DB = -60.0
# Below this in both bands nothing but noise is left (noise equivalent sigma0 is -22 dB at worst, VV of the calmest water -28 dB).
NOISE_DB = -32.0


@dataclass(frozen=True)
class Claim:
    """What metadata says: reflectance * 10000 = (DN + offset_dn) * gain. offset_dn None: metadata does not say."""

    offset_dn: float | None
    basis: str
    gain: float = 1.0
    conflict: str = ""
    scale_said: bool = False


@dataclass(frozen=True)
class Evidence:
    """What pixels say. verdict: "present" (offset left in), "absent", or "unclear"; floor in DN, of the darkest band.

    top: 99th percentile of the raw numbers, of the brightest band. is_share: they are shares of 1 (the floor is then x 10000).
    """

    verdict: str
    floor_dn: int | None = None
    band: str = ""
    pixels: int = 0
    top: float | None = None
    is_share: bool = False


@dataclass(frozen=True)
class Decision:
    """What is done: DN * gain + offset_applied. flags: contradictions, in words; empty = all agrees. corrected: the pixels were
    believed, not the metadata."""

    offset_applied: float
    gain: float
    basis: str
    flags: tuple[str, ...] = field(default=())
    corrected: bool = False


def baseline_number(text: str) -> float | None:
    """ "05.09", "N0509" → 5.09; "", N9999 (no baseline) → None. Raises nothing."""
    digits = text.upper().lstrip("N").replace("_", ".")
    try:
        number = float(digits) if "." in digits else float(digits) / 100
    except ValueError:
        return None
    return number if 0 < number < 99 else None


def claim_of(asset: Asset, baseline: str = "", offset_dn: float | None = None, has_boa_offset: bool = True) -> Claim:
    """The declared radiometry of one date: explicit offsets first, then the baseline; a conflict between the two is kept.

    Args:
        asset: its `scale`/`offset` are `raster:bands` values (reflectance = DN * scale + offset).
        baseline: of this date, when the cube knows it better than the asset.
        offset_dn: of this date, as written beside the pixels (`BOA_ADD_OFFSET`).
        has_boa_offset: Sentinel-2; other sensors have no baseline, and no offset where none is declared.
    """
    gain, scale_said = (1.0, False) if asset.scale is None else (asset.scale * 10_000, True)
    gain = 1.0 if abs(gain - 1) < 1e-9 else gain  # 0.0001 as float32 is not quite 0.0001
    number = baseline_number(baseline or asset.baseline) if has_boa_offset else None
    by_baseline = None if number is None else (OFFSET_DN if number >= OFFSET_FROM_BASELINE else 0)
    basis = "" if number is None else f"baseline {number:05.2f}"
    explicit, where = offset_dn, "BOA_ADD_OFFSET"
    if explicit is None and asset.offset_removed:
        explicit, where = 0.0, "boa_offset_applied"
    if explicit is None and asset.offset is not None:
        explicit, where = asset.offset * 10_000 / gain, "raster:bands offset"
    if explicit is None and not has_boa_offset:
        return Claim(0.0, "scale" if scale_said else "nothing declared", gain, scale_said=scale_said)
    if explicit is None:
        return Claim(by_baseline, basis or "nothing declared", gain, scale_said=scale_said)
    explicit = float(round(explicit, 6)) if gain == 1.0 else float(explicit)
    if by_baseline is None or by_baseline == explicit or gain != 1.0:
        return Claim(explicit, f"{where}, {basis}" if basis else where, gain, scale_said=scale_said)
    if where == "boa_offset_applied":  # the provider subtracts it: disagreement with the baseline is the point
        return Claim(explicit, f"{where}, {basis}", gain, scale_said=scale_said)
    return Claim(explicit, where, gain, f"{where} says {explicit:g}, {basis} says {by_baseline:g}", scale_said)


def judge(floors: dict[str, int], pixels: int, top: float | None = None, is_share: bool = False) -> Evidence:
    """Verdict from the dark floor per band (DN as stored); the minimum over bands counts."""
    if not floors or pixels == 0:
        return Evidence("unclear", None, "", pixels, top, is_share)
    band = min(floors, key=lambda name: floors[name])
    floor = floors[band]
    if floor < ABSENT_BELOW:
        verdict = "absent"
    elif PRESENT_RANGE[0] <= floor <= PRESENT_RANGE[1] and pixels >= MIN_EVIDENCE_PIXELS:
        verdict = "present"
    else:
        verdict = "unclear"
    return Evidence(verdict, int(floor), band, pixels, top, is_share)


def decide(claim: Claim, evidence: Evidence) -> Decision:
    """Metadata decides; a contradiction with the pixels is a flag. Without metadata the pixels decide."""
    flags = [claim.conflict] if claim.conflict else []
    gain, basis = claim.gain, claim.basis
    if evidence.is_share and not claim.scale_said:
        gain, basis = 10_000.0, f"{basis}; pixels: shares of 1, not digital numbers"
    elif not _is_plausible(claim, evidence):
        flags.append(
            f"declared scale {claim.gain / 10_000:g} makes no reflectance of numbers that reach {evidence.top:.4g}"
        )
    if gain != 1.0 and not (evidence.is_share and not claim.scale_said):
        # floors are in DN x 1; other scales have no 1000 to look for
        return Decision((claim.offset_dn or 0.0) * gain, gain, basis, tuple(flags))
    if claim.offset_dn is None:
        applied = float(OFFSET_DN) if evidence.verdict == "present" else 0.0
        return Decision(applied, gain, f"{basis}; pixels: offset {evidence.verdict}", tuple(flags))
    if contradiction := _offset_contradiction(claim, evidence):
        flags.append(contradiction)
    return Decision(float(claim.offset_dn), gain, basis, tuple(flags))


def corrected(claim: Claim, evidence: Evidence) -> Decision | None:
    """What the pixels would have decided alone, its flags kept; None where they cannot tell."""
    said = decide(claim, evidence)
    if evidence.is_share and claim.scale_said and claim.gain != 10_000:
        offset = float(OFFSET_DN) if evidence.verdict == "present" else 0.0
        return Decision(offset, 10_000.0, "pixels: shares of 1", said.flags, corrected=True)
    if not _is_plausible(claim, evidence) or claim.gain != 1.0 or evidence.verdict not in ("present", "absent"):
        return None
    offset = float(OFFSET_DN) if evidence.verdict == "present" else 0.0
    return Decision(offset, 1.0, f"pixels: offset {evidence.verdict}", said.flags, corrected=True)


def _is_plausible(claim: Claim, evidence: Evidence) -> bool:
    """Whether the declared scale makes reflectances of the brightest numbers seen."""
    return evidence.top is None or DIMMEST <= evidence.top * claim.gain <= BRIGHTEST


def _offset_contradiction(claim: Claim, evidence: Evidence) -> str:
    floor = f"dark floor {evidence.floor_dn} in {evidence.band}, the lowest over the bands"
    assert claim.offset_dn is not None
    if claim.offset_dn > -900 and evidence.verdict == "present":
        return f"declared offset {claim.offset_dn:g} ({claim.basis}), but the +1000 offset is in the pixels: {floor}"
    if claim.offset_dn <= -900 and evidence.verdict == "absent":
        return f"declared offset {claim.offset_dn:g} ({claim.basis}), but no offset is in the pixels: {floor}"
    return ""


def dark_floors(histograms: dict[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """0.1-percentile of the non-zero pixels per band from exact DN histograms [65536]; and the pixels behind the thinnest."""
    floors, counts = {}, []
    for band, histogram in histograms.items():
        nonzero = histogram.copy()
        nonzero[0] = 0
        total = int(nonzero.sum())
        if total:
            floors[band] = int(np.searchsorted(np.cumsum(nonzero), max(total * FLOOR_PERCENT / 100, 1)))
            counts.append(total)
    return floors, min(counts, default=0)


def reflectance(raw_CHW: np.ndarray, decision: Decision, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Stored optical numbers: uint16 reflectance x 10000 without offset.

    A pixel is valid when every band is finite, not 0, not the declared nodata, and no fill value far below any reflectance.
    Valid pixels are clipped to 1…65535, because 0 means nodata.

    Returns:
        values uint16 [C, H, W], 0 where invalid; valid bool [H, W].
    """
    valid_CHW = raw_CHW != 0
    if nodata is not None and not np.isnan(nodata):
        valid_CHW &= raw_CHW != nodata
    if raw_CHW.dtype.kind == "f":
        valid_CHW &= np.isfinite(raw_CHW)
    if raw_CHW.dtype.kind != "u":
        valid_CHW &= raw_CHW > LOWEST_REFLECTANCE / decision.gain
    valid_HW = valid_CHW.all(axis=0)
    if decision.gain == 1.0 and raw_CHW.dtype.kind in "ui":
        shifted = raw_CHW.astype(np.int32) + round(decision.offset_applied)
    else:
        shifted = np.rint(np.nan_to_num(raw_CHW.astype(np.float64)) * decision.gain + decision.offset_applied)
    values_CHW = np.clip(shifted, 1, 65535).astype(np.uint16)
    values_CHW[:, ~valid_HW] = 0
    return values_CHW, valid_HW


def backscatter_unit(sample: np.ndarray, declared: str, asset_id: str) -> tuple[str, tuple[str, ...]]:
    """ "dB" or "linear" of Sentinel-1 numbers, and flags where metadata and numbers disagree.

    dB of land is negative nearly everywhere; linear power is never negative and around 0.01…1. Raises SourceFault for
    neither (uncalibrated amplitudes).
    """
    finite = sample[np.isfinite(sample)]
    if finite.size == 0:
        return declared or "dB", ()
    negative = float((finite < 0).mean())
    if negative > 0.5:
        seen = "dB"
    elif negative < 0.01 and float(np.median(finite)) < 10:
        seen = "linear"
    else:
        middle = float(np.median(finite))
        raise SourceFault(
            asset_id, f"neither dB nor linear backscatter (median {middle:.4g}): calibrate it to sigma0 or gamma0 first"
        )
    if declared and declared != seen:
        return seen, (f"declared {declared}, but the numbers are {seen}",)
    return seen, ()


def backscatter(raw_CHW: np.ndarray, unit: str, nodata: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Stored Sentinel-1 numbers: dB as float32 (rounded to float16 when stored), NaN where invalid.

    Linear values <= 0 are invalid, not tiny, and so is anything below LOWEST_DB. Exactly 0 dB in both bands is the usual fill
    of dB files and invalid too. So is border noise: pixels below NOISE_DB in every band that hang together with the edge of the
    swath (where nothing is valid); calm water away from it stays.

    Returns:
        dB float32 [C, H, W], valid bool [H, W] (every band valid).
    """
    values_CHW = raw_CHW.astype(np.float32)
    valid_CHW = np.isfinite(values_CHW)
    if nodata is not None and not np.isnan(nodata):
        valid_CHW &= values_CHW != np.float32(nodata)
    if unit == "linear":
        valid_CHW &= values_CHW > 0
        values_CHW = np.float32(10) * np.log10(np.where(valid_CHW, values_CHW, 1).astype(np.float32))
    valid_HW = np.asarray((valid_CHW & (values_CHW >= LOWEST_DB)).all(axis=0))
    if unit == "dB":
        valid_HW &= np.any(values_CHW != 0, axis=0)
    valid_HW = _without_border_noise(values_CHW, valid_HW)
    values_CHW[:, ~valid_HW] = np.nan
    return values_CHW, valid_HW


def _without_border_noise(values_CHW: np.ndarray, valid_HW: np.ndarray) -> np.ndarray:
    """`valid` without the faint pixels that hang together with invalid ones."""
    faint_HW = valid_HW & np.all(values_CHW < NOISE_DB, axis=0)
    if valid_HW.all() or not faint_HW.any():
        return valid_HW
    valid_HW = valid_HW.copy()
    while True:
        padded = np.pad(~valid_HW, 1)
        beside_HW = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        noise_HW = faint_HW & valid_HW & beside_HW
        if not noise_HW.any():
            return valid_HW
        valid_HW[noise_HW] = False


def quantity(raw_CHW: np.ndarray, asset: Asset, nodata: float | None, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers of a continuous quantity (elevation, temperature): declared scale and offset applied, `dtype`, 0 where invalid.

    Returns:
        values [C, H, W], valid bool [H, W] (every band valid). Values beyond the type's range are invalid, not clipped.
    """
    values_CHW = raw_CHW.astype(np.float64) * (1.0 if asset.scale is None else asset.scale) + (asset.offset or 0.0)
    valid_CHW = np.isfinite(values_CHW)
    if nodata is not None and not np.isnan(nodata):
        valid_CHW &= raw_CHW != nodata
    kind = np.dtype(dtype)
    if kind.kind in "ui":
        values_CHW = np.rint(np.nan_to_num(values_CHW))
        valid_CHW &= (values_CHW >= np.iinfo(kind).min) & (values_CHW <= np.iinfo(kind).max)
    valid_HW = np.asarray(valid_CHW.all(axis=0))
    values_CHW = np.where(valid_HW, values_CHW, 0)
    return values_CHW.astype(np.float32 if kind.kind == "f" else kind), valid_HW


def decision_entry(decision: Decision, evidence: Evidence, **more: Any) -> dict[str, Any]:
    """The record of one Sentinel-2 date that rides in the sample and the index."""
    entry: dict[str, Any] = {"offset_applied": decision.offset_applied, "basis": decision.basis}
    if decision.gain != 1.0:
        entry["gain"] = decision.gain
    if evidence.floor_dn is not None:
        entry["floor_dn"] = evidence.floor_dn
        entry["pixels"] = evidence.verdict
    entry |= {name: value for name, value in more.items() if value not in ("", None, ())}
    if decision.corrected:
        entry["corrected"] = True
    entry["flags"] = list(decision.flags)
    return entry
