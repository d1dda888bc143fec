"""Per-band statistics over valid (clear) pixels of a shard set.

They come from the manifest, where the build put them; --recount decodes every sample and counts again.

example:
  python -m data_prep stats demo_out/shards
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.shards import ShardSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder of the shard set")
    parser.add_argument("--recount", action="store_true", help="count the pixels again instead of reading the manifest")
    parser.add_argument("--split", metavar="NAME", help="with --recount: of this split only")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from data_prep.schema import MODALITIES
    from data_prep.shards import ShardSet

    shards = ShardSet.open(args.url)
    tree = shards.manifest["statistics"]
    if args.split and not args.recount:
        raise UsageError("--split needs --recount: the manifest's statistics are those of train")
    if args.recount:
        tree = recount(shards, args.split)
    for name in (name for name in MODALITIES if name in tree):
        entry = tree[name]
        print(f"{name}  (values at 1, 2, 50, 98, 99 %)")
        for band, count, mean, std, marks in zip(
            *(entry[key] for key in ("bands", "count", "mean", "std", "percentiles"))
        ):
            values = "  ".join(f"{value:9.2f}" for value in marks)
            print(f"  {band:<4} {count:>14,} px   mean {mean:9.2f}   std {std:8.2f}   {values}")
    if args.json:
        print_json({"statistics": tree, "manifest_sha256": shards.manifest_sha256})
    return 0


def recount(shards: ShardSet, split: str | None) -> dict[str, Any]:
    """Statistics of the pixels of a split (None: of those the manifest's are of), decoded now."""
    from cluster.errors import RunFailure, UsageError
    from cluster.progress import progress
    from data_prep.codec import MemberError
    from data_prep.config import SPLITS
    from data_prep.statistics import Histograms, statistics_json

    splits = [split] if split else shards.manifest.get("statistics_splits", SPLITS)
    rows = [row for name in splits for row in shards.rows_of(name)]
    if not len(rows):
        raise UsageError(f"{shards.url} has no sample in split {split!r}")
    histograms = Histograms()
    with progress(len(rows), "stats") as bar:
        for row in rows:
            try:
                histograms.add(shards.read_sample(int(row)))
            except MemberError as error:
                raise RunFailure(f"{error}; python -m data_prep verify {shards.url} names every fault") from None
            bar.advance()
    return statistics_json(histograms.finish())
