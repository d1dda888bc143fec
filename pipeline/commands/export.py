"""`python -m pipeline export CHECKPOINT OUT.safetensors`: one file with backbone, fusion and all experts, config and statistics.

Load it with `from model.pretrained import load_backbone`: a plain torch module that needs neither DeepSpeed nor MLflow.
"""

from __future__ import annotations

import argparse

EXAMPLE = "example:\n  python -m pipeline export demo_out/moe moe.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run directory (its newest one)"
    )
    parser.add_argument("out", metavar="OUT.safetensors", help="file to write (any fsspec URL)")
    parser.add_argument(
        "--weights", choices=("teacher", "student"), default="teacher", help="default: teacher, the better one"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from pipeline.export import export

    if not args.out.endswith(".safetensors"):
        raise UsageError(f"{args.out} must end in .safetensors")
    facts = export(args.checkpoint, args.out, args.weights)
    print(f"{args.out}: {facts['parameters']:,} parameters, step {facts['step']}, {facts['samples']:,} samples seen")
    if args.json:
        print_json({**{key: value for key, value in facts.items() if key != "run_config"}, "out": args.out})
    return 0
