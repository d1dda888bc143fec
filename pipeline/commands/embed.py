"""`python -m pipeline embed CHECKPOINT INPUT --out OUT`: features of one multi-modal site, or of a whole set, for use elsewhere.

OUT.npz or OUT.safetensors: all tokens of one site. INPUT is a STAC catalog (stac-geoparquet, item JSON or a folder of items;
`data_prep catalog` makes one of other layouts) or a shard set. Every date and modality the site has is used; what is missing is masked.

OUT.parquet: one vector per modality, and of the fused features, for every site of a shard set, or with --task for every image of a published
data set (`evaluate --list`), as GeoParquet: key, split, label, geometry, vectors. geopandas, DuckDB and QGIS open it.
"""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  python -m pipeline embed moe.safetensors demo_out/scenes/catalog.parquet --key sim31N_043_30 --out site.npz
  python -m pipeline embed demo_out/moe demo_out/shards --out sites.parquet
  python -m pipeline embed demo_out/moe geobench --task benv2 --sensors s2 --out benv2.parquet"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="exported .safetensors, checkpoint folder or run directory"
    )
    parser.add_argument("input", metavar="INPUT", help="STAC catalog, shard set, or with --task a data set's folder")
    parser.add_argument("--key", help="key of the site, where INPUT holds several (.npz, .safetensors)")
    parser.add_argument("--task", metavar="ROW", help="INPUT is a published data set, see evaluate --list (.parquet)")
    parser.add_argument("--sensors", metavar="A,B", help="some of the row's sensors only")
    parser.add_argument(
        "--pool", choices=("mean", "mean_std"), default="mean", help="over valid tokens and dates (default mean)"
    )
    parser.add_argument(
        "--stage", choices=("last", "1", "2", "3", "4", "all"), default="last", help="of the backbone (default last)"
    )
    parser.add_argument("--out", required=True, metavar="OUT", help=".npz, .safetensors or .parquet (any fsspec URL)")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from pipeline.embed import embed, find_site, write_features
    from pipeline.export import load_model

    if args.out.endswith(".parquet"):
        return embed_set(args)
    if not args.out.endswith((".npz", ".safetensors")) or args.task:
        raise UsageError(
            f"--out {args.out} must end in {'.parquet' if args.task else '.npz, .safetensors or .parquet'}"
        )
    model = load_model(args.checkpoint)
    site = find_site(args.input, args.key)
    arrays = embed(model, site)
    facts = {key: value for key, value in model.facts.items() if key != "run_config"}
    size = write_features(args.out, arrays, {**facts, "site": site.key})
    shapes = {name: list(value.shape) for name, value in arrays.items() if value.ndim >= 3 and value.dtype != bool}
    print(
        f"{args.out}: site {site.key}, "
        + ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    )
    if args.json:
        print_json({"site": site.key, "out": args.out, "bytes": size, "shapes": shapes})
    return 0


def embed_set(args: argparse.Namespace) -> int:
    """All sites of a shard set, or all images of a row, into one GeoParquet file."""
    from cluster import storage
    from cluster.cli import print_json
    from cluster.config import from_dict
    from cluster.errors import UsageError
    from data_prep.shards import MANIFEST, ShardSet
    from pipeline.config import PretrainConfig, ViewConfig
    from pipeline.embeddings import embed_row, embed_shards
    from pipeline.evaluate.registry import row_named
    from pipeline.export import load_model

    if args.key:
        raise UsageError("--key is for one site (.npz, .safetensors); .parquet takes them all")
    row = row_named(args.task) if args.task else None
    if row is not None and args.sensors:
        row = row.only(tuple(args.sensors.split(",")))
    elif row is None and not storage.exists(storage.join(args.input, MANIFEST)):
        raise UsageError(f"{args.input} is no shard set; of a published data set say which with --task ROW")
    model = load_model(args.checkpoint)
    stage: str | int = int(args.stage) if args.stage.isdigit() else args.stage
    if row is not None:
        lines = embed_row(model, row, args.input, args.out, args.pool, stage)
    else:
        known = model.facts.get("run_config")
        view = from_dict(PretrainConfig, known, args.checkpoint).data.views_global if known else ViewConfig()
        lines = embed_shards(model, ShardSet.open(args.input), args.out, view, args.pool, stage)
    size = storage.size(args.out)
    print(f"{args.out}: {lines:,} lines, {size / 1e6:.1f} MB")
    if args.json:
        print_json({"lines": lines, "out": args.out, "bytes": size})
    return 0
