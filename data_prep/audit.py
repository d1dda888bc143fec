"""Radiometry and alignment of every asset: what metadata claims, what pixels say, what a build would do; contradictions.

Works on catalogs, on raw folders in any layout, and on finished shard sets (what was decided when they were built, and whether
the stored numbers bear it out). Evidence is the very sample that a build judges by, so both always agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.progress import progress
from cluster.storage import exists, join
from data_prep.config import GridConfig
from data_prep.executors import Executor, run_units
from data_prep.geo import Grid, aligned_offset, crs_of, same_crs
from data_prep.harmonise import ABSENT_BELOW, backscatter_unit, claim_of, dark_floors, judge
from data_prep.schema import CLEAR, CLOUD, MODALITIES, NODATA, SiteArrays
from data_prep.sources.cube import Cube
from data_prep.sources.decisions import reflectance_decisions
from data_prep.sources.evidence import Floors, backscatter_sample, pooled, sample_windows, spread
from data_prep.sources.open import open_cube
from data_prep.sources.read import image_groups, target_grid
from data_prep.sources.records import Asset, SiteRecord, SourceFault

if TYPE_CHECKING:
    from data_prep.shards import ShardSet

THREADS = 2
TOGETHER = 64  # samples of a shard set that a worker audits at a time: each time it opens the set's index
MAX_SAMPLED_DATES = 16


@dataclass
class Row:
    """One asset (or the band files of one acquisition) as the table shows it. contradictions and fault: empty = fine."""

    asset: str
    modality: str
    href: str = ""
    dates: int = 0
    claim: str = ""
    floor: str = ""
    pixels: str = ""
    applied: str = ""
    nodata_share: float = 0.0
    alignment: str = ""
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: str = ""

    @property
    def verdict(self) -> str:
        return "FAULT" if self.fault else "FLAG" if self.contradictions else "ok"


def audit_catalog(records: Iterable[SiteRecord], executor: Executor | None = None) -> list[Row]:
    """Rows of all sites, in catalog order. executor: None or local: two threads (rasterio and zarr release the GIL)."""
    sites = list(records)
    if executor is not None and executor.kind != "local":
        return _spread(_audit_numbered, list(enumerate(sites)), [site.key for site in sites], executor)
    rows: list[Row] = []
    with ThreadPoolExecutor(THREADS) as pool, progress(len(sites), "auditing") as bar:
        for found in pool.map(audit_site, sites):
            rows += found
            bar.advance()
    return rows


def _spread(
    work: Callable[..., tuple[int, list[Row]]], jobs: Sequence[Any], names: list[str], executor: Executor
) -> list[Row]:
    """Rows of numbered units, in the order of their numbers."""
    found: dict[int, list[Row]] = {}
    with progress(len(jobs), "auditing") as bar:
        for number, rows in run_units(work, jobs, names, executor, lambda _: None):
            found[number] = rows
            bar.advance()
    return [row for number in sorted(found) for row in found[number]]


def _audit_numbered(job: tuple[int, SiteRecord], report: Callable[[Any], None]) -> tuple[int, list[Row]]:
    return job[0], audit_site(job[1])


def audit_site(record: SiteRecord) -> list[Row]:
    """Rows of one site, and the contradictions that only show between its assets."""
    rows = [
        _audit_group(record, modality, assets, cloud)
        for modality in MODALITIES
        for assets, cloud in image_groups(record, modality)
    ]
    kinds = {asset.calibration for asset in record.of("s1") if asset.calibration}
    if len(kinds) > 1:
        for row in rows:
            if row.modality == "s1":
                row.contradictions.append(f"the site mixes {' and '.join(sorted(kinds))}")
    return rows


def _audit_group(record: SiteRecord, modality: str, assets: list[Asset], cloud: Asset | None) -> Row:
    row = Row(group_name(assets), modality, assets[0].href)
    try:
        with contextlib.closing(open_cube(assets, audited_bands(modality, assets), cloud)) as cube:
            row.dates = len(cube.dates)
            row.alignment = alignment(record, modality, cube)
            if row.alignment == "outside":
                raise SourceFault(row.asset, "lies outside the footprint of its site")
            kind = MODALITIES[modality].kind
            if kind == "reflectance":
                _audit_optical(row, tuple(assets), cube)
            elif kind == "backscatter":
                _audit_radar(row, cube)
            else:
                row.claim, row.applied = "0-255" if kind == "colour" else "", "none"
            stamps = [info.datetime for info in cube.dates]
            if stamps != sorted(stamps):
                row.notes.append("dates are not in order; a build sorts them")
            if row.nodata_share >= 1.0:
                raise SourceFault(row.asset, "holds no valid pixel")
    except SourceFault as fault:
        row.fault = fault.why
    return row


def group_name(assets: list[Asset]) -> str:
    """`ITEM/ASSET`; for one file per band `ITEM/B02+11`."""
    return assets[0].id if len(assets) == 1 else f"{assets[0].id}+{len(assets) - 1}"


def audited_bands(modality: str, assets: list[Asset]) -> tuple[str, ...]:
    """The bands a build reads; of what is read only when asked for, all there are: B10 of L1C is the telling one."""
    spec = MODALITIES[modality]
    held = tuple(dict.fromkeys(band for asset in assets for band in asset.bands))
    return spec.bands if spec.is_default or set(spec.bands) <= set(held) else held


def _audit_optical(row: Row, assets: tuple[Asset, ...], cube: Cube) -> None:
    spec = MODALITIES[row.modality]
    decided = reflectance_decisions(assets, cube, spec, range(len(cube.dates)))
    claims = {
        f"{_number(c.offset_dn)} ({c.basis})"
        for info in cube.dates
        for c in [claim_of(cube.speaker(0), info.baseline, info.offset_dn, spec.has_boa_offset)]
    }
    floors = [floor for dated in decided.values() for floor in dated.floors]
    darkest = pooled(floors)
    row.claim = ", ".join(sorted(claims)[:3])
    row.floor = f"{darkest.floor_dn} {darkest.band}" if darkest.floor_dn is not None else ""
    verdicts = sorted({str(dated.entry.get("pixels", "unclear")) for dated in decided.values()})
    row.pixels = f"offset {' and '.join(verdicts)}"
    row.applied = ", ".join(sorted({_number(d.offset_applied) for dated in decided.values() for d in dated.layers}))
    row.nodata_share = float(np.mean([floor.zero_share for floor in floors])) if floors else 0.0
    row.contradictions += dict.fromkeys(flag for dated in decided.values() for flag in dated.flags)
    if any(str(dated.entry["basis"]).startswith("nothing declared") for dated in decided.values()):
        row.notes.append("no offset or baseline declared: the pixels decided")


def _audit_radar(row: Row, cube: Cube) -> None:
    declared = cube.asset.unit
    sample = backscatter_sample(cube)
    unit, flags = backscatter_unit(sample, declared, cube.asset.id)
    orbits = sorted({info.orbit for info in cube.dates} - {""})
    row.claim = " ".join(filter(None, (declared or "unit not said", cube.asset.calibration, "+".join(orbits))))
    row.pixels = unit
    row.floor = f"median {np.median(sample):.3g}" if sample.size else ""
    row.applied = "10 log10" if unit == "linear" else "none"
    row.contradictions += flags
    row.nodata_share = _invalid_share(cube)


def _invalid_share(cube: Cube) -> float:
    bad = total = 0
    for date in spread(len(cube.dates), MAX_SAMPLED_DATES):
        for window in sample_windows(cube.layers[0].grid)[:4]:
            raw = cube.read(date, 0, window)
            bad, total = bad + int((~np.isfinite(raw) | (raw == 0)).sum()), total + raw.size
    return bad / total if total else 1.0


def alignment(record: SiteRecord, modality: str, cube: Cube) -> str:
    """How the asset meets its site's grid: `copy`, `resampled 20>10 m`, `shift 0.30,0.00 px`, `reprojected`, or `outside`."""
    native = min((layer.grid for layer in cube.layers), key=lambda grid: grid.gsd_m())
    target = target_grid(record, modality, native, GridConfig())
    parts = []
    for layer in cube.layers:
        words = _meets(layer.grid, target)
        if words not in parts:
            parts.append(words)
    return ", ".join(parts)


