"""Sentinel patches: BigEarthNet v1 and v2 (S2, S1 + S2), fMoW-Sentinel."""

from __future__ import annotations

import functools
import io
import json
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import Item, LabelledSet, Sample, Split, labelled_set
from pipeline.evaluate.readers import files
from pipeline.evaluate.readers.geobench import BENV2

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row

SIZE = (120, 120)
SPLITS: dict[str, Split] = {"train": "train", "validation": "val", "val": "val", "test": "test"}
# Sumbul et al. 2021 (arXiv 2105.07921): 43 CORINE classes of v1 to the 19 that both versions are judged on; the other 10 are dropped.
NINETEEN = {
    "Continuous urban fabric": "Urban fabric", "Discontinuous urban fabric": "Urban fabric",
    "Industrial or commercial units": "Industrial or commercial units",
    "Non-irrigated arable land": "Arable land", "Permanently irrigated land": "Arable land", "Rice fields": "Arable land",
    "Vineyards": "Permanent crops", "Fruit trees and berry plantations": "Permanent crops", "Olive groves": "Permanent crops",
    "Annual crops associated with permanent crops": "Permanent crops", "Pastures": "Pastures",
    "Complex cultivation patterns": "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation": BENV2[6],
    "Agro-forestry areas": "Agro-forestry areas", "Broad-leaved forest": "Broad-leaved forest",
    "Coniferous forest": "Coniferous forest", "Mixed forest": "Mixed forest", "Natural grassland": BENV2[11],
    "Sparsely vegetated areas": BENV2[11], "Moors and heathland": BENV2[12], "Sclerophyllous vegetation": BENV2[12],
    "Transitional woodland/shrub": "Transitional woodland, shrub", "Beaches, dunes, sands": "Beaches, dunes, sands",
    "Inland marshes": "Inland wetlands", "Peatbogs": "Inland wetlands", "Salt marshes": "Coastal wetlands", "Salines": "Coastal wetlands",
    "Water courses": "Inland waters", "Water bodies": "Inland waters", "Coastal lagoons": "Marine waters", "Estuaries": "Marine waters",
    "Sea and ocean": "Marine waters",
}  # fmt: skip


def bigearthnet(root: str, row: Row) -> LabelledSet:
    """v2: `metadata.parquet` (patch_id, labels, split, s1_name), `BigEarthNet-S2/<tile>/<patch>/<patch>_Bxx.tif`, `BigEarthNet-S1/…`;
    v1: `bigearthnet-{train,val,test}.csv` (S2 name, S1 name), `BigEarthNet-v1.0/<patch>/`, `BigEarthNet-S1-v1.0/`, labels in json.
    Patches without any of the 19 classes are left out, as in the published protocol.
    """
    table = storage.join(root, "metadata.parquet")
    entries = _v2(root, table) if storage.exists(table) else _v1(root)
    items = []
    wanted = {bands.sensor for bands in row.bands}
    for patch, split, names, folders in entries:
        target = np.isin(BENV2, names)
        if not target.any():
            continue
        for sensor in wanted:
            files.require(folders[sensor], f"the split's list names {patch}")
        read = functools.partial(_read, patch, {s: folders[s] for s in wanted}, target, row)
        items.append(Item(patch, split, "+".join(sorted(names)), read))
    return labelled_set(items, BENV2, "published split", root)


