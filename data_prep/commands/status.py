"""What a build is doing: shards and sites done, in the making, missing; rate and time left; the most frequent faults.

Reads what the tasks have left in the output, so it runs anywhere the output can be read, also while they work.

examples:
  python -m data_prep status s3://bucket/set
  python -m data_prep status shards --json
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="output of a build, finished or not")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.progress import clock
    from data_prep.status import status

    found = status(args.url)
    print(f"{args.url}: {found.state}")
    print(
        f"  shards {found.done}/{found.shards}, slices {found.slices_done}/{found.slices}, sites {found.sites_done}/{found.sites}"
    )
    if found.running:
        print(f"  in the making: {', '.join(found.running[:8])}{' …' if len(found.running) > 8 else ''}")
    if found.rate is not None and found.done < found.shards:
        print(f"  {found.rate:.2f} sites/s so far, {clock(found.left_s or 0)} left at that rate")
    print(f"  faulty sites: {found.faulty}")
    for why, count in found.faults:
        print(f"    {count} x {why}")
    if args.json:
        print_json(found.to_dict())
    return 0
