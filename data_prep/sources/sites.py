"""Items to sites: grouping, the common footprint, and cutting large footprints into sites of one size. Opens no pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from cluster.errors import UsageError
from data_prep.geo import (
    Bounds,
    Grid,
    bbox_wgs84,
    centre_wgs84,
    ground_cell,
    has_place,
    inner_bounds,
    intersection,
    is_geographic,
    is_metric,
    same_crs,
    snap_inward,
    utm_code,
)
from data_prep.prepare.lattice import squares_within, zone_of_crs
from data_prep.schema import MODALITIES, default_modalities
from data_prep.sources.open import open_cube
from data_prep.sources.raster import open_raster, raster_grid
from data_prep.sources.records import Asset, SiteRecord, SourceFault
from data_prep.sources.stac import item_assets, item_classes, item_footprint, item_scalars, site_name

if TYPE_CHECKING:
    from data_prep.config import GridConfig

CELL_SPAN_M = 12_000.0
# Of a 10 m pixel: 10 cm, less than half an hr pixel, so that no edge pixel loses its centre.
EDGE_TOLERANCE_PX = 0.01


def anchors() -> list[str]:
    """Modalities by whose grid a site is placed, first choice first. Series come first: their 10 m grid is the one that must not be
    resampled, hr is fine enough to follow."""
    return sorted(MODALITIES, key=lambda name: (not MODALITIES[name].is_default, not MODALITIES[name].is_series))


def group_items(items: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(site key, its items) in the order the sites first appear."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(site_name(item), []).append(item)
    return list(groups.items())


def site_record(key: str, items: list[dict[str, Any]]) -> SiteRecord:
    """One site of its items. Files are opened only where the catalog does not say where they lie.

    Raises:
        SourceFault: no usable asset, or assets that share no ground.
    """
    assets = tuple(asset for item in items for asset in item_assets(item))
    if not any(asset.modality in MODALITIES for asset in assets):
        known = ", ".join(MODALITIES)
        raise SourceFault(key, f"no asset is recognised as one of {known}; name it with geoloom:modality or eo:bands")
    explicit = next((box for item in items if (box := item_footprint(item))), None)
    crs, footprint = common_footprint(key, assets, explicit)
    scalars: dict[str, int] = {}
    classes: dict[str, list[str]] = {}
    for item in items:
        scalars |= item_scalars(item)
        classes |= item_classes(item)
    cell = next(
        (str(c) for i in items if (c := i["properties"].get("geoloom:cell") or i["properties"].get("grid:code"))), ""
    )
    times = {asset.datetime for asset in assets if asset.datetime and asset.modality in default_modalities()}
    times |= {t for item in items for name in ("start_datetime", "end_datetime") if (t := _real_time(item, name))}
    return SiteRecord(
        key=key,
        cell=cell or ground_cell(*centre_wgs84(crs, footprint)),
        crs=crs,
        footprint=footprint,
        bbox_wgs84=bbox_wgs84(crs, footprint),
        assets=assets,
        datetimes=tuple(sorted(times)),
        product_ids=tuple(dict.fromkeys(asset.product_id for asset in assets if asset.product_id)),
        scalars=scalars,
        classes=classes,
    )


def _real_time(item: dict[str, Any], name: str) -> str:
    return "" if item["properties"].get("geoloom:date_unknown") else str(item["properties"].get(name) or "")


def asset_grid(asset: Asset) -> Grid:
    """Where an asset lies: as declared, else as the file says."""
    if asset.grid is not None:
        return asset.grid
    if asset.format.startswith("zarr"):
        with contextlib.closing(open_cube([asset], ())) as cube:
            return min((layer.grid for layer in cube.layers), key=lambda grid: grid.gsd_m())
    with open_raster(asset.href, asset.id) as dataset:
        return raster_grid(dataset, asset.id)


def common_footprint(key: str, assets: tuple[Asset, ...], explicit: Bounds | None) -> tuple[str, Bounds]:
    """(CRS, bounds) of the ground every modality of the site covers.

    The CRS is that of the series (they keep their pixel grid); a geographic one is replaced by the UTM zone of the centre,
    or one in feet or stretched metres (Web Mercator), because sites are measured in metres. The bounds are cut to whole series pixels. An `explicit` footprint narrows them.
    """
    present = [name for name in anchors() if any(asset.modality == name for asset in assets)]
    usual = [name for name in present if MODALITIES[name].is_default]
    present = usual or present  # what is read only when asked for does not narrow the ground of the others
    grids = {name: _largest([asset_grid(a) for a in assets if a.modality == name]) for name in present}
    anchor = grids[present[0]]
    crs = anchor.crs
    if not is_metric(crs, anchor.bounds):
        crs = utm_code(*centre_wgs84(crs, anchor.bounds))
    boxes = [inner_bounds(grid.crs, grid.bounds, crs) for grid in grids.values()]
    said = next((a.crs for a in assets if a.crs), crs)
    if explicit is not None and not _in_degrees(explicit, said):
        wanted = inner_bounds(said, explicit, crs)
        if intersection([*boxes, wanted]) is None:
            raise SourceFault(
                key, f"its footprint {tuple(round(v, 3) for v in explicit)} lies outside: {_places(grids)}"
            )
        boxes.append(wanted)
    shared = intersection(boxes)
    if shared is None:
        raise SourceFault(key, f"its modalities share no ground: {_places(grids)}")
    if MODALITIES[present[0]].kind == "colour" and same_crs(anchor.crs, crs):
        return crs, shared
    lattice = anchor if same_crs(anchor.crs, crs) and anchor.is_north_up else _lattice(crs, shared, anchor.gsd_m())
    snapped = snap_inward(shared, lattice, EDGE_TOLERANCE_PX)
    if snapped is None:
        raise SourceFault(key, f"its modalities share less than one pixel of ground: {_places(grids)}")
    return crs, snapped


def _in_degrees(box: Bounds, crs: str) -> bool:
    """Whether a footprint is the box in degrees, though its CRS counts metres (EOPF's items repeat `bbox` as `proj:bbox`)."""
    west, south, east, north = box
    looks = -180 <= west <= east <= 180 and -90 <= south <= north <= 90
    return looks and has_place(crs) and not is_geographic(crs)


def _largest(grids: list[Grid]) -> Grid:
    """The grid with the most ground, the finest pixels among equals (10 m bands before 60 m ones), the first among those."""
    areas = [grid.width * grid.height * grid.gsd_m() ** 2 for grid in grids]
    most = max(areas)
    return min((g for g, area in zip(grids, areas) if area > 0.999 * most), key=lambda grid: round(grid.gsd_m(), 3))


def _lattice(crs: str, bounds: Bounds, gsd_m: float) -> Grid:
    """The pixel lattice of a reprojected site: multiples of the Sentinel 10 m grid, which all UTM products share."""
    step = 10.0 if 8 <= gsd_m <= 12 else max(round(gsd_m, 1), 0.1)
    left, top = math.floor(bounds[0] / step) * step, math.ceil(bounds[3] / step) * step
    width, height = math.ceil((bounds[2] - left) / step), math.ceil((top - bounds[1]) / step)
    return Grid(crs, (step, 0.0, left, 0.0, -step, top), width, height)


def _places(grids: dict[str, Grid]) -> str:
    return ", ".join(f"{name} {tuple(round(v, 4) for v in bbox_wgs84(g.crs, g.bounds))}" for name, g in grids.items())


def split_site(record: SiteRecord, grid: GridConfig) -> list[SiteRecord]:
    """The site as `grid` wants it: itself; one centred site of `side_m`; or, with `tile`, all whole `side_m` squares.

    Squares of a satellite scene (wider than CELL_SPAN_M, in UTM) are those of the one global lattice (`data_prep.prepare.lattice`) whose
    zone it is, and are named by it: scenes that overlap share them (see `Cutter`). Those of a smaller footprint are laid from its top
    left corner, rows downward, and named `KEY_ROW_COL`; what is left over at the right and bottom edge is not used. A footprint smaller
    than `side_m` stays as it is.

    Raises:
        UsageError: `side_m` is not a whole number of series pixels.
    """
    xmin, ymin, xmax, ymax = record.footprint
    if grid.side_m is None:
        return [record]
    side, step = grid.side_m, grid.series_gsd_m
    if step is not None and abs(side / step - round(side / step)) > 1e-6:
        raise UsageError(
            f"grid.side_m={side:g} is not a multiple of grid.series_gsd_m={step:g}; take {round(side / step) * step:g}"
        )
    columns, rows = int((xmax - xmin) / side + 1e-6), int((ymax - ymin) / side + 1e-6)
    if columns < 1 or rows < 1:
        return [record]
    if not grid.tile:
        snap = step or 1.0
        left = xmin + math.floor((xmax - xmin - side) / 2 / snap + 1e-6) * snap
        top = ymax - math.floor((ymax - ymin - side) / 2 / snap + 1e-6) * snap
        return [_part(record, (left, top - side, left + side, top), record.key)]
    squares = squares_within(record.footprint, record.crs, round(side)) if lies_on_lattice(record, grid) else []
    if squares:  # none where the scene is hardly larger than a square: it is not lost for that
        return [_part(record, square.bounds, square.key) for square in squares]
    parts = []
    for row in range(rows):
        for column in range(columns):
            left, top = xmin + column * side, ymax - row * side
            key = record.key if rows == columns == 1 else f"{record.key}_{row}_{column}"
            parts.append(_part(record, (left, top - side, left + side, top), key))
    return parts


def lies_on_lattice(record: SiteRecord, grid: GridConfig) -> bool:
    """Whether a site is cut into squares of the global lattice: a scene in a UTM zone whose pixels the lattice keeps."""
    if not grid.tile or grid.side_m is None or not _is_wide(record) or zone_of_crs(record.crs) is None:
        return False
    step, (xmin, _, _, ymax) = grid.series_gsd_m or 10.0, record.footprint
    return round(grid.side_m) == grid.side_m and all(abs(v / step - round(v / step)) < 1e-6 for v in (xmin, ymax))


class Cutter:
    """Sites of one or several catalogs as `grid` cuts them; what overlapping scenes see of one square of the lattice is one site.

    So the dates of a place need not be grouped by anybody, no ground stands twice, and a pass that two tiles hold becomes one date when
    it is read (`overpass`).
    """

    def __init__(self, grid: GridConfig) -> None:
        self._grid = grid
        self._views: dict[str, list[SiteRecord]] = {}

    def add(self, record: SiteRecord) -> None:
        """Raises UsageError as `split_site`."""
        shared = lies_on_lattice(record, self._grid)
        for part in split_site(record, self._grid):
            # other keys are their owners' affair: two sites of one key are refused by the plan
            place = part.key if shared else f"{len(self._views)}/{part.key}"
            self._views.setdefault(place, []).append(part)

    def sites(self, faults: list[SourceFault]) -> list[SiteRecord]:
        """In the order in which they first appeared. Squares whose scenes give one label two values go to `faults`."""
        out = []
        for views in self._views.values():
            try:
                out.append(views[0] if len(views) == 1 else _joined(views))
            except SourceFault as fault:
                faults.append(fault)
        return out


def _joined(views: list[SiteRecord]) -> SiteRecord:
    """What several scenes hold of one square. Raises SourceFault where their labels differ."""
    scalars: dict[str, int] = {}
    classes: dict[str, list[str]] = {}
    assets: dict[str, Asset] = {}
    for view in views:
        for said, mine in ((scalars, view.scalars), (classes, view.classes)):
            for label in said.keys() & mine.keys():
                if said[label] != mine[label]:
                    raise SourceFault(
                        view.key, f"label {label} is {said[label]} in one scene and {mine[label]} in another"
                    )
            said |= mine  # type: ignore[operator]
        for asset in view.assets:
            assets.setdefault(asset.id, asset)
    return dataclasses.replace(
        views[0], assets=tuple(assets.values()), scalars=scalars, classes=classes,
        datetimes=tuple(sorted({moment for view in views for moment in view.datetimes})),
        product_ids=tuple(dict.fromkeys(product for view in views for product in view.product_ids)),
    )  # fmt: skip


def _is_wide(record: SiteRecord) -> bool:
    xmin, ymin, xmax, ymax = record.footprint
    return max(xmax - xmin, ymax - ymin) > CELL_SPAN_M


def _part(record: SiteRecord, footprint: Bounds, key: str) -> SiteRecord:
    own = _is_wide(record) and has_place(record.crs)
    cell = ground_cell(*centre_wgs84(record.crs, footprint)) if own else record.cell
    return dataclasses.replace(
        record, key=key, footprint=footprint, bbox_wgs84=bbox_wgs84(record.crs, footprint), cell=cell
    )
