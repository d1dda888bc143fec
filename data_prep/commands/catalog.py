"""`python -m data_prep catalog SRC OUT.parquet --layout L`: layouts people already have → stac-geoparquet."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  python -m data_prep catalog /data/terramind terramind.parquet --layout terramind
  python -m data_prep catalog s3://bucket/items catalog.parquet --layout stac"""
LAYOUTS = ("stac", "terramind", "treesatai", "ssl4eo", "majortom", "copernicus", "geotiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("source", metavar="SRC", help="folder (any fsspec URL) in one of the layouts")
    parser.add_argument(
        "out", metavar="OUT.parquet", help="catalog to write, any fsspec URL; appears whole or not at all"
    )
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help="how SRC is laid out")
    parser.add_argument(
        "--max-faults",
        type=int,
        default=0,
        metavar="N",
        help="sites that may be unusable before nothing is written (default 0)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    import sys

    from cluster.cli import print_json
    from data_prep.catalog import make_catalog
    from data_prep.sources.sites import group_items

    found = make_catalog(args.source, args.out, args.layout, args.max_faults)
    for line in [
        *(f"left out: {fault}" for fault in found.faults),
        *(f"kept, but faulty: {text}" for text in found.warnings),
    ]:
        print(line, file=sys.stderr)
    figures = {
        "sites": len(group_items(found.items)),
        "items": len(found.items),
        "assets": sum(len(item["assets"]) for item in found.items),
        "faults": len(found.faults) + len(found.warnings),
    }
    print(f"{figures['sites']} sites, {figures['items']} items, {figures['assets']} assets: {args.out}")
    if args.json:
        print_json({**figures, "catalog": args.out})
    return 0
