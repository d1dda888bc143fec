"""One site's pixels, harmonised and on common ground: `read_site`. Every format comes through here, as a `Cube`.

    files of an acquisition → Cube → decisions (what the numbers mean) → Frame (on the target grid) → one date per pass → Series

What cannot be had costs as little as it can: a file that stays unreadable, and a date whose metadata and pixels contradict each other,
cost that date; a series left with fewer than `quality.min_dates` is left out; all of it is named in `SiteArrays.losses`. What is
wrong with the catalog itself (wrong bands, no ground in common) costs the site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.config import GridConfig, QualityConfig
from data_prep.geo import Grid, grid_over, is_metric, same_crs
from data_prep.resample import needed_window, place
from data_prep.schema import CLEAR, MODALITIES, NODATA, ModalitySpec, Series, SiteArrays, default_modalities
from data_prep.sources.choose import PER_BAND
from data_prep.sources.cube import Cube
from data_prep.sources.decisions import Dated, backscatter_decision, judged, reflectance_decisions
from data_prep.sources.evidence import spread
from data_prep.sources.frames import Frame, common_entry, nodata_of, read_frame
from data_prep.sources.open import open_cube
from data_prep.sources.overpass import best_picture, by_overpass, flag_mixture
from data_prep.sources.records import INCIDENCE, MASKS, Asset, ReadFault, SiteRecord, SourceFault

Loss = dict[str, str]


def read_site(
    record: SiteRecord, grid: GridConfig, quality: QualityConfig | None = None, modalities: tuple[str, ...] = ()
) -> SiteArrays:
    """Reads, harmonises and aligns every modality of a site to its footprint.

    Dates come out ascending (several cubes or an unsorted time axis are sorted together; decisions of an unsorted cube say so), one
    per pass of the satellite. Dates that see nothing of the footprint are dropped, and so are those of a series below
    `grid.min_clear`; a modality without any date left is absent. Of several hr images the one that shows most is kept.

    Args:
        grid: pixel sizes, `max_dates`, `min_clear`; `side_m`/`tile` are `split_site`'s, done before.
        quality: which dates are good enough; default: `QualityConfig()`.
        modalities: only these; empty = all present that are read by default (not s2_l1c).

    Raises:
        SourceFault: naming the asset and why: wrong bands, outside the footprint, a product listed twice, nothing valid, or nothing
            left of what could not be read.
    """
    quality = quality or QualityConfig()
    series: dict[str, Series] = {}
    empty: list[str] = []
    losses: list[Loss] = []
    for modality in record.modalities:
        if modality not in (modalities or default_modalities()):
            continue
        read = _read_modality(record, modality, grid, quality, losses)
        if read is None:
            empty.append(modality)
        else:
            series[modality] = read
    if not series:
        if losses:
            more = f" (and {len(losses) - 1} more)" if len(losses) > 1 else ""
            raise SourceFault(losses[0]["asset"], f"{losses[0]['why']}{more}")
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
        rasters=_read_labels(record, grid, losses),
        classes={name: list(names) for name, names in record.classes.items()},
        losses=losses,
    )


def image_groups(record: SiteRecord, modality: str) -> list[tuple[list[Asset], Asset | None]]:
    """Files that make one cube each: the bands of one acquisition together, with the mask raster of the same item."""
    groups: dict[Any, list[Asset]] = {}
    for number, asset in enumerate(record.of(modality)):
        own = asset.format not in PER_BAND
        groups.setdefault((_item(asset), asset.datetime, asset.product_id, number if own else -1), []).append(asset)
    clouds = {_item(asset): asset for asset in sorted(record.of(*MASKS), key=lambda a: -MASKS.index(a.modality))}
    return [(assets, clouds.get(_item(assets[0]))) for assets in groups.values()]


def _item(asset: Asset) -> str:
    return asset.id.rsplit("/", 1)[0]


def target_grid(record: SiteRecord, modality: str, native: Grid, grid: GridConfig) -> Grid:
    """The modality's pixel grid over the footprint: the configured pixel size, else the source's own (even if not square)."""
    gsd = grid.series_gsd_m if MODALITIES[modality].is_series else _still_gsd_m(modality, grid)
    if gsd is not None:
        return grid_over(record.crs, record.footprint, gsd)
    if same_crs(native.crs, record.crs) and native.is_north_up and is_metric(native.crs, native.bounds):
        return grid_over(record.crs, record.footprint, native.transform[0], -native.transform[4])
    return grid_over(record.crs, record.footprint, native.gsd_m())


def _still_gsd_m(modality: str, grid: GridConfig) -> float | None:
    """hr has a size of its own; a coarse layer without dates (elevation) lies on the series' grid."""
    return grid.hr_gsd_m if MODALITIES[modality].kind == "colour" else grid.series_gsd_m


