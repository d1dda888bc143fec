"""`python -m data_prep audit URL|CATALOG`: offset, scale, nodata and alignment per asset; exit 1 on contradictions."""

from __future__ import annotations

import argparse

from data_prep.commands.catalog import LAYOUTS as OF_CATALOG
from data_prep.executors import add_arguments as add_executor
from data_prep.executors import executor_of

EXAMPLE = """example:
  python -m data_prep audit /data/terramind
  python -m data_prep audit catalog.parquet --json
  python -m data_prep audit s3://bucket/shards --out audit.jsonl
  python -m data_prep audit catalog.parquet --executor slurm --jobs 16

A folder in any layout, a STAC catalog, or a finished shard set. A contradiction is metadata against pixels (offset declared
or not, dB or linear), or metadata against itself. Exit 1 when there is one, or an asset that cannot be used."""
LAYOUTS = tuple(name for name in OF_CATALOG if name != "patches")  # which have to be declared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("url", metavar="URL|CATALOG", help="folder, catalog or shard set, any fsspec URL")
    parser.add_argument("--layout", choices=LAYOUTS, help="how a folder is laid out (default: guessed from its names)")
    parser.add_argument("--out", metavar="FILE", help="also write every row as JSON lines, any fsspec URL")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from cluster.storage import write_atomic
    from data_prep.audit import audit, figures, rows_json, table

    rows = audit(args.url, args.layout, executor_of(args, 0))
    if not rows:
        raise UsageError(f"{args.url} holds no asset to audit")
    for line in table(rows):
        print(line)
    if args.out:
        write_atomic(args.out, rows_json(rows).encode())
    found = figures(rows)
    bad = len({entry["asset"] for entry in found["contradictions"]})
    print(f"{found['assets']} assets, {bad} with contradictions, {len(found['faults'])} that cannot be used")
    if args.json:
        print_json(found)
    return 1 if bad or found["faults"] else 0