def fmow_s2(root: str, row: Row) -> LabelledSet:
    """`{train,val,test_gt}.csv` (category, location_id, image_id, timestamp) beside `fmow-sentinel/<split>/<category>/
    <category>_<location>/<category>_<location>_<image>.tif`, 13 bands. `val` tests where `test_gt.csv` is not there (then a hashed
    tenth of train chooses).
    """
    lists: list[tuple[str, str, Split]] = [
        ("train.csv", "train", "train"),
        ("val.csv", "val", "val"),
        ("test_gt.csv", "test_gt", "test"),
    ]
    if not storage.exists(storage.join(root, "test_gt.csv")):
        lists = [("train.csv", "train", "train"), ("val.csv", "val", "test")]
    rows = [(entry, folder, split) for name, folder, split in lists for entry in files.table(storage.join(root, name))]
    try:
        classes = sorted({entry["category"] for entry, _, _ in rows})
        items = []
        for entry, folder, split in rows:
            place = f"{entry['category']}_{entry['location_id']}"
            stem = f"{place}_{entry['image_id']}"
            url = storage.join(root, "fmow-sentinel", folder, entry["category"], place, f"{stem}.tif")
            files.size_of(url, f"{folder}'s csv names it")
            label, day = classes.index(entry["category"]), _day(entry.get("timestamp", ""))
            items.append(Item(f"{folder}/{stem}", split, entry["category"], functools.partial(_fmow, url, label, day)))
    except KeyError as error:
        raise UsageError(f"{root}: a csv lacks the column {error}") from None
    return labelled_set(items, classes, "published csv lists", root)


def _fmow(url: str, label: int, day: int) -> Sample:
    return Sample({"s2": files.pixels(url)[None]}, label, {"s2": np.array([day])}, footprint=files.footprint(url))


def _day(timestamp: str) -> int:
    try:
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timetuple().tm_yday
    except ValueError:
        return 0


Entry = tuple[str, Split, list[str], dict[str, str]]


def _v2(root: str, table: str) -> list[Entry]:
    try:
        rows = pq.read_table(io.BytesIO(storage.read_bytes(table))).to_pylist()
        out = []
        for row in rows:
            patch, s1 = str(row["patch_id"]), str(row.get("s1_name") or "")
            folders = {"s2": storage.join(root, "BigEarthNet-S2", patch.rsplit("_", 2)[0], patch)}
            if s1:
                folders["s1"] = storage.join(root, "BigEarthNet-S1", s1.rsplit("_", 3)[0], s1)
            out.append((patch, SPLITS[str(row["split"])], [str(name) for name in row["labels"]], folders))
        return out
    except KeyError as error:
        raise UsageError(f"{table} has no {error}; is it BigEarthNet v2's metadata.parquet?") from None


def _v1(root: str) -> list[Entry]:
    out: list[Entry] = []
    for split in ("train", "val", "test"):
        for line in files.lines(storage.join(root, f"bigearthnet-{split}.csv")):
            patch, _, s1 = line.partition(",")
            s2_folder = storage.join(root, "BigEarthNet-v1.0", patch)
            note = files.require(
                storage.join(s2_folder, f"{patch}_labels_metadata.json"), f"bigearthnet-{split}.csv names {patch}"
            )
            try:
                given = json.loads(storage.read_bytes(note))["labels"]
            except (ValueError, KeyError) as error:
                raise UsageError(f"{note} is not the patch's label file: {error}") from None
            names = sorted({NINETEEN[name] for name in given if name in NINETEEN})
            folders = {"s2": s2_folder, "s1": storage.join(root, "BigEarthNet-S1-v1.0", s1)}
            out.append((patch, SPLITS[split], names, folders))
    return out


def _read(patch: str, folders: dict[str, str], target: np.ndarray, row: Row) -> Sample:
    images: dict[str, np.ndarray] = {}
    for bands in row.bands:
        folder = folders[bands.sensor]
        stem = storage.name(folder)
        images[bands.sensor] = np.stack(
            [files.pixels(storage.join(folder, f"{stem}_{band}.tif"), SIZE)[0] for band in bands.order]
        )[None]
    first = row.bands[0]
    stem = storage.name(folders[first.sensor])
    ground = files.footprint(storage.join(folders[first.sensor], f"{stem}_{first.order[0]}.tif"))
    return Sample(images, target, {"s2": np.array([_patch_day(patch)])} if "s2" in images else {}, footprint=ground)


def _patch_day(patch: str) -> int:
    """Day of the year from `S2A_MSIL2A_20170613T101031_…`."""
    for part in patch.split("_"):
        if len(part) >= 8 and part[:8].isdigit():
            return datetime.strptime(part[:8], "%Y%m%d").timetuple().tm_yday
    return 0
