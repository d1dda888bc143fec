"""`python -m pipeline schema train|build`: the JSON schema of a config, for editors.

Shipped ones lie beside the configs (`pipeline/runs/schema.json`, `data_prep/runs/schema.json`); the first line of a config
names it: `# yaml-language-server: $schema=schema.json`. `make schema` writes them anew.

examples:
  python -m pipeline schema train --out pipeline/runs/schema.json
  python -m pipeline schema build
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", choices=["train", "build"], help="the config of pipeline train or of data_prep build")
    parser.add_argument("--out", metavar="FILE", help="write it there instead of printing it")


def main(args: argparse.Namespace) -> int:
    from cluster import storage

    text = schema_text(args.which)
    if args.out:
        storage.write_atomic(args.out, text.encode())
    else:
        print(text, end="")
    return 0


def schema_text(which: str) -> str:
    """The schema as it stands in the file."""
    import json

    from cluster.schema import json_schema
    from data_prep.config import BuildConfig
    from pipeline.config import PretrainConfig

    cls = {"train": PretrainConfig, "build": BuildConfig}[which]
    command = {"train": "python -m pipeline train", "build": "python -m data_prep build"}[which]
    return json.dumps(json_schema(cls, f"configuration of {command}"), indent=1, ensure_ascii=False) + "\n"
