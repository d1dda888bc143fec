"""`python -m pipeline tour RUN [RUN …] --out tour.html`: one page of data, curves, features, probes and comparison, to look at and to keep.

The page opens without network. Pictures come from the runs (`artifacts/`), the contact sheet from `data_prep show`.
"""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  python -m pipeline tour demo_out/moe demo_out/dense --sheet demo_out/sheet.png --out demo_out/tour.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, MLflow run id or run name")
    parser.add_argument("--out", required=True, metavar="TOUR.html")
    parser.add_argument("--sheet", metavar="SHEET.png", help="contact sheet of the shard set")
    parser.add_argument("--uri", help="MLflow tracking store for run ids and names (default: MLFLOW_TRACKING_URI)")
    parser.add_argument("--json", action="store_true", help="print where it lies as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster import storage
    from cluster.cli import print_json
    from cluster.errors import UsageError
    from pipeline.compare.figures import summarise
    from pipeline.compare.load import load_runs
    from pipeline.compare.paired import pair
    from pipeline.compare.tour import html_tour
    from pipeline.compare.verdict import judge

    runs = load_runs(args.runs, args.uri)
    try:
        sheet = storage.read_bytes(args.sheet) if args.sheet else None
    except FileNotFoundError:
        raise UsageError(
            f"--sheet {args.sheet} does not exist; python -m data_prep show SHARDS --out {args.sheet} makes it"
        ) from None
    summaries = summarise(runs)
    text = html_tour(runs, judge(runs), summaries, pair(runs, summaries[0].samples), sheet)
    storage.write_atomic(args.out, text.encode())
    print(f"tour: {args.out}")
    if args.json:
        print_json({"tour": args.out, "bytes": len(text.encode()), "runs": [run.name for run in runs]})
    return 0