def _meets(source: Grid, target: Grid) -> str:
    from data_prep.resample import needed_window

    if needed_window(source, target, "class") is None:
        return "outside"
    if aligned_offset(source, target) is not None:
        return "copy"
    if not same_crs(source.crs, target.crs):
        authority = crs_of(source.crs).to_authority()
        return f"reprojected from {':'.join(authority) if authority else 'a CRS without code'}"
    if abs(source.gsd_m() - target.gsd_m()) > 1e-3 * target.gsd_m():
        return f"resampled {source.gsd_m():.4g}>{target.gsd_m():.4g} m"
    a, _, c, _, e, f = source.transform
    col, row = (target.transform[2] - c) / a, (target.transform[5] - f) / e
    return f"shift {col - round(col):+.2f},{row - round(row):+.2f} px"


def audit_shards(url: str, executor: Executor | None = None) -> list[Row]:
    """Rows of a finished shard set: recorded decisions and flags, against the numbers that were stored."""
    from data_prep.shards import ShardSet

    shards = ShardSet.open(url)
    if executor is not None and executor.kind != "local":
        starts = range(0, shards.num_samples, TOGETHER)
        jobs = [(url, start, min(start + TOGETHER, shards.num_samples)) for start in starts]
        return _spread(_audit_stored, jobs, [f"{url} rows from {start}" for start in starts], executor)
    rows = []
    with progress(shards.num_samples, "auditing") as bar:
        for number in range(shards.num_samples):
            rows += _stored_rows(shards, number)
            bar.advance()
    return rows


