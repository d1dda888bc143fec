"""A prepared site's spare dates take the place of images that turn out broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from data_prep.schema import SiteArrays
from data_prep.sources.records import Asset, SiteRecord, SourceFault

Spares = Mapping[str, Sequence[tuple[Asset, ...]]]  # modality → dates in order of rank


def read_with_spares(record: SiteRecord, spares: Spares, read: Callable[[SiteRecord], SiteArrays]) -> SiteArrays:
    """`read(record)`; as long as it names a broken image of a modality that has spare dates, with the next of those instead.

    Which image stands in for which follows from the plan and from what is broken alone, so a repeated build makes the same bytes. An
    image is broken if the reading fails over it (SourceFault) or goes on without it (`SiteArrays.losses`).

    Raises SourceFault, as the last reading did, when no spare is left for what is broken.
    """
    waiting = {name: list(images) for name, images in spares.items()}
    while True:
        site, fault = None, None
        try:
            site = read(record)
            broken = [str(loss["asset"]) for loss in getattr(site, "losses", ())]
        except SourceFault as error:
            fault, broken = error, [error.asset]
        replaced = record
        for asset in broken:
            replaced = _without(replaced, asset, waiting)
        if replaced is record:
            if site is None:
                assert fault is not None
                raise fault
            return site
        record = replaced


def _without(record: SiteRecord, asset_id: str, waiting: dict[str, list[tuple[Asset, ...]]]) -> SiteRecord:
    """The record with the item of an asset replaced by the next spare date of its modality; itself if there is none."""
    item = asset_id.rsplit("/", 1)[0]
    lost = [asset for asset in record.assets if asset.id.rsplit("/", 1)[0] == item]
    name = next((asset.modality for asset in lost if asset.modality in waiting), "")
    if not lost or not waiting.get(name):
        return record
    spare = waiting[name].pop(0)
    assets = [asset for asset in record.assets if asset not in lost]
    place = next((i for i, asset in enumerate(record.assets) if asset in lost), len(assets))
    assets[place:place] = spare
    return dataclasses.replace(
        record, assets=tuple(assets), datetimes=tuple(sorted({a.datetime for a in assets if a.datetime})),
        product_ids=tuple(dict.fromkeys(a.product_id for a in assets if a.product_id)),
    )  # fmt: skip
