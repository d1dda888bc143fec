"""One site's pixels, harmonised and on common ground: `read_site`. Every format comes through here, as a `Cube`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.geo import Grid, grid_over, same_crs
from data_prep.harmonise import (
    Decision,
    backscatter,
    backscatter_unit,
    claim_of,
    decide,
    decision_entry,
    reflectance,
)
from data_prep.resample import Kind, is_copy, needed_window, place
from data_prep.schema import CLEAR, MODALITIES, NODATA, Series, SiteArrays
from data_prep.sources.cube import Cube
from data_prep.sources.evidence import backscatter_sample, shared_cache, spread
from data_prep.sources.open import open_cube
from data_prep.sources.records import Asset, SiteRecord, SourceFault

if TYPE_CHECKING:
    from data_prep.config import GridConfig

KINDS: dict[str, Kind] = {"hr": "colour", "s2": "reflectance", "s1": "backscatter"}


@dataclasses.dataclass
class Frame:
    """One date of one modality on the target grid."""

    datetime: str
    product_id: str
    orbit: str
    pixels_CHW: np.ndarray
    mask_HW: np.ndarray
    decision: dict[str, Any]


def read_site(record: SiteRecord, grid: GridConfig, modalities: tuple[str, ...] = ()) -> SiteArrays:
    """Reads, harmonises and aligns every modality of a site to its footprint.

    Dates come out ascending (several cubes or an unsorted time axis are sorted together; decisions of an unsorted cube say so);
    dates that see nothing of the footprint are dropped, and so are those of a series below `grid.min_clear`; a modality without
    any date left is absent. Of several hr images the newest is kept.

    Args:
        grid: pixel sizes, `max_dates`, `min_clear`; `side_m`/`tile` are `split_site`'s, done before.
        modalities: only these; empty = all present.

    Raises:
        SourceFault: naming the asset and why: unreadable, wrong bands, outside the footprint, repeated date, nothing valid.
    """
    series: dict[str, Series] = {}
    empty: list[str] = []
    for modality in record.modalities:
        if modalities and modality not in modalities:
            continue
        read = _read_modality(record, modality, grid)
        if read is None:
            empty.append(modality)
        else:
            series[modality] = read
    if not series:
        wanted = f" of {', '.join(modalities)}" if modalities else ""
        raise SourceFault(
            record.key, f"has no valid pixel{wanted} in its footprint ({', '.join(empty) or 'no modality present'})"
        )
    return SiteArrays(
        key=record.key,
        crs=record.crs,
        bbox_wgs84=record.bbox_wgs84,
        footprint=record.footprint,
        series=series,
        cell=record.cell,
        scalars=dict(record.scalars),
        rasters=_read_labels(record, grid),
        classes={name: list(names) for name, names in record.classes.items()},
    )


def image_groups(record: SiteRecord, modality: str) -> list[tuple[list[Asset], Asset | None]]:
    """Files that make one cube each: the bands of one acquisition together, with the cloud raster of the same item."""
    groups: dict[Any, list[Asset]] = {}
    for number, asset in enumerate(record.of(modality)):
        item = asset.id.rsplit("/", 1)[0]
        own = asset.format not in ("raster", "parquet_raster")
        groups.setdefault((item, asset.datetime, asset.product_id, number if own else -1), []).append(asset)
    clouds = {asset.id.rsplit("/", 1)[0]: asset for asset in record.of("scl", "cloud")}
    return [(assets, clouds.get(assets[0].id.rsplit("/", 1)[0])) for assets in groups.values()]


def target_grid(record: SiteRecord, modality: str, native: Grid, grid: GridConfig) -> Grid:
    """The modality's pixel grid over the footprint: the configured pixel size, else the source's own (even if not square)."""
    gsd = grid.hr_gsd_m if modality == "hr" else grid.series_gsd_m
    if gsd is not None:
        return grid_over(record.crs, record.footprint, gsd)
    if same_crs(native.crs, record.crs) and native.is_north_up:
        return grid_over(record.crs, record.footprint, native.transform[0], -native.transform[4])
    return grid_over(record.crs, record.footprint, native.gsd_m())


def _read_modality(record: SiteRecord, modality: str, grid: GridConfig) -> Series | None:
    frames: list[Frame] = []
    target: Grid | None = None
    outside: Asset | None = None
    keep = _kept_dates(record, modality, grid)
    for number, (assets, cloud) in enumerate(image_groups(record, modality)):
        if keep is not None and not any(group == number for group, _ in keep):
            continue
        wanted = MODALITIES[modality].bands
        with contextlib.closing(open_cube(assets, wanted, cloud)) as cube:
            if target is None:
                target = target_grid(
                    record, modality, min((y.grid for y in cube.layers), key=lambda g: g.gsd_m()), grid
                )
            if all(needed_window(layer.grid, target, "class") is None for layer in cube.layers):
                outside = outside or cube.asset
                continue
            dates = [d for d in range(len(cube.dates)) if keep is None or (number, d) in keep]
            frames += _frames(tuple(assets), cube, modality, dates, target)
    min_clear = grid.min_clear if MODALITIES[modality].is_series else 0.0
    frames = [f for f in frames if (f.mask_HW != NODATA).any() and (f.mask_HW == CLEAR).mean() >= min_clear]
    if not frames and outside is not None:
        raise SourceFault(
            outside.id, f"lies outside the site's footprint {tuple(round(v, 3) for v in record.footprint)}"
        )
    if not frames or target is None:
        return None
    frames.sort(key=lambda frame: (frame.datetime, frame.product_id))
    _refuse_repeats(record, modality, frames)
    if not MODALITIES[modality].is_series:
        frames = frames[-1:]  # one image per site: the newest
    _flag_mixture(frames)
    return Series(
        pixels_TCHW=_stacked([frame.pixels_CHW for frame in frames]),
        mask_THW=_stacked([frame.mask_HW for frame in frames]),
        datetimes=[frame.datetime for frame in frames],
        transform=target.transform,
        gsd_m=float(target.gsd_m()),
        product_ids=[frame.product_id for frame in frames],
        orbits=[frame.orbit for frame in frames] if modality == "s1" else [],
        decisions=[frame.decision for frame in frames],
    )


def _kept_dates(record: SiteRecord, modality: str, grid: GridConfig) -> set[tuple[int, int]] | None:
    """(group, date) pairs that `max_dates` keeps, evenly spread over time; None = all."""
    if grid.max_dates is None or not MODALITIES[modality].is_series:
        return None
    stamps: list[tuple[str, int, int]] = []
    for number, (assets, _) in enumerate(image_groups(record, modality)):
        with contextlib.closing(open_cube(assets, MODALITIES[modality].bands)) as cube:
            stamps += [(info.datetime, number, date) for date, info in enumerate(cube.dates)]
    stamps.sort()
    return {stamps[i][1:] for i in spread(len(stamps), grid.max_dates)}


def _flag_mixture(frames: list[Frame]) -> None:
    """Sigma0 and gamma0 in one series: every date says so."""
    kinds = sorted({str(frame.decision["calibration"]) for frame in frames if "calibration" in frame.decision})
    if len(kinds) > 1:
        for frame in frames:
            frame.decision["flags"].append(f"the site mixes {' and '.join(kinds)}")


def _refuse_repeats(record: SiteRecord, modality: str, frames: list[Frame]) -> None:
    for before, after in itertools.pairwise(frames):
        if before.datetime and (before.datetime, before.product_id) == (after.datetime, after.product_id):
            raise SourceFault(
                f"{record.key}/{modality}",
                f"date {after.datetime} stands twice (product {after.product_id or 'unnamed'})",
            )


def _frames(assets: tuple[Asset, ...], cube: Cube, modality: str, dates: list[int], target: Grid) -> list[Frame]:
    stamps = [cube.dates[date].datetime for date in dates]
    order = "sorted" if stamps != sorted(stamps) else ""
    if modality == "hr":
        return [_hr_frame(cube, date, target) for date in dates]
    if modality == "s1":
        return _s1_frames(assets, cube, dates, target, order)
    return _s2_frames(assets, cube, dates, target, order)


def _common(cube: Cube, target: Grid, order: str) -> dict[str, Any]:
    copied = all(is_copy(layer.grid, target) for layer in cube.layers)
    return {
        "resampled": "" if copied else "bilinear",
        "position": cube.asset.note.removeprefix("position "),
        "time_order": order,
    }


def _hr_frame(cube: Cube, date: int, target: Grid) -> Frame:
    info = cube.dates[date]
    parts, valid_HW = [], np.ones(target.shape, dtype=bool)
    for number, layer in enumerate(cube.layers):
        window = needed_window(layer.grid, target, "colour")
        if window is None:
            parts.append(np.zeros((len(layer.bands), *target.shape), dtype=np.uint8))
            valid_HW[:] = False
            continue
        raw_CHW = cube.read(date, number, window)
        if raw_CHW.dtype != np.uint8:
            raise SourceFault(
                cube.asset.id, f"hr holds {raw_CHW.dtype}, wanted uint8 (0-255): rescale it first: {cube.asset.href}"
            )
        inside = cube.read_valid(date, number, window)
        inside = np.ones(raw_CHW.shape[1:], dtype=bool) if inside is None else inside
        values, valid = place(raw_CHW, inside, layer.grid.sub(window), target, "colour")
        parts.append(values)
        valid_HW &= valid
    pixels_CHW = _in_order(cube, parts, MODALITIES["hr"].bands)
    if not valid_HW.all():
        pixels_CHW[:, ~valid_HW] = 0
    mask_HW = np.where(valid_HW, CLEAR, NODATA).astype(np.uint8)
    decision = {name: value for name, value in _common(cube, target, "").items() if value} | {"flags": []}
    return Frame(info.datetime, info.product_id, "", pixels_CHW, mask_HW, decision)


def _s2_frames(assets: tuple[Asset, ...], cube: Cube, dates: list[int], target: Grid, order: str) -> list[Frame]:
    decisions = s2_decisions(assets, cube)
    frames = []
    for date in dates:
        decision, entry = decisions[date]
        parts, valid_HW = [], np.ones(target.shape, dtype=bool)
        for number, layer in enumerate(cube.layers):
            window = needed_window(layer.grid, target, "reflectance")
            if window is None:
                parts.append(np.zeros((len(layer.bands), *target.shape), dtype=np.uint16))
                valid_HW[:] = False
                continue
            values, valid = reflectance(cube.read(date, number, window), decision, _nodata(cube, number))
            values, valid = place(values, valid, layer.grid.sub(window), target, "reflectance")
            parts.append(values)
            valid_HW &= valid
        pixels_CHW = _in_order(cube, parts, MODALITIES["s2"].bands)
        mask_HW = np.where(valid_HW, _cloud_codes(cube, date, target), NODATA).astype(np.uint8)
        pixels_CHW[:, mask_HW == NODATA] = 0
        extra = {name: value for name, value in _common(cube, target, order).items() if value}
        info = cube.dates[date]
        frames.append(Frame(info.datetime, info.product_id, "", pixels_CHW, mask_HW, {**entry, **extra}))
    return frames


def s2_decisions(assets: tuple[Asset, ...], cube: Cube) -> dict[int, tuple[Decision, dict[str, Any]]]:
    """Per date: what is done about offset and scale, and its record. Dates with one claim are judged by their pooled pixels."""
    claims = [claim_of(cube.asset, info.baseline, info.offset_dn) for info in cube.dates]
    decided = {}
    for claim in dict.fromkeys(claims):
        dates = [date for date, own in enumerate(claims) if own == claim]
        evidence = shared_cache().floors(assets, cube, dates).judge()
        decision = decide(claim, evidence)
        for date in dates:
            baseline = cube.dates[date].baseline or cube.asset.baseline
            decided[date] = (decision, decision_entry(decision, evidence, baseline=baseline))
    return decided


def _s1_frames(assets: tuple[Asset, ...], cube: Cube, dates: list[int], target: Grid, order: str) -> list[Frame]:
    unit, flags = backscatter_unit(backscatter_sample(cube), cube.asset.unit, cube.asset.id)
    frames = []
    for date in dates:
        info = cube.dates[date]
        parts, valid_HW = [], np.ones(target.shape, dtype=bool)
        for number, layer in enumerate(cube.layers):
            window = needed_window(layer.grid, target, "backscatter")
            if window is None:
                parts.append(np.full((len(layer.bands), *target.shape), np.nan, dtype=np.float32))
                valid_HW[:] = False
                continue
            values, valid = backscatter(cube.read(date, number, window), unit, _nodata(cube, number))
            values, valid = place(values, valid, layer.grid.sub(window), target, "backscatter")
            parts.append(values)
            valid_HW &= valid
        pixels_CHW = _in_order(cube, parts, MODALITIES["s1"].bands)
        pixels_CHW[:, ~valid_HW] = np.nan
        extra = {name: value for name, value in _common(cube, target, order).items() if value}
        mask_HW = np.where(valid_HW, CLEAR, NODATA).astype(np.uint8)
        calibration = {"calibration": cube.asset.calibration} if cube.asset.calibration else {}
        decision = {"source_unit": unit, **calibration, **extra, "flags": list(flags)}
        frames.append(
            Frame(info.datetime, info.product_id, info.orbit, pixels_CHW.astype(np.float16), mask_HW, decision)
        )
    return frames


def _nodata(cube: Cube, layer: int) -> float | None:
    declared = cube.asset.nodata
    return declared if declared is not None else cube.nodata_of(layer)


def _in_order(cube: Cube, parts: list[np.ndarray], bands: tuple[str, ...]) -> np.ndarray:
    """The layers' bands joined in storage order."""
    names = [band for layer in cube.layers for band in layer.bands]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return joined if names == list(bands) else joined[[names.index(band) for band in bands]]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """[T, …]; a single image, which may be large, is not copied."""
    return images[0][None] if len(images) == 1 else np.stack(images)


