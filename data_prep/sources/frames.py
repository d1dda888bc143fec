"""One date of one cube on its target grid: read the window, harmonise, resample, mask. One function per kind of number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.config import QualityConfig
from data_prep.geo import Grid
from data_prep.harmonise import backscatter, quantity, reflectance
from data_prep.resample import is_copy, needed_window, place
from data_prep.schema import CLEAR, NODATA, ModalitySpec
from data_prep.sources.cube import Cube
from data_prep.sources.decisions import Dated
from data_prep.sources.records import SourceFault

FILL = {"colour": 0, "reflectance": 0, "continuous": 0, "backscatter": np.nan}


@dataclasses.dataclass
class Frame:
    """One date of one modality on the target grid.

    track: which pass of the satellite it is of, as far as known (orbit direction, relative orbit). asset: names it in messages.
    """

    datetime: str
    product_id: str
    orbit: str
    pixels_CHW: np.ndarray
    mask_HW: np.ndarray
    decision: dict[str, Any]
    track: tuple[str, int] = ("", 0)
    baseline: str = ""
    asset: str = ""


def read_frame(
    cube: Cube,
    date: int,
    target: Grid,
    spec: ModalitySpec,
    dated: Dated,
    common: dict[str, Any],
    quality: QualityConfig,
) -> Frame:
    """One date. Raises ReadFault for bytes that cannot be had, SourceFault for numbers of another kind."""
    harmonise = _harmonise(cube, spec, dated)
    parts, valid_HW = [], np.ones(target.shape, dtype=bool)
    for number, layer in enumerate(cube.layers):
        window = needed_window(layer.grid, target, spec.kind)
        if window is None:
            parts.append(np.full((len(layer.bands), *target.shape), FILL[spec.kind], dtype=_work_dtype(spec)))
            valid_HW[:] = False
            continue
        raw_CHW = cube.read(date, number, window)
        values, valid = harmonise(raw_CHW, number)
        inside = cube.read_valid(date, number, window)
        valid = valid if inside is None else valid & inside
        values, valid = place(values, valid, layer.grid.sub(window), target, spec.kind)
        parts.append(values)
        valid_HW &= valid
    pixels_CHW = _in_order(cube, parts, spec.bands)
    if not valid_HW.all():
        pixels_CHW[:, ~valid_HW] = FILL[spec.kind]
    clear_HW: Any = CLEAR if spec.kind != "reflectance" else _cloud_codes(cube, date, target, quality)
    mask_HW = np.where(valid_HW, clear_HW, NODATA).astype(np.uint8)
    if spec.kind == "reflectance":
        pixels_CHW[:, mask_HW == NODATA] = 0
    info, speaker = cube.dates[date], cube.asset
    flags = list(dated.entry.get("flags", dated.flags))
    return Frame(
        info.datetime, info.product_id, info.orbit if spec.kind == "backscatter" else "",
        pixels_CHW.astype(spec.dtype, copy=False), mask_HW, {**dated.entry, **common, "flags": flags},
        (info.orbit or speaker.orbit, info.relative_orbit or speaker.relative_orbit), info.baseline or speaker.baseline, speaker.id,
    )  # fmt: skip


def _work_dtype(spec: ModalitySpec) -> Any:
    """What pixels are computed in before they are stored: dB as float32, everything else as it is stored."""
    return np.float32 if np.dtype(spec.dtype).kind == "f" else spec.dtype


def _harmonise(
    cube: Cube, spec: ModalitySpec, dated: Dated
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """raw numbers of a layer → (values, valid), by what the modality's numbers mean."""

    def colour(raw_CHW: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if raw_CHW.dtype != np.uint8:
            raise SourceFault(
                cube.asset.id,
                f"{spec.name} holds {raw_CHW.dtype}, wanted uint8 (0-255): rescale it first: {cube.asset.href}",
            )
        return raw_CHW, np.ones(raw_CHW.shape[1:], dtype=bool)

    def optical(raw_CHW: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        if raw_CHW.dtype == np.uint8:
            raise SourceFault(
                cube.asset.id, f"{spec.name} holds 8-bit numbers: a picture, no reflectance: {cube.asset.href}"
            )
        return reflectance(raw_CHW, dated.layers[layer], nodata_of(cube, layer))

    def radar(raw_CHW: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return backscatter(raw_CHW, dated.entry["source_unit"], nodata_of(cube, layer))

    def other(raw_CHW: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return quantity(raw_CHW, cube.speaker(layer), nodata_of(cube, layer), spec.dtype)

    return {"colour": colour, "reflectance": optical, "backscatter": radar, "continuous": other}[spec.kind]


def nodata_of(cube: Cube, layer: int) -> float | None:
    declared = cube.speaker(layer).nodata
    return declared if declared is not None else cube.nodata_of(layer)


def common_entry(cube: Cube, target: Grid, order: str) -> dict[str, Any]:
    """What every date of a cube has on record about its place and order."""
    copied = all(is_copy(layer.grid, target) for layer in cube.layers)
    said = {
        "resampled": "" if copied else "bilinear",
        "position": cube.asset.note.removeprefix("position "),
        "time_order": order,
    }
    return {name: value for name, value in said.items() if value}


def _in_order(cube: Cube, parts: list[np.ndarray], bands: tuple[str, ...]) -> np.ndarray:
    """The layers' bands joined in storage order."""
    names = [band for layer in cube.layers for band in layer.bands]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return joined if names == list(bands) else joined[[names.index(band) for band in bands]]


def _cloud_codes(cube: Cube, date: int, target: Grid, quality: QualityConfig) -> np.ndarray:
    """CLEAR, CLOUD or NODATA per target pixel; CLEAR where the source has no cloud mask."""
    if cube.cloud is None:
        return np.full(target.shape, CLEAR, dtype=np.uint8)
    window = needed_window(cube.cloud, target, "class")
    if window is None:
        return np.full(target.shape, CLEAR, dtype=np.uint8)
    if margin := quality.cloud_dilate_px:  # clouds just outside reach in
        row0, row1, col0, col1 = window
        height, width = cube.cloud.shape
        window = max(row0 - margin, 0), min(row1 + margin, height), max(col0 - margin, 0), min(col1 + margin, width)
    codes = cube.read_cloud(date, window, quality)
    placed, inside = place(codes[None], np.ones(codes.shape, dtype=bool), cube.cloud.sub(window), target, "class")
    return np.where(inside, placed[0], CLEAR).astype(np.uint8)
