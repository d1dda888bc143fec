"""Contact sheet of a shard set: per sample hr, s2 in true colour over time, s1, masks and label rasters. Nodata is magenta.

example:
  python -m data_prep show demo_out/shards --out sheet.png --samples 12
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder of the shard set")
    parser.add_argument("--out", default="sheet.png", metavar="FILE", help="where the PNG goes (default sheet.png)")
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="rows, spread evenly over the set (default 8)"
    )
    parser.add_argument("--dates", type=int, default=6, metavar="N", help="s2 dates per row (default 6)")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import storage
    from cluster.cli import print_json
    from cluster.errors import RunFailure, UsageError
    from data_prep.shards import ShardSet

    if args.samples < 1 or args.dates < 1:
        raise UsageError("--samples and --dates must be 1 or more")
    shards = ShardSet.open(args.url)
    from data_prep.codec import MemberError
    from data_prep.show import sheet

    try:
        png = sheet(shards, args.samples, args.dates)
    except (MemberError, FileNotFoundError) as error:
        raise RunFailure(f"{error}; python -m data_prep verify {args.url} names every fault") from None
    try:
        storage.write_atomic(args.out, png)
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror or error}") from None
    print(f"{min(args.samples, shards.num_samples)} of {shards.num_samples} samples: {args.out}")
    if args.json:
        print_json({"samples": min(args.samples, shards.num_samples), "out": args.out, "bytes": len(png)})
    return 0
