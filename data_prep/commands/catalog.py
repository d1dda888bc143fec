"""`python -m data_prep catalog SRC OUT.parquet --layout L`: layouts people already have → stac-geoparquet."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  python -m data_prep catalog /data/terramind terramind.parquet --layout terramind
  python -m data_prep catalog s3://bucket/items catalog.parquet --layout stac
  python -m data_prep catalog /data/ucmerced ucm.parquet --layout patches --sensor hr --unit uint8 --gsd 0.3
  python -m data_prep catalog tiles.npz tiles.parquet --layout patches --sensor s2 --unit dn --gsd 10 \\
      --bands B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B11,B12

patches: images or arrays without georeference; sensor, unit, band order and pixel size are declared, never guessed."""
LAYOUTS = (
    "stac",
    "terramind",
    "treesatai",
    "ssl4eo",
    "majortom",
    "copernicus",
    "olmoearth",
    "mmearth",
    "geotiff",
    "patches",
)


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
    patches = parser.add_argument_group("layout patches")
    patches.add_argument("--sensor", default="", help="hr or s2")
    patches.add_argument(
        "--unit",
        default="",
        help="uint8 (hr, 0-255); s2: dn (reflectance x 10000), dn-offset (with the +1000 of baseline 04.00 left in) or reflectance (0-1)",
    )
    patches.add_argument(
        "--bands", default="", metavar="B02,B03,…", help="bands in file order; not needed for hr in JPEG or PNG"
    )
    patches.add_argument("--gsd", type=float, default=0.0, metavar="M", help="metres per pixel")
    patches.add_argument("--array", default="", metavar="NAME", help="array of an .npz with several of four axes")
    patches.add_argument(
        "--group",
        default="patch",
        metavar="G",
        help="what stays in one split: patch (default), file, folder, or a regular expression such as '^(.+)_\\d+$' "
        "whose first group names the group",
    )
    patches.add_argument("--no-labels", action="store_true", help="do not keep an image's folder as its label scene")
    patches.add_argument("--files", metavar="LIST", help="text file: only these paths below SRC, one per line")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    import sys

    from cluster.cli import print_json
    from data_prep.catalog import make_catalog
    from data_prep.sources.sites import group_items

    declared = None
    if args.layout == "patches":
        from cluster.storage import read_bytes
        from data_prep.sources.patches import declaration

        listed = read_bytes(args.files).decode().splitlines() if args.files else []
        declared = declaration(
            args.sensor, args.unit, args.bands, args.gsd, array=args.array, group=args.group, labels=not args.no_labels,
            files=tuple(line.strip() for line in listed if line.strip()),
        )  # fmt: skip
    found = make_catalog(args.source, args.out, args.layout, args.max_faults, declared)
    for line in [
        *(f"left out: {fault}" for fault in found.faults),
        *(f"kept, but faulty: {text}" for text in found.warnings),
        *(f"note: {text}" for text in found.notes),
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