def _audit_stored(job: tuple[str, int, int], report: Callable[[Any], None]) -> tuple[int, list[Row]]:
    from data_prep.shards import ShardSet

    url, start, stop = job
    shards = ShardSet.open(url)
    return start, [row for number in range(start, stop) for row in _stored_rows(shards, number)]


def _stored_rows(shards: ShardSet, number: int) -> list[Row]:
    from data_prep.codec import MemberError

    try:
        site = shards.read_sample(number)
        return [_stored_row(site, name) for name in site.series]
    except (MemberError, OSError) as error:
        return [Row(f"{shards.url} row {number}", "", fault=f"{error}; see data_prep verify")]


def _stored_row(site: SiteArrays, name: str) -> Row:
    series = site.series[name]
    row = Row(
        f"{site.key}/{name}", name, dates=len(series.datetimes), nodata_share=float((series.mask_THW == NODATA).mean())
    )
    offsets = {decision.get("offset_applied") for decision in series.decisions} - {None}
    row.applied = ", ".join(sorted(_number(value) for value in offsets)) or "none"
    bases = {str(decision.get("basis") or decision.get("source_unit") or "") for decision in series.decisions}
    row.claim = ", ".join(sorted(bases - {""})[:3])
    row.contradictions += dict.fromkeys(flag for decision in series.decisions for flag in decision.get("flags", []))
    seen = (series.mask_THW == CLEAR) | (series.mask_THW == CLOUD)
    kind = MODALITIES[name].kind
    if kind == "reflectance" and seen.any():
        floors = _stored_floors(name, series.pixels_TCHW, seen)
        evidence = floors.judge()
        row.floor, row.pixels = f"{evidence.floor_dn} {evidence.band}", "offset " + evidence.verdict
        if evidence.verdict == "present" and not row.contradictions:
            row.notes.append("the stored floor lies near 1000: the scene is bright, or the offset is still in")
    if kind == "backscatter" and seen.any():
        values = series.pixels_TCHW.transpose(1, 0, 2, 3)[:, seen].astype(np.float32)
        row.floor, row.pixels = f"median {np.nanmedian(values):.3g}", "dB"
        if not np.isfinite(values).all() or float(np.nanmedian(values)) >= 0:
            row.contradictions.append(
                "stored backscatter is not dB: not finite where the mask says valid, or not negative"
            )
    if kind == "reflectance" and (series.pixels_TCHW.transpose(1, 0, 2, 3)[:, seen] == 0).any():
        row.contradictions.append("0 (nodata) stands where the mask says valid")
    height, width = series.pixels_TCHW.shape[-2:]
    bounds = Grid(site.crs, series.transform, width, height).bounds
    gap = max(abs(a - b) for a, b in zip(bounds, site.footprint)) / max(series.transform[0], 1e-9)
    row.alignment = "exact" if gap < 1e-3 else f"off by {gap:.2f} px"
    if gap >= 0.5:
        row.contradictions.append(f"pixels reach {gap:.2f} px past or short of the site's footprint")
    return row


