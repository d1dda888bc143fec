"""Which site goes into which shard: a pure function of catalog and config, the same on every machine and worker count.

Sites that turn out faulty while reading drop out of *their* shard only; nothing else moves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.errors import UsageError
from data_prep.config import SPLITS, BuildConfig, GridConfig
from data_prep.geo import Bounds, boxes_meet, has_place
from data_prep.held import Held
from data_prep.merge import shaping_config
from data_prep.schema import MODALITIES, default_modalities
from data_prep.shards import shard_name
from data_prep.sources.records import INCIDENCE, MASKS, Asset, SiteRecord, SourceFault
from data_prep.split import assign


@dataclass(frozen=True)
class PlannedShard:
    """These sites, in this order, into the tar `name`. spares: site key → modality → dates that may replace a broken one."""

    name: str
    split: str
    records: tuple[SiteRecord, ...]
    spares: dict[str, dict[str, list[tuple[Asset, ...]]]] = field(default_factory=dict)

    @property
    def num_sites(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    shards: in the order of the finished set.
    fingerprint: of everything that decides the bytes; parts of another plan are never mixed in.
    faults: sites that the plan itself refuses ({"site", "shard", "asset", "why"}).
    report: counts and the overlap report, for the manifest.
    """

    shards: tuple[PlannedShard, ...]
    fingerprint: str
    faults: tuple[dict[str, str], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def num_sites(self) -> int:
        return sum(len(shard.records) for shard in self.shards)

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]


def read_catalogs(config: BuildConfig) -> tuple[list[SiteRecord], list[SourceFault]]:
    """Sites of all catalogs, cut to the grid, and those that cannot be placed.

    Raises UsageError for a catalog that is missing, unreadable or empty.
    """
    from data_prep.sources import open_catalog
    from data_prep.sources.sites import Cutter

    if not config.source.catalog:
        raise UsageError("source.catalog names no catalog; add one: source.catalog=[scenes/catalog.parquet]")
    faults: list[SourceFault] = []
    cutter = Cutter(config.grid)
    for url in config.source.catalog:
        found = open_catalog(url, faults)
        if not found and not faults:
            raise UsageError(f"{url} lists no site")
        for record in found:
            try:
                cutter.add(record)
            except SourceFault as fault:
                faults.append(fault)
    return cutter.sites(faults), faults


def make_plan(
    records: Sequence[SiteRecord], config: BuildConfig, faults: Sequence[SourceFault] = (), held: Held | None = None
) -> Plan:
    """The plan of a build. held: what the set has already; only what is new is planned, which may be nothing.

    Raises UsageError if no site is left to build, or labels whose class names disagree.
    """
    listed = len(records) + len(faults)
    chosen = [record for r in records if (record := _narrowed(r, config)) is not None]
    _check_classes(chosen)
    new, known = chosen, dict[str, int]()
    if held is not None:
        there = held.has([record.key for record in chosen])
        new = [record for record, its in zip(chosen, there) if not its and record.key not in held.removed]
        known = {"held": int(there.sum()), "removed": len(chosen) - len(new) - int(there.sum())}
    unique, duplicates, clashes = _deduplicated(new)
    result = assign(unique, config.split, held)
    shards = []
    for split in SPLITS:
        members = [record for record, its in zip(unique, result.splits) if its == split]
        members = [members[i] for i in scattered([record.key for record in members], config)]
        for number, group in enumerate(_packed(members, config)):
            shards.append(PlannedShard(shard_name(split, number), split, tuple(group)))
    if not shards and not (held is not None and chosen):
        raise UsageError(_nothing_to_build(records, config, faults))
    report = {
        "sites": {
            "listed": listed, "not_chosen": len(records) - len(chosen), "duplicates": duplicates,
            "planned": sum(len(s.records) for s in shards), **known,
        },
        "splits": result.report,
    }  # fmt: skip
    refused = [{"site": fault.asset, "shard": "", "asset": fault.asset, "why": fault.why} for fault in faults]
    return Plan(tuple(shards), _fingerprint(shards, config), (*refused, *clashes), report)


def _nothing_to_build(records: Sequence[SiteRecord], config: BuildConfig, faults: Sequence[SourceFault]) -> str:
    """Why no site is left, with what would leave some."""
    inside = [record for record in records if _in_box(record, config)]
    held = sorted({name for record in inside for name in record.modalities})
    wanted = config.source.modalities or default_modalities()
    said = [f"no site to build: the catalogs list {len(records) + len(faults)}"]
    if len(inside) < len(records):
        said.append(f"{len(records) - len(inside)} lie outside source.bbox")
    if inside:
        said.append(f"{len(inside)} hold only {', '.join(held)} and none of {', '.join(wanted)} (source.modalities)")
    if "s2_l1c" in held and "s2_l1c" not in wanted:
        said.append(
            "s2_l1c is Sentinel-2 above the atmosphere (L1C), which is never mixed with surface reflectance unasked: "
            "source.modalities=[s2_l1c] builds it"
        )
    if faults:
        said.append(f"{len(faults)} cannot be placed (first: {faults[0]})")
    return "; ".join(said)


def estimate_bytes(record: SiteRecord, grid: GridConfig) -> int:
    """Uncompressed bytes of a site's arrays, from metadata alone."""
    total = 4096
    for name, spec in MODALITIES.items():
        assets = record.of(name)
        if not assets:
            continue
        gsd = grid.series_gsd_m if spec.is_series else grid.hr_gsd_m
        if gsd is None:
            grids = [asset.grid for asset in assets if asset.grid is not None]
            gsd = min((g.gsd_m() for g in grids), default=spec.gsd_m)
        dated = {asset.datetime for asset in assets if asset.datetime}
        dates = max(len(dated), len(record.datetimes) if any(not a.datetime for a in assets) else 0, 1)
        total += modality_bytes(name, record.footprint, dates, gsd, grid)
    return total