def _read_modality(
    record: SiteRecord, modality: str, grid: GridConfig, quality: QualityConfig, losses: list[Loss]
) -> Series | None:
    spec = MODALITIES[modality]
    target: Grid | None = None
    frames: list[Frame] = []
    outside: Asset | None = None
    lost: list[Loss] = []
    keep = _kept_dates(record, modality, grid)
    for number, (assets, cloud) in enumerate(image_groups(record, modality)):
        if keep is not None and not any(group == number for group, _ in keep):
            continue
        try:
            with contextlib.closing(open_cube(assets, spec.bands, cloud)) as cube:
                target = target or target_grid(record, modality, _finest(cube), grid)
                if all(needed_window(layer.grid, target, "class") is None for layer in cube.layers):
                    outside = outside or cube.asset
                    continue
                dates = [d for d in range(len(cube.dates)) if keep is None or (number, d) in keep]
                found = _frames(tuple(assets), cube, spec, dates, target, quality, lost)
                if spec.kind == "backscatter" and (angle := _incidence(record, assets[0], target)):
                    for frame in found:
                        frame.decision["incidence_deg"] = angle
                frames += found
        except ReadFault as fault:
            lost.append(_loss(modality, assets[0].datetime, fault.asset, fault.why))
    least = grid.min_clear if spec.is_series else 0.0
    frames = [f for f in frames if (f.mask_HW != NODATA).any() and (f.mask_HW == CLEAR).mean() >= least]
    if not frames and not lost and outside is not None:
        raise SourceFault(
            outside.id, f"lies outside the site's footprint {tuple(round(v, 3) for v in record.footprint)}"
        )
    frames = by_overpass(frames, f"{record.key}/{modality}") if spec.is_series else frames
    frames = _one_calibration(frames, modality, quality, lost)
    if frames and not spec.is_series:
        frames = [best_picture(frames)]
    if spec.is_series and 0 < len(frames) < quality.min_dates:
        why = f"{len(frames)} dates are left, quality.min_dates={quality.min_dates}"
        lost.append(_loss(modality, "", f"{record.key}/{modality}", why))
        frames = []
    losses += lost
    if not frames or target is None:
        return None
    return _series(frames, spec, target)


def _finest(cube: Cube) -> Grid:
    return min((layer.grid for layer in cube.layers), key=lambda grid: grid.gsd_m())


def _series(frames: list[Frame], spec: ModalitySpec, target: Grid) -> Series:
    return Series(
        pixels_TCHW=_stacked([frame.pixels_CHW for frame in frames]),
        mask_THW=_stacked([frame.mask_HW for frame in frames]),
        datetimes=[frame.datetime for frame in frames],
        transform=target.transform,
        gsd_m=float(target.gsd_m()),
        product_ids=[frame.product_id for frame in frames],
        orbits=[frame.orbit for frame in frames] if spec.kind == "backscatter" else [],
        decisions=[frame.decision for frame in frames],
    )


def _loss(modality: str, moment: str, asset: str, why: str) -> Loss:
    return {"modality": modality, "datetime": moment, "asset": asset, "why": why}


def _kept_dates(record: SiteRecord, modality: str, grid: GridConfig) -> set[tuple[int, int]] | None:
    """(group, date) pairs that `max_dates` keeps, evenly spread over time; None = all. Only files that carry their own dates are
    opened for it."""
    if grid.max_dates is None or not MODALITIES[modality].is_series:
        return None
    stamps: list[tuple[str, int, int]] = []
    for number, (assets, _) in enumerate(image_groups(record, modality)):
        if assets[0].format in PER_BAND:
            stamps.append((assets[0].datetime, number, 0))
            continue
        with contextlib.suppress(ReadFault), contextlib.closing(open_cube(assets, MODALITIES[modality].bands)) as cube:
            stamps += [(info.datetime, number, date) for date, info in enumerate(cube.dates)]
    stamps.sort()
    return {stamps[i][1:] for i in spread(len(stamps), grid.max_dates)}


def _frames(
    assets: tuple[Asset, ...],
    cube: Cube,
    spec: ModalitySpec,
    dates: list[int],
    target: Grid,
    quality: QualityConfig,
    lost: list[Loss],
) -> list[Frame]:
    """The usable dates of one cube; what is wrong with the others goes to `lost`."""
    stamps = [cube.dates[date].datetime for date in dates]
    common = common_entry(cube, target, "sorted" if stamps != sorted(stamps) else "")
    decided = _decisions(assets, cube, spec, dates, quality)
    frames = []
    for date in dates:
        moment, dated = cube.dates[date].datetime, decided[date]
        if why := judged(dated.flags, quality, cube.asset.id):
            lost.append(_loss(spec.name, moment, cube.asset.id, why))
            continue
        try:
            frames.append(read_frame(cube, date, target, spec, dated, common, quality))
        except ReadFault as fault:
            lost.append(_loss(spec.name, moment, fault.asset, fault.why))
    return frames


