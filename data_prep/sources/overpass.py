"""Frames → dates: what one pass of a satellite delivered in several tiles becomes one date; of several pictures the best is kept."""

from __future__ import annotations

import datetime as dt

import numpy as np

from data_prep.schema import NODATA
from data_prep.sources.frames import Frame
from data_prep.sources.names import processed
from data_prep.sources.records import SourceFault

# One pass is over a site for less than half a minute, tiles and slices of it are stamped up to some minutes apart; the next pass of
# the same satellite comes 98 minutes later, and on another track.
PASS_S = 600


def by_overpass(frames: list[Frame], where: str) -> list[Frame]:
    """One frame per pass, in order of time. Tiles of a pass are laid over each other: the one that shows most of the site decides,
    the others fill what it does not see. A product that is listed twice counts once.

    Raises SourceFault for one product that stands for two different images.
    """
    ordered = sorted(frames, key=lambda frame: (frame.datetime, frame.product_id))
    passes: list[list[Frame]] = []
    for frame in ordered:
        mates = next((group for group in reversed(passes) if _same_pass(group[0], frame)), None)
        if mates is None:
            passes.append([frame])
        else:
            mates.append(frame)
    return sorted((_laid_over(group, where) for group in passes), key=lambda frame: (frame.datetime, frame.product_id))


def _same_pass(one: Frame, other: Frame) -> bool:
    if not one.datetime or not other.datetime:
        return False
    for a, b in zip(one.track, other.track):
        if a and b and a != b:
            return False
    if one.decision.get("calibration") != other.decision.get("calibration"):
        return False
    return abs((_time(other) - _time(one)).total_seconds()) <= PASS_S and _platform(one) == _platform(other)


def _platform(frame: Frame) -> str:
    """S2A, S1B, …: the first word of a Sentinel product id; "" where that is no product id."""
    word = frame.product_id.split("_", 1)[0]
    return word if len(word) == 3 and word[0] == "S" else ""


def _time(frame: Frame) -> dt.datetime:
    return dt.datetime.fromisoformat(frame.datetime.replace("Z", "+00:00"))


def _laid_over(group: list[Frame], where: str) -> Frame:
    group = _without_repeats(group, where)
    if len(group) == 1:
        return group[0]
    # most of the site first, then the newest processing
    group = sorted(
        group,
        key=lambda frame: (
            -_valid_share(frame),
            _descending(frame.baseline),
            _descending(processed(frame.product_id)),
            frame.product_id,
        ),
    )
    first, used = group[0], []
    pixels_CHW, mask_HW = first.pixels_CHW, first.mask_HW
    for other in group[1:]:
        fill_HW = (mask_HW == NODATA) & (other.mask_HW != NODATA)
        if fill_HW.any():
            pixels_CHW, mask_HW = pixels_CHW.copy(), mask_HW.copy()
            pixels_CHW[:, fill_HW], mask_HW[fill_HW] = other.pixels_CHW[:, fill_HW], other.mask_HW[fill_HW]
            used.append(other)
    first.pixels_CHW, first.mask_HW = pixels_CHW, mask_HW
    if used:
        first.decision["mosaic"] = [frame.product_id or frame.asset for frame in used]
        radiometry = {str(frame.decision.get("offset_applied")) for frame in used} - {
            str(first.decision.get("offset_applied"))
        }
        if radiometry:
            first.decision["mosaic_offsets"] = [frame.decision.get("offset_applied") for frame in used]
    first.decision["flags"] = list(dict.fromkeys(flag for frame in (first, *used) for flag in frame.decision["flags"]))
    return first


def _without_repeats(group: list[Frame], where: str) -> list[Frame]:
    """Short seasons are padded with repeats in some sets: the same product with the same pixels is one image."""
    kept: list[Frame] = []
    for frame in group:
        twins = [one for one in kept if _identity(one) == _identity(frame)]
        if not twins:
            kept.append(frame)
            continue
        both_HW = (twins[0].mask_HW != NODATA) & (frame.mask_HW != NODATA)
        if not _equal(twins[0].pixels_CHW[:, both_HW], frame.pixels_CHW[:, both_HW]):
            raise SourceFault(
                where,
                f"date {frame.datetime} stands twice (product {frame.product_id or 'unnamed'}), with other pixels",
            )
        kept.append(frame)
    return kept


def _identity(frame: Frame) -> tuple[str, str]:
    """What may stand for one image only: a product, or a time of one file; tiles without product ids are told by their file."""
    return frame.datetime, frame.product_id or frame.asset


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def best_picture(frames: list[Frame]) -> Frame:
    """Of several images of a site without dates: the one that shows most of it, the newest among those that show as much (1 %)."""
    most = max(_valid_share(frame) for frame in frames)
    good = [frame for frame in frames if _valid_share(frame) >= most - 0.01]
    return max(good, key=lambda frame: (frame.datetime, frame.product_id))


def _valid_share(frame: Frame) -> float:
    return round(float((frame.mask_HW != NODATA).mean()), 4)


def _descending(text: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in text) or (1,)


def flag_mixture(frames: list[Frame]) -> dict[int, str]:
    """Positions of dates whose calibration is not that of most dates, and what is wrong with them: sigma0 and gamma0 in one series,
    or a calibration nobody names beside one that somebody does."""
    kinds = [str(frame.decision.get("calibration") or "unnamed calibration") for frame in frames]
    if len(set(kinds)) < 2:
        return {}
    common = max(sorted(set(kinds)), key=kinds.count)
    said = f"the site mixes {' and '.join(sorted(set(kinds)))}"
    return {number: said for number, kind in enumerate(kinds) if kind != common}
