"""`python -m pipeline compare RUN [RUN …]`: what differs, whether the comparison is fair, and who is better.

A RUN is a run directory (any fsspec URL), an MLflow run id, or a run name. Beside every probe score stands its own 95 % interval;
differences to the first run, to the untrained network and to pixel statistics are paired over the test sites, which probes leave in
the run directory (`probes/`).
"""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  python -m pipeline compare demo_out/moe demo_out/dense --out report.html
  python -m pipeline compare --ablation runs_out/ablate/base runs_out/ablate/*"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, MLflow run id or run name")
    parser.add_argument("--out", metavar="REPORT.html", help="also write an HTML report that opens without network")
    parser.add_argument(
        "--ablation", action="store_true", help="the first run is the base, each other changes one key of it"
    )
    parser.add_argument("--uri", help="MLflow tracking store for run ids and names (default: MLFLOW_TRACKING_URI)")
    parser.add_argument("--json", action="store_true", help="print the verdict as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from cluster import storage
    from cluster.cli import print_json
    from pipeline.compare.figures import ROWS, summarise
    from pipeline.compare.load import load_runs
    from pipeline.compare.paired import pair
    from pipeline.compare.terminal import show
    from pipeline.compare.verdict import judge

    runs = load_runs(args.runs, args.uri)
    verdict, summaries = judge(runs), summarise(runs)
    pairs = pair(runs, summaries[0].samples)
    show(runs, verdict, summaries, pairs)
    if args.ablation:
        from pipeline.compare.ablation import show_ablation

        show_ablation(runs, summaries, pairs)
    if args.out:
        from pipeline.compare.report import html_report

        storage.write_atomic(args.out, html_report(runs, verdict, summaries, pairs, args.ablation).encode())
        print(f"report: {args.out}")
    if args.json:
        print_json({
            "comparable": verdict.comparable, "reasons": verdict.reasons, "differs": verdict.differs,
            "notes": [*verdict.notes, *pairs.notes],
            "differences": {run.name: {key: asdict(d) for key, d in found.items()} for run, found in zip(runs, pairs.differences)},
            **{f"over_{row}": {run.name: {key: asdict(d) for key, d in s.over[row].items()} for run, s in zip(runs, summaries)} for row in ROWS},
        })  # fmt: skip
    return 0
