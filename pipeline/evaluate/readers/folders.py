"""Folders named by class: EuroSAT, UC Merced, RESISC-45, AID, and images of one's own of any sensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.items import Item, LabelledSet, Sample, Split, hashed_split, labelled_set
from pipeline.evaluate.readers import files

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row


def class_folders(root: str, row: Row) -> LabelledSet:
    """`ROOT/<Class>/<image>`; `train.txt`, `val.txt`, `test.txt` beside the folders (names, one a line) decide the split, else
    the row's shares by hashed name.

    Raises:
        UsageError: no classes, an empty class, a list that names an absent image.
    """
    folders = [name for name in storage.list_names(root) if _is_folder(storage.join(root, name))]
    if len(folders) < 2:
        raise UsageError(f"{root} holds {len(folders)} folders; {row.name} needs one per class (--data {row.needs})")
    listed = _lists(root)
    items: list[Item] = []
    seen: set[str] = set()
    for label, folder in enumerate(folders):
        found = files.names(storage.join(root, folder))
        for name in found:
            split: Split | None = listed.get(name) if listed else hashed_split(f"{folder}/{name}", *row.shares)
            seen.add(name)
            if split is None:
                continue
            url = storage.join(root, folder, name)
            items.append(Item(f"{folder}/{name}", split, folder, _reader(url, label, row)))
    absent = sorted(set(listed) - seen)
    if absent:
        raise UsageError(f"{root}: the split lists name {absent[0]} ({len(absent)} such), which no class folder holds")
    train, val = row.shares
    how = (
        "split lists train.txt, val.txt, test.txt"
        if listed
        else f"by hashed name: {train:.0%} train, {val:.0%} validation"
    )
    return labelled_set(items, folders, how, root)


def _reader(url: str, label: int, row: Row) -> Callable[[], Sample]:
    (bands,) = row.bands
    if bands.order == ("R", "G", "B"):
        return lambda: Sample({bands.sensor: files.colour(url)}, label)
    return lambda: Sample({bands.sensor: files.pixels(url)[None]}, label)


def _lists(root: str) -> dict[str, Split]:
    """Base name → split from the lists that are there. A list may give names with or without folder and suffix."""
    out: dict[str, Split] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        url = storage.join(root, f"{split}.txt")
        if storage.exists(url):
            out |= {storage.name(line): split for line in files.lines(url)}
    return out


def _is_folder(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(fs.isdir(path))
