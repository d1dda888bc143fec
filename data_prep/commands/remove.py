"""Sites out of a set that stands: by key, by area, or by a product that was withdrawn. Only their shards are rewritten.

The pixels that stay are copied, not made again. What is removed stays out: of the shard if it is ever built anew, and of a later `append`
(with --again that may bring it back, from its sources as they are then). After a kill run the same command again. Do not remove while a run
reads the set: it stops at the first shard that is not its manifest's any more. To leave sites out of a build from the start: source.skip.

examples:
  python -m data_prep remove demo_out/shards --key 33N640_8123_871
  python -m data_prep remove s3://bucket/set --area withdrawn.geojson --why "licence ended" --dry-run
  python -m data_prep remove s3://bucket/set --product S2B_MSIL2A_20230714T100559_N0509_R022_T33TWM_20230714T145555
  python -m data_prep remove s3://bucket/set --unfinished        # drops an append that will not be finished
"""

from __future__ import annotations

import argparse
from typing import Any

from data_prep.executors import add_arguments as add_executor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder of the shard set")
    parser.add_argument("--key", action="append", default=[], metavar="KEY", help="a site; may be repeated")
    parser.add_argument("--keys", default="", metavar="FILE", help="text file of sites, one key per line")
    parser.add_argument("--bbox", default="", metavar="W,S,E,N", help="every site that meets this box, in degrees")
    parser.add_argument("--area", default="", metavar="FILE", help="every site that meets this GeoJSON or GeoParquet")
    parser.add_argument(
        "--product", action="append", default=[], metavar="ID", help="every site with an image of this product"
    )
    parser.add_argument("--why", default="", metavar="TEXT", help="kept with the list of removals")
    parser.add_argument("--again", action="store_true", help="a later append may bring the sites back")
    parser.add_argument("--unfinished", action="store_true", help="drop the addition that was begun and not finished")
    parser.add_argument("--dry-run", action="store_true", help="say what would go; change nothing")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from cluster.progress import Progress
    from data_prep.executors import executor_of
    from data_prep.remove import find, remove
    from data_prep.shards import ShardSet

    chosen = [args.key or args.keys, args.bbox, args.area, args.product, args.unfinished]
    if not any(chosen):
        raise UsageError("say what is to go: --key, --keys, --bbox, --area, --product or --unfinished")
    if args.unfinished:
        return _drop(args)
    wanted = _wanted(args)
    manifest: dict[str, Any] | None = None
    if args.dry_run:
        found = find(ShardSet.open(args.url), wanted)
    else:
        bars: list[Progress] = []

        def advance(count: int, total: int) -> None:
            if not bars:
                bars.append(Progress(total, "remove"))
            bars[0].advance(count)

        try:
            found, manifest = remove(args.url, wanted, executor_of(args, 0), advance)
        finally:
            for bar in bars:
                bar.close()
    sites = sum(map(len, found.values()))
    verb = "would go" if args.dry_run else "went"
    print(f"{args.url}: {sites} sites {verb}, from {len(found)} shards")
    if manifest is not None:
        counts = manifest["counts"]
        print(f"{counts['samples']} samples are left in {counts['shards']} shards, {counts['bytes'] / 1e6:.1f} MB")
    if args.json:
        print_json({"removed": sites, "shards": sorted(found), "samples": manifest and manifest["counts"]["samples"]})
    return 0


def _drop(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from data_prep.grow import drop_unfinished

    names = drop_unfinished(args.url, args.dry_run)
    print(f"{args.url}: an addition of {len(names)} shards {'would be' if args.dry_run else 'is'} dropped")
    if args.json:
        print_json({"shards": names})
    return 0


def _wanted(args: argparse.Namespace) -> Any:
    import shapely

    from cluster.errors import UsageError
    from data_prep.config import SitesConfig
    from data_prep.prepare.area import wanted_area
    from data_prep.remove import Wanted
    from data_prep.removed import skipped_keys

    keys = frozenset(args.key) | skipped_keys(args.keys)
    ground = None
    if args.bbox and args.area:
        raise UsageError("give one of --bbox and --area")
    if args.bbox or args.area:
        try:
            sides: tuple[float, float, float, float] | None = None
            if args.bbox:
                west, south, east, north = map(float, args.bbox.split(","))
                sides = west, south, east, north
            area, points = wanted_area(SitesConfig(area=args.area or None, bbox=sides))
        except ValueError as error:
            raise UsageError(f"--bbox {args.bbox}: {error}; four numbers W,S,E,N in degrees") from None
        ground = shapely.union_all([*([area] if area is not None else []), *map(shapely.Point, points)])
    return Wanted(keys, ground, frozenset(args.product), args.why, args.again)
