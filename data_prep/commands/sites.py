"""Where sites lie: squares of one global lattice over an area, split into train, val and probe by place alone.

Writes a GeoParquet file (sites.url) and beside it a map of the splits. Another area with the same side gives the same squares and
the same splits where the two overlap.

examples:
  python -m data_prep sites data_prep/runs/stac.yaml sites.area=alps.geojson sites.url=alps/sites.parquet
  python -m data_prep sites data_prep/runs/stac.yaml sites.bbox=[5,44,17,48] sites.spacing_m=6400 sites.max_sites=100000
  python -m data_prep sites data_prep/runs/stac.yaml sites.area=world.geojson sites.strata=climate.tif sites.per_stratum=20000
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. data_prep/runs/stac.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    import numpy as np

    from cluster import config as settings
    from cluster import storage
    from cluster.cli import print_json
    from data_prep.config import BuildConfig
    from data_prep.prepare.layout import lay_sites

    config = settings.load(BuildConfig, args.config, args.overrides)
    found = lay_sites(config)
    from data_prep.prepare.picture import draw_map

    total = sum(found.sites.values())
    lon, lat, splits = (np.concatenate(column) for column in zip(*found.shown))
    split_text = ", ".join(f"{name} {count}" for name, count in found.sites.items() if count)
    picture = config.sites.url.rpartition(".")[0] + ".png"
    storage.write_atomic(
        picture, draw_map(lon, lat, splits, f"{total} sites of {config.grid.side_m:g} m: {split_text}")
    )
    print(f"{config.sites.url}: {total} sites in {len(found.cells)} ground cells, {found.slices} slices ({split_text})")
    if found.left_out:
        print(
            f"left out {found.left_out} squares near ground of another split (split.buffer_m={config.split.buffer_m:g})"
        )
    if config.sites.strata:
        print("strata: " + ", ".join(f"{name or '(none)'} {count}" for name, count in sorted(found.strata.items())))
    print(f"map: {picture}")
    if args.json:
        print_json(
            {
                "sites": total, "splits": found.sites, "left_out": found.left_out, "cells": len(found.cells),
                "slices": found.slices, "strata": found.strata, "url": config.sites.url, "map": picture,
            }
        )  # fmt: skip
    return 0