def _stored_floors(modality: str, pixels_TCHW: np.ndarray, seen_THW: np.ndarray) -> Floors:
    bands = MODALITIES[modality].bands
    histograms = {
        band: np.bincount(pixels_TCHW[:, number][seen_THW].astype(np.int64), minlength=65536)
        for number, band in enumerate(bands)
    }
    floors, pixels = dark_floors(histograms)
    return Floors(floors, pixels, 0.0)


def audit(url: str, layout: str | None = None, executor: Executor | None = None) -> list[Row]:
    """Rows of a shard set, a STAC catalog, or a folder in one of the layouts (guessed when not named).

    executor: who looks at the pixels; None: this process. The rows and their order are the same.

    Raises:
        UsageError: nothing there, or no layout recognised.
    """
    from data_prep.catalog import detect_layout, scan
    from data_prep.sources.sites import group_items, site_record

    if layout is None and exists(join(url, "manifest.json")):
        return audit_shards(url, executor)
    found = scan(url, layout or detect_layout(url))
    records: list[SiteRecord] = []
    faults = list(found.faults)
    for key, items in group_items(found.items):
        try:
            records.append(site_record(key, items))
        except SourceFault as fault:
            faults.append(fault)
    return [*audit_catalog(records, executor), *(Row(fault.asset, "", fault=fault.why) for fault in faults)]


def figures(rows: list[Row]) -> dict[str, Any]:
    """The `--json` line."""
    return {
        "assets": len(rows),
        "contradictions": [{"asset": row.asset, "why": why} for row in rows for why in row.contradictions],
        "faults": [{"asset": row.asset, "why": row.fault} for row in rows if row.fault],
    }


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as fixed-width text, then one line per contradiction, fault and note."""
    heads = ("asset", "mod", "dates", "declared", "floor", "pixels say", "applied", "nodata", "alignment", "verdict")
    cells = [
        (r.asset, r.modality, str(r.dates), r.claim, r.floor, r.pixels, r.applied, f"{r.nodata_share:.1%}", r.alignment, r.verdict)
        for r in rows
    ]  # fmt: skip
    widths = [min(max(len(line[i]) for line in [heads, *cells]), 60) for i in range(len(heads))]
    for line in [heads, tuple("-" * width for width in widths), *cells]:
        yield "  ".join(text[:width].ljust(width) for text, width in zip(line, widths)).rstrip()
    for row in rows:
        for why in row.contradictions:
            yield f"FLAG  {row.asset}: {why}"
        if row.fault:
            yield f"FAULT {row.asset}: {row.fault}"
        for note in row.notes:
            yield f"note  {row.asset}: {note}"


def rows_json(rows: list[Row]) -> str:
    """All rows as JSON lines, for `--out`."""
    return "".join(json.dumps({**dataclasses.asdict(row), "verdict": row.verdict}) + "\n" for row in rows)


def _number(value: float | None) -> str:
    return "not said" if value is None else f"{value:+g}" if value else "0"


__all__ = [
    "ABSENT_BELOW",
    "Row",
    "audit",
    "audit_catalog",
    "audit_shards",
    "audit_site",
    "figures",
    "judge",
    "rows_json",
    "table",
]
