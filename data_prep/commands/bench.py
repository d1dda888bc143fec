"""Benchmarks of the prep stage.

examples:
  python -m data_prep bench codec                        # codecs on real pixels, beside the raw array
  python -m data_prep bench build --sites 48             # sites/s by stage against the sum of its parts, 1 and 2 workers
  python -m data_prep bench units --executor dask            # what a dask cluster costs per shard
  python -m data_prep bench plan --sites 100000 1000000  # what planning costs, and how it grows
  python -m data_prep bench build --scene-px 10980       # memory of a worker that cuts sites out of a full Sentinel-2 tile
"""

from __future__ import annotations

import argparse
import importlib

# name → (module with `add_arguments` and `main`, one line of help); the modules import nothing heavy at the top
BENCHMARKS = {
    "codec": ("data_prep.bench.codecs", "size and CPU of each member codec on real pixels"),
    "units": ("data_prep.bench.units", "what an executor costs per unit of work"),
    "plan": ("data_prep.bench.plan", "sites, prepare, slices and merge at very many sites: CPU and memory"),
    "build": ("data_prep.bench.throughput", "build throughput by stage, workers side by side, memory"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(BENCHMARKS))
    for name, (module, line) in BENCHMARKS.items():
        found = importlib.import_module(module)
        raw = argparse.RawDescriptionHelpFormatter
        sub = choices.add_parser(name, help=line, description=found.__doc__, formatter_class=raw)
        found.add_arguments(sub)


def main(args: argparse.Namespace) -> int | None:
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).main(args)
