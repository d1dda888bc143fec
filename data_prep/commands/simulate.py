"""`python -m data_prep simulate OUT --sites N`: labelled multi-modal sites with known truth, as Zarr + GeoTIFF + STAC."""

from __future__ import annotations

import argparse

EXAMPLE = "example:\n  python -m data_prep simulate demo_out/sites --sites 200 --seed 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "out", metavar="OUT", help="folder (any fsspec URL) to create; it appears complete or not at all"
    )
    parser.add_argument("--sites", type=int, required=True, metavar="N", help="number of sites")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same pixels (default 0)")
    parser.add_argument("--side-m", type=int, default=160, metavar="M", help="side of a site in metres (default 160)")
    parser.add_argument(
        "--scene-types",
        choices=("basic", "hard"),
        default="hard",
        help="hard: 16 types that differ in arrangement, season and roughness (default); basic: 8 mixtures of land covers",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from data_prep.simulate.write import simulate

    catalog = simulate(args.out, args.sites, args.seed, args.side_m, args.scene_types)
    print(
        f"{args.sites} simulated sites of {args.side_m} m, seed {args.seed}, {args.scene_types} scene types: {catalog}"
    )
    if args.json:
        print_json(
            {
                "sites": args.sites,
                "seed": args.seed,
                "side_m": args.side_m,
                "scene_types": args.scene_types,
                "catalog": catalog,
            }
        )
    return 0
