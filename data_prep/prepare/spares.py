"""A prepared site's spare dates take the place of images that turn out broken, or empty where the site lies."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping, Sequence

from data_prep.schema import SiteArrays
from data_prep.sources.records import Asset, SiteRecord, SourceFault

Spares = Mapping[str, Sequence[tuple[Asset, ...]]]  # modality → dates in order of rank
SAME_PASS = dt.timedelta(minutes=30)  # tiles of one overpass become one date, under the time of one of them


def read_with_spares(record: SiteRecord, spares: Spares, read: Callable[[SiteRecord], SiteArrays]) -> SiteArrays:
    """`read(record)`; as long as images are missing in what comes back, with the next spare dates of their modality instead.

    An image is missing if the reading fails over it (SourceFault), goes on without it (`SiteArrays.losses`), or drops its date: no
    valid pixel, or fewer clear ones than `grid.min_clear`. What stands in for what follows from the plan and the pixels alone, so a
    repeated build makes the same bytes.

    Raises SourceFault, as the last reading did, when no spare is left for what is broken.
    """
    waiting = {name: list(images) for name, images in spares.items()}
    while True:
        site, fault = None, None
        try:
            site = read(record)
            missing = [
                *(_item(str(loss["asset"])) for loss in site.losses),
                *_dropped(record, site, waiting),
            ]
        except SourceFault as error:
            fault, missing = error, [_item(error.asset)]
        replaced = record
        for item in dict.fromkeys(missing):
            replaced = _without(replaced, item, waiting)
        if replaced is record:
            if site is None:
                assert fault is not None
                raise fault
            return site
        record = replaced


def _dropped(record: SiteRecord, site: SiteArrays, waiting: Mapping[str, Sequence[object]]) -> list[str]:
    """Items of modalities with spares whose date is not in the site."""
    items: list[str] = []
    for name in waiting:
        series = site.series.get(name)
        if series is None or not waiting[name]:
            continue
        kept = [_time(text) for text in series.datetimes if text]
        for asset in record.of(name):
            if asset.datetime and not any(abs(_time(asset.datetime) - time) <= SAME_PASS for time in kept):
                items.append(_item(asset.id))
    return items


def _without(record: SiteRecord, item: str, waiting: dict[str, list[tuple[Asset, ...]]]) -> SiteRecord:
    """The record with an item replaced by the next spare date of its modality; itself if there is none."""
    lost = [asset for asset in record.assets if _item(asset.id) == item]
    name = next((asset.modality for asset in lost if asset.modality in waiting), "")
    if not lost or not waiting.get(name):
        return record
    spare = waiting[name].pop(0)
    place = record.assets.index(lost[0])
    assets = [asset for asset in record.assets if asset not in lost]
    assets[place:place] = spare
    return dataclasses.replace(
        record, assets=tuple(assets), datetimes=tuple(sorted({a.datetime for a in assets if a.datetime})),
        product_ids=tuple(dict.fromkeys(a.product_id for a in assets if a.product_id)),
    )  # fmt: skip


def _item(asset_id: str) -> str:
    return asset_id.rsplit("/", 1)[0]


def _time(text: str) -> dt.datetime:
    time = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return time if time.tzinfo else time.replace(tzinfo=dt.UTC)