def _decisions(
    assets: tuple[Asset, ...], cube: Cube, spec: ModalitySpec, dates: Sequence[int], quality: QualityConfig
) -> dict[int, Dated]:
    if spec.kind == "reflectance":
        return reflectance_decisions(assets, cube, spec, dates, quality.on_contradiction)
    if spec.kind != "backscatter":
        return dict.fromkeys(dates, Dated((), {}))
    unit, flags = backscatter_decision(cube)
    decided = {}
    for date in dates:
        entry: dict[str, Any] = {"source_unit": unit}
        if cube.asset.calibration:
            entry["calibration"] = cube.asset.calibration
        if track := cube.dates[date].relative_orbit or cube.asset.relative_orbit:
            entry["relative_orbit"] = track
        if flags and quality.on_contradiction == "correct":  # the unit that the numbers show is the one that is used
            entry["corrected"], entry["flags"] = True, list(flags)
            decided[date] = Dated((), entry)
        else:
            decided[date] = Dated((), entry, flags)
    return decided


def _incidence(record: SiteRecord, image: Asset, target: Grid) -> float | str:
    """Mean angle over the site in degrees, of the item's raster of angles, else as declared for the scene; 0 where nobody says. An
    angle is no pixel: a raster that cannot be read costs nothing but the number, and says so."""
    for asset in record.of(INCIDENCE):
        if _item(asset) != _item(image):
            continue
        try:
            with contextlib.closing(open_cube([asset], ("",))) as cube:
                window = needed_window(cube.layers[0].grid, target, "class")
                if window is None:
                    continue
                raw_HW = cube.read(0, 0, window)[0].astype(np.float64)
                nodata = nodata_of(cube, 0)
        except ReadFault as fault:
            return f"unreadable: {fault.asset}"
        seen = raw_HW[np.isfinite(raw_HW) & (raw_HW != (0 if nodata is None else nodata))]
        if seen.size:
            mean = float(seen.mean()) * (asset.scale or 1.0) + (asset.offset or 0.0)
            return round(float(np.degrees(mean)) if mean < np.pi / 2 else mean, 2)
    return round(image.incidence_deg, 2)


def _one_calibration(frames: list[Frame], modality: str, quality: QualityConfig, lost: list[Loss]) -> list[Frame]:
    """Sigma0 and gamma0 are never one series: the calibration that most dates have is kept."""
    odd = flag_mixture(frames) if MODALITIES[modality].kind == "backscatter" else {}
    for number, said in odd.items():
        why = judged((said,), quality, frames[number].asset)
        lost.append(_loss(modality, frames[number].datetime, frames[number].asset, why))
    return [frame for number, frame in enumerate(frames) if number not in odd]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """[T, …]; a single image, which may be large, is not copied."""
    return images[0][None] if len(images) == 1 else np.stack(images)


def _read_labels(record: SiteRecord, grid: GridConfig, losses: list[Loss]) -> dict[str, np.ndarray]:
    """Label rasters as int16 [H, W] on the series grid, -1 = unlabelled; nearest neighbour. One that cannot be read is lost."""
    target = grid_over(record.crs, record.footprint, grid.series_gsd_m or 10.0)
    rasters = {}
    for asset in record.of("label"):
        try:
            raster = _label_raster(asset, target)
        except ReadFault as fault:
            losses.append(_loss("label", asset.datetime, fault.asset, fault.why))
            continue
        if raster is not None:
            rasters[asset.id.rsplit("/", 1)[1]] = raster
    return rasters


def _label_raster(asset: Asset, target: Grid) -> np.ndarray | None:
    with contextlib.closing(open_cube([asset], ("",))) as cube:
        source = cube.layers[0].grid
        window = needed_window(source, target, "class")
        if window is None:
            return None
        raw_HW = cube.read(0, 0, window)[0]
        if raw_HW.dtype.kind not in "ui":
            raise SourceFault(asset.id, f"label raster holds {raw_HW.dtype}, wanted whole numbers: {asset.href}")
        nodata = nodata_of(cube, 0)
        labelled = raw_HW >= 0 if nodata is None else (raw_HW >= 0) & (raw_HW != nodata)
        values, valid = place(raw_HW[None].astype(np.int32), labelled, source.sub(window), target, "class")
        return np.where(valid, values[0], -1).astype(np.int16)
