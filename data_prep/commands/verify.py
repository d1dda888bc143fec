"""Every checksum, count and offset of a shard set; names each fault; exit 1 on any.

--repair makes index, manifest and lost parts again from intact tars. A damaged tar is moved to _build/quarantine and left out
(exit 1); run the same `build` again and it is made anew, with the same bytes.

examples:
  python -m data_prep verify demo_out/shards
  python -m data_prep verify s3://shards/v1 --decode      # also decodes every array and recounts the statistics
  python -m data_prep verify demo_out/shards --repair
  python -m data_prep verify s3://shards/v1 --executor dask --scheduler tcp://10.0.0.1:8786
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from data_prep.executors import Executor, executor_of
from data_prep.executors import add_arguments as add_executor

if TYPE_CHECKING:
    from data_prep.verify import Fault


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder of the shard set")
    parser.add_argument("--decode", action="store_true", help="also decode every array and recount the statistics")
    parser.add_argument("--repair", action="store_true", help="mend what can be mended from intact tars")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import RunFailure
    from data_prep.repair import repair

    executor = executor_of(args, 0)
    faults = _verify(args.url, args.decode, executor)
    lost: list[str] = []
    if faults and args.repair:
        lost = repair(args.url, print)
        faults = _verify(args.url, args.decode, executor)
    figures = _figures(args.url)
    if not faults:
        print(
            f"{args.url}: sound: {figures['samples']} samples in {figures['shards']} shards, {figures['bytes'] / 1e6:.1f} MB"
        )
    if args.json:
        print_json({**figures, "faults": len(faults) + len(lost)})
    if faults:
        raise RunFailure(f"{args.url} has {len(faults)} faults; first: {faults[0]}; --repair mends from intact tars")
    if lost:
        raise RunFailure(
            f"{args.url} is sound again but lacks {', '.join(lost)}: run the same build again to make them anew"
        )
    return 0


def _verify(url: str, decode: bool, executor: Executor) -> list[Fault]:
    from cluster.errors import UsageError
    from cluster.progress import progress
    from data_prep.shards import ShardSet
    from data_prep.verify import verify

    try:
        total = len(ShardSet.open(url).manifest["shards"])
    except (UsageError, KeyError, TypeError):
        total = 0
    with progress(total, "verify") as bar:
        faults = verify(url, decode, lambda name: bar.advance(), executor)
    for fault in faults:
        print(f"fault: {fault}")
    return faults


def _figures(url: str) -> dict[str, Any]:
    from cluster.errors import UsageError
    from data_prep.shards import ShardSet

    try:
        shards = ShardSet.open(url)
        counts = {key: shards.manifest["counts"][key] for key in ("shards", "samples", "bytes")}
    except (UsageError, KeyError, TypeError):
        return {"shards": 0, "samples": 0, "bytes": 0, "manifest_sha256": None}
    return {**counts, "manifest_sha256": shards.manifest_sha256}