def modality_bytes(name: str, footprint: Bounds, dates: int, gsd_m: float, grid: GridConfig) -> int:
    """Uncompressed bytes of one modality's pixels and masks over a footprint."""
    spec = MODALITIES[name]
    if not spec.is_series:
        dates = 1
    elif grid.max_dates:
        dates = min(dates, grid.max_dates)
    xmin, ymin, xmax, ymax = footprint
    pixels = max((xmax - xmin) / gsd_m, 1) * max((ymax - ymin) / gsd_m, 1)
    return int(dates * pixels * (len(spec.bands) * np.dtype(spec.dtype).itemsize + 1))


def _in_box(record: SiteRecord, config: BuildConfig) -> bool:
    """Whether a site meets `source.bbox`; one without a place meets no box."""
    box = config.source.bbox
    return box is None or (has_place(record.crs) and boxes_meet(record.bbox_wgs84, box))


def _narrowed(record: SiteRecord, config: BuildConfig) -> SiteRecord | None:
    """The record with the chosen modalities' assets only; None if it has none or lies outside the box."""
    if not _in_box(record, config):
        return None
    wanted = {*(config.source.modalities or default_modalities()), "label"}
    if wanted & {name for name, spec in MODALITIES.items() if spec.kind == "reflectance"}:
        wanted |= set(MASKS)  # mask rasters go with their image
    if wanted & {name for name, spec in MODALITIES.items() if spec.kind == "backscatter"}:
        wanted.add(INCIDENCE)
    if any(asset.modality not in wanted for asset in record.assets):
        record = dataclasses.replace(record, assets=tuple(a for a in record.assets if a.modality in wanted))
    return record if any(name in wanted for name in record.modalities) else None


def _check_classes(records: Iterable[SiteRecord]) -> None:
    """A label may not mean two things in one set. Raises UsageError."""
    known: dict[str, tuple[list[str], str]] = {}
    for record in records:
        for label, names in record.classes.items():
            first, owner = known.setdefault(label, (names, record.key))
            if first != names:
                raise UsageError(
                    f"label {label!r} has other class names at {record.key} than at {owner}: rename it in one of the catalogs "
                    "(geoloom:labels, label:classes), or build two sets"
                )


def _deduplicated(records: Iterable[SiteRecord]) -> tuple[list[SiteRecord], int, list[dict[str, str]]]:
    """(records, how many repeats of a footprint with the same dates were dropped, faults for keys that stand twice)."""
    kept: dict[str, SiteRecord] = {}
    seen: dict[tuple[Any, ...], str] = {}
    duplicates, clashes = 0, []
    for record in records:
        content = _content(record)
        if content in seen:
            duplicates += 1
        elif record.key in kept:
            why = f"key {record.key} already names another site; give the sites different ids or geoloom:site values"
            clashes.append({"site": record.key, "shard": "", "asset": record.assets[0].id, "why": why})
        else:
            kept[record.key] = record
            seen[content] = record.key
    return list(kept.values()), duplicates, clashes


def _content(record: SiteRecord) -> tuple[Any, ...]:
    """What makes two records the same observation: ground, and per asset its sensor, bands, date and product (or file)."""
    return record.crs, tuple(round(v, 2) for v in record.footprint), _observed(record.assets)


@functools.lru_cache(maxsize=4096)  # the sites cut out of one scene share its assets
def _observed(assets: tuple[Asset, ...]) -> tuple[Any, ...]:
    return tuple(sorted((a.modality, a.bands, a.datetime, a.product_id or a.href, a.member) for a in assets))


def _packed(records: Sequence[SiteRecord], config: BuildConfig) -> Iterable[list[SiteRecord]]:
    group: list[SiteRecord] = []
    size = 0
    for record in records:
        estimate = estimate_bytes(record, config.grid)
        if group and (size + estimate > config.shards.max_bytes or len(group) >= config.shards.max_samples):
            yield group
            group, size = [], 0
        group.append(record)
        size += estimate
    if group:
        yield group


def scattered(keys: Sequence[str], config: BuildConfig) -> list[int]:
    """Positions of sites in the order of their hashes (`shards.order` hash), or as they come."""
    if config.shards.order != "hash":
        return list(range(len(keys)))
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{config.split.seed}:{keys[i]}".encode()).digest())


def _fingerprint(shards: Sequence[PlannedShard], config: BuildConfig) -> str:
    """Of config and sites, but not of folders: the same data read from another place is the same plan."""
    digest = hashlib.sha256(json.dumps(shaping_config(config), sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode())
        for record in shard.records:
            facts = (
                record.key, record.cell, record.crs, record.footprint, record.bbox_wgs84, record.datetimes, record.product_ids,
                sorted(record.scalars.items()), sorted(record.classes.items()),
            )  # fmt: skip
            digest.update(json.dumps(facts).encode())
            digest.update(_assets_text(record.assets))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4096)
def _assets_text(assets: tuple[Asset, ...]) -> bytes:
    """Everything the catalog says about the assets but the folders they lie in."""
    trees = [dataclasses.asdict(asset) | {"href": asset.href.rsplit("/", 1)[-1]} for asset in assets]
    return json.dumps(trees, sort_keys=True).encode()
