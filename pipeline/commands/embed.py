"""`python -m pipeline embed CHECKPOINT INPUT --out OUT`: features of one multi-modal site for use elsewhere.

INPUT is a STAC catalog (stac-geoparquet, item JSON or a folder of items; `data_prep catalog` makes one of other layouts) or a
shard set. Every date and modality the site has is used; what is missing is masked.
"""

from __future__ import annotations

import argparse

EXAMPLE = "example:\n  python -m pipeline embed moe.safetensors demo_out/sites/catalog.parquet --key sim31N_043_30 --out site.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="exported .safetensors, checkpoint folder or run directory"
    )
    parser.add_argument("input", metavar="INPUT", help="STAC catalog or shard set")
    parser.add_argument("--key", help="key of the site, where INPUT holds several")
    parser.add_argument("--out", required=True, metavar="OUT", help=".npz or .safetensors (any fsspec URL)")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from pipeline.embed import embed, find_site, write_features
    from pipeline.export import load_model

    if not args.out.endswith((".npz", ".safetensors")):
        raise UsageError(f"--out {args.out} must end in .npz or .safetensors")
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