def _cloud_codes(cube: Cube, date: int, target: Grid) -> np.ndarray:
    """CLEAR, CLOUD or NODATA per target pixel; CLEAR where the source has no cloud mask."""
    if cube.cloud is None:
        return np.full(target.shape, CLEAR, dtype=np.uint8)
    window = needed_window(cube.cloud, target, "class")
    if window is None:
        return np.full(target.shape, CLEAR, dtype=np.uint8)
    codes = cube.read_cloud(date, window)
    placed, inside = place(codes[None], np.ones(codes.shape, dtype=bool), cube.cloud.sub(window), target, "class")
    return np.where(inside, placed[0], CLEAR).astype(np.uint8)


def _read_labels(record: SiteRecord, grid: GridConfig) -> dict[str, np.ndarray]:
    """Label rasters as int16 [H, W] on the series grid, -1 = unlabelled; nearest neighbour."""
    target = grid_over(record.crs, record.footprint, grid.series_gsd_m or 10.0)
    rasters = {}
    for asset in record.of("label"):
        name = asset.id.rsplit("/", 1)[1]
        with contextlib.closing(open_cube([asset], ("",))) as cube:
            source = cube.layers[0].grid
            window = needed_window(source, target, "class")
            if window is None:
                continue
            raw_HW = cube.read(0, 0, window)[0]
            if raw_HW.dtype.kind not in "ui":
                raise SourceFault(asset.id, f"label raster holds {raw_HW.dtype}, wanted whole numbers: {asset.href}")
            nodata = _nodata(cube, 0)
            labelled = raw_HW >= 0 if nodata is None else (raw_HW >= 0) & (raw_HW != nodata)
            values, valid = place(raw_HW[None].astype(np.int32), labelled, source.sub(window), target, "class")
            rasters[name] = np.where(valid, values[0], -1).astype(np.int16)
    return rasters
