"""Who trains a probe and who tests it: by place, never by chance, and the same for every run on the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import UsageError
from data_prep.index import LABEL_PREFIX
from data_prep.shards import ShardSet


@dataclass(frozen=True)
class ProbeSplit:
    """Row numbers of the set, in row order. digest: names the split; equal digests mean the same sites and labels."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    digest: str
    how: str


def split_of(shardset: ShardSet, samples: int, label: str | None, raster: str | None = None) -> ProbeSplit:
    """Labelled rows: test = the set's `probe` split, or `val`, or (a set without either) a fifth of the ground cells.

    At most `samples` rows on each side, chosen by hashed key: which rows those are depends on nothing but the data.
    label: scalar label that must be there; raster: label raster that must be there.

    Raises:
        UsageError: nothing is labelled, or one side is empty.
    """
    names = set(shardset.index_columns()) if label else set()
    column = f"{LABEL_PREFIX}{label}"
    if label and column not in names:
        known = sorted(name.removeprefix(LABEL_PREFIX) for name in names if name.startswith(LABEL_PREFIX))
        raise UsageError(f"{shardset.url} has no scalar label {label!r}; it has {', '.join(known) or 'none'}")
    table = shardset.read_index(["key", "split", "cell", "rasters", *([column] if label else [])])
    keys, splits, cells = (table[name].to_pylist() for name in ("key", "split", "cell"))
    usable = np.ones(len(keys), bool)
    if label:
        usable &= np.array([value is not None and value >= 0 for value in table[column].to_pylist()])
    if raster:
        usable &= np.array([raster in (names_ or ()) for names_ in table["rasters"].to_pylist()])
    if not usable.any():
        raise UsageError(f"{shardset.url} has no site with label {raster or label!r}; name another one")
    is_test, how = _test_rows(np.array(splits), cells, usable)
    train = _choose(np.flatnonzero(usable & ~is_test & np.isin(splits, ("train", ""))), keys, samples)
    test = _choose(np.flatnonzero(usable & is_test), keys, samples)
    if not train or not test:
        side = "training" if not train else "test"
        raise UsageError(
            f"{shardset.url}: no labelled {side} sites for a probe; build with split.fractions that hold some"
        )
    text = "\n".join(
        [
            shardset.manifest["content_sha256"],
            label or "",
            raster or "",
            *(keys[row] for row in train),
            "|",
            *(keys[row] for row in test),
        ]
    )
    return ProbeSplit(tuple(train), tuple(test), hashlib.sha256(text.encode()).hexdigest()[:16], how)


def _test_rows(splits: np.ndarray, cells: Sequence[str], usable: np.ndarray) -> tuple[np.ndarray, str]:
    for name in ("probe", "val"):
        if (usable & (splits == name)).any():
            return splits == name, f"sites of the set's {name} split"
    places = sorted({cell for cell, used in zip(cells, usable) if used}, key=_hash)
    tested = set(places[: max(1, len(places) // 5)]) if len(places) > 1 else set()
    return np.array([cell in tested for cell in cells]), "a fifth of the ground cells, at least one"


def _choose(rows: np.ndarray, keys: Sequence[str], samples: int) -> list[int]:
    ordered = sorted(rows.tolist(), key=lambda row: _hash(keys[row]))
    return sorted(ordered[:samples])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"probe:{text}".encode()).digest()[:8], "big")
