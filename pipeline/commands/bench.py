"""Benchmarks: each prints its figures side by side with what one would pick instead.

examples:
  python -m pipeline bench loader demo_out/shards
  python -m pipeline bench step pipeline/runs/demo.yaml data.url=demo_out/shards
  python -m pipeline bench moe --experts 8 --tokens 8192
  python -m pipeline bench checkpoint pipeline/runs/tiny.yaml --url s3://bucket/scratch
  python -m pipeline bench index --samples 5000000 --dates 65 48
  python -m pipeline bench tracking --log-every 10
  python -m pipeline bench gpu
"""

from __future__ import annotations

import argparse
import importlib

from cluster.errors import UsageError

# name → (module with `add_arguments` and `main`, one line of help); the modules import nothing heavy at the top
BENCHMARKS = {
    "loader": ("pipeline.bench.loader", "samples per second and CPU per sample, beside stock loaders"),
    "step": ("pipeline.bench.step", "optimizer steps per second by ZeRO stage, beside a plain torch loop"),
    "moe": ("pipeline.bench.moe", "expert layers forward and backward, beside DeepSpeed's own and a dense one"),
    "checkpoint": ("pipeline.bench.checkpoint", "save and load, beside torch.save and DeepSpeed's own form"),
    "index": ("pipeline.bench.index", "opening the index of a made-up set of millions of samples, and wrong ones"),
    "tracking": ("pipeline.bench.tracking", "what an MLflow server costs a step: up, killed, hanging, back again"),
    "gpu": ("pipeline.bench.gpu", "what only a GPU can show, in one report; without one it says so"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, (module, line) in BENCHMARKS.items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            continue
        sub = choices.add_parser(
            name, help=line, description=found.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        found.add_arguments(sub)


def main(args: argparse.Namespace) -> int | None:
    if args.benchmark not in BENCHMARKS:
        raise UsageError(f"no benchmark {args.benchmark!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args)
