"""Objects: COCO json (NWPU VHR-10), VOC xml (DIOR, DIOR-R) and FAIR1M's xml of corner points."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import Boxes, Item, LabelledSet, Sample, Split, hashed_split, labelled_set
from pipeline.evaluate.readers import files

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row

DIOR = (
    "airplane", "airport", "baseballfield", "basketballcourt", "bridge", "chimney", "dam", "expressway-service-area",
    "expressway-toll-station", "golffield", "groundtrackfield", "harbor", "overpass", "ship", "stadium", "storagetank",
    "tenniscourt", "trainstation", "vehicle", "windmill",
)  # fmt: skip
FAIR1M = (
    "Passenger Ship", "Motorboat", "Fishing Boat", "Tugboat", "other-ship", "Engineering Ship", "Liquid Cargo Ship", "Dry Cargo Ship",
    "Warship", "Small Car", "Bus", "Cargo Truck", "Dump Truck", "other-vehicle", "Van", "Trailer", "Tractor", "Excavator",
    "Truck Tractor", "Boeing737", "Boeing747", "Boeing777", "Boeing787", "ARJ21", "C919", "A220", "A321", "A330", "A350",
    "other-airplane", "Baseball Field", "Basketball Court", "Football Field", "Tennis Court", "Roundabout", "Intersection", "Bridge",
)  # fmt: skip


def coco(root: str, row: Row) -> LabelledSet:
    """`positive image set/*.jpg` with `instances_train2017.json` and `instances_val2017.json`, or one `annotations.json` (then the
    row's shares by hashed name). The second list tests; the first one's last fifth by hash chooses.
    """
    folder = files.require(storage.join(root, "positive image set"), "NWPU VHR-10 images")
    lists: list[tuple[str, Split | None]] = [("instances_train2017.json", "train"), ("instances_val2017.json", "test")]
    if not storage.exists(storage.join(root, lists[0][0])):
        lists = [("annotations.json", None)]
    items: list[Item] = []
    classes: list[str] = []
    for name, side in lists:
        url = files.require(storage.join(root, name), "COCO annotations")
        try:
            content = json.loads(storage.read_bytes(url))
            categories = sorted(content["categories"], key=lambda c: c["id"])
            ids = {category["id"]: i for i, category in enumerate(categories)}
            found: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in content["images"]}
            for entry in content["annotations"]:
                found[entry["image_id"]].append((entry["bbox"], ids[entry["category_id"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{url} is no COCO annotation file: {type(error).__name__} {error}") from None
        classes = [str(category["name"]) for category in categories]
        for image in content["images"]:
            path = storage.join(folder, image["file_name"])
            files.size_of(path, f"{name} names it")
            given = found[image["id"]]
            xywh = np.array([box for box, _ in given], np.float32).reshape(-1, 4)
            boxes = Boxes(
                np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
                np.array([label for _, label in given], np.int64),
            )
            split = (
                side
                if side == "test"
                else hashed_split(image["file_name"], 0.8, 0.2)
                if side
                else hashed_split(image["file_name"], *row.shares)
            )
            items.append(Item(image["file_name"], split, _digestible(boxes), _reader(path, boxes, url)))
    how = "lists of the set" if lists[0][1] else f"by hashed name: {row.shares[0]:.0%} train"
    return labelled_set(items, classes, how, root)


def voc(root: str, row: Row) -> LabelledSet:
    """DIOR: `Annotations/{Horizontal,Oriented} Bounding Boxes/NNNNN.xml`, `ImageSets/Main/{train,val,test}.txt`,
    `JPEGImages-{trainval,test}/` (or `JPEGImages/`). Oriented where the row's task is.
    """
    kind = "Oriented" if row.oriented else "Horizontal"
    notes = files.require(storage.join(root, "Annotations", f"{kind} Bounding Boxes"), "DIOR's annotations")
    items = []
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        for stem in files.lines(storage.join(root, "ImageSets", "Main", f"{split}.txt")):
            note = storage.join(notes, f"{stem}.xml")
            size = files.size_of(note, f"{split}.txt names it")
            folders = ("JPEGImages-test" if split == "test" else "JPEGImages-trainval", "JPEGImages")
            held = next((f for f in folders if storage.exists(storage.join(root, f, f"{stem}.jpg"))), folders[0])
            image = storage.join(root, held, f"{stem}.jpg")
            files.size_of(image, f"{split}.txt names it")
            items.append(Item(stem, split, f"{stem} {size}", _xml_reader(image, note, _dior_objects, row.oriented)))
    return labelled_set(items, DIOR, "published lists ImageSets/Main", root)


def fair1m(root: str, row: Row) -> LabelledSet:
    """FAIR1M: `train/part*/images/*.tif` with `train/part*/labelXml/*.xml`, and `validation/` alike. The test labels lie on a
    server, so the validation part tests, and a tenth of the training part by hash chooses.
    """
    train = [
        storage.join(root, "train", part)
        for part in storage.list_names(storage.join(root, "train"))
        if part.startswith("part")
    ]
    items = []
    for base, tests in [
        *((b, False) for b in train or [storage.join(root, "train")]),
        (storage.join(root, "validation"), True),
    ]:
        for name in files.names(storage.join(base, "images"), (".tif",)):
            stem = name.rsplit(".", 1)[0]
            note = storage.join(base, "labelXml", f"{stem}.xml")
            key = f"{storage.name(base)}/{stem}"
            split: Split = "test" if tests else hashed_split(key, 0.9, 0.1)
            size = files.size_of(note, "every image has its xml")
            items.append(
                Item(
                    key,
                    split,
                    f"{stem} {size}",
                    _xml_reader(storage.join(base, "images", name), note, _fair1m_objects, row.oriented),
                )
            )
    return labelled_set(items, FAIR1M, "validation part tests (the test labels are on a server)", root)


Objects = Sequence[tuple[str, list[tuple[float, float]]]]


def _xml_reader(
    image: str, note: str, objects: Callable[[ElementTree.Element], Objects], oriented: bool
) -> Callable[[], Sample]:
    classes = DIOR if objects is _dior_objects else FAIR1M

    def read() -> Sample:
        try:
            found = objects(ElementTree.fromstring(storage.read_bytes(note)))
        except (ElementTree.ParseError, AttributeError, ValueError, TypeError) as error:
            raise UsageError(f"{note} is no annotation of this set: {' '.join(str(error).split())[:120]}") from None
        labels = []
        for name, _ in found:
            if _plain(name) not in known:
                raise UsageError(f"{note} names {name!r}, which is none of the set's {len(classes)} classes")
            labels.append(known[_plain(name)])
        short = [name for name, points in found if len(points) != 4]
        if short:
            raise UsageError(f"{note}: object {short[0]!r} has no four corners; correct it, or take it out of the file")
        corners = np.array([points for _, points in found], np.float32).reshape(-1, 4, 2)
        boxes = Boxes(
            np.concatenate([corners.min(1), corners.max(1)], 1),
            np.array(labels, np.int64),
            corners if oriented else None,
        )
        return _reader(image, boxes, note)()

    known = {_plain(name): i for i, name in enumerate(classes)}
    return read


def _dior_objects(root: ElementTree.Element) -> Objects:
    found = []
    for entry in root.findall("object"):
        box, turned = entry.find("bndbox"), entry.find("robndbox")
        if turned is not None:
            points = [
                (float(str(turned.findtext(f"x_{c}"))), float(str(turned.findtext(f"y_{c}"))))
                for c in ("left_top", "right_top", "right_bottom", "left_bottom")
            ]
        else:
            x0, y0, x1, y1 = (float(str(box.findtext(side))) for side in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore[union-attr]
            points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        found.append((str(entry.findtext("name")), points))
    return found


def _fair1m_objects(root: ElementTree.Element) -> Objects:
    found = []
    for entry in root.findall("objects/object"):
        points = [tuple(float(v) for v in str(point.text).split(",")) for point in entry.findall("points/point")][:4]
        found.append((str(entry.findtext("possibleresult/name")), points))
    return found  # type: ignore[return-value]


def _plain(name: str) -> str:
    """`Expressway-Service-area` and `expresswayservicearea` are the same class: the set spells them both ways."""
    return "".join(c for c in name.lower() if c.isalnum())


def _reader(image: str, boxes: Boxes, where: str) -> Callable[[], Sample]:
    def read() -> Sample:
        pixels = files.colour(image)
        height, width = pixels.shape[2:]
        x0, y0, x1, y1 = boxes.xyxy.T
        bad = (x1 <= x0) | (y1 <= y0)
        if boxes.corners is None:
            bad |= (x0 < -1) | (y0 < -1) | (x1 > width + 1) | (y1 > height + 1)
        else:  # an oriented box of an object at the edge reaches beyond it
            bad |= (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
        if bad.any():
            box = ", ".join(f"{v:g}" for v in boxes.xyxy[bad][0])
            raise UsageError(
                f"{where}: box ({box}) of {storage.name(image)} is empty or outside its {height} x {width} pixels"
            )
        return Sample({"hr": pixels}, boxes)

    return read


def _digestible(boxes: Boxes) -> str:
    return ";".join(f"{label}:{','.join(f'{v:g}' for v in box)}" for box, label in zip(boxes.xyxy, boxes.labels))
