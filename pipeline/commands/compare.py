"""`python -m pipeline compare RUN [RUN …]`: what differs, whether the comparison is fair, and who is better.

A RUN is a run directory (any fsspec URL), an MLflow run id, or a run name. Runs that differ in train.seed only are one setting: their
means, the spread between seeds, and every difference with an interval over seeds and test sites, the noise floor, and a verdict:
better, worse or not decided. Without seeds each score has its own 95 % interval, and differences to the first run, to the untrained
network and to pixel statistics are paired over the test sites, which probes leave in the run directory (`probes/`). What `pipeline
evaluate` left in `evaluate/` is compared row by row; folders that `evaluate --out` wrote can be compared as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.compare.evaluated import Evaluated
    from pipeline.compare.groups import Group
    from pipeline.compare.load import RunData

EXAMPLE = """examples:
  python -m pipeline compare demo_out/moe demo_out/dense --out report.html
  python -m pipeline compare ablations/base/* ablations/prompts_0/* --out report.html
  python -m pipeline compare --ablation ablations/base/seed-0 ablations/*/seed-0"""


@dataclass(frozen=True)
class Asked:
    """What an ablation knows of its runs. variants: the setting of each run, by place; references: by setting, the one it is held
    against; claims: by setting, a sentence that holds if it is worse."""

    variants: Sequence[str]
    references: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, str] = field(default_factory=dict)


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
    from cluster import storage
    from cluster.cli import print_json
    from pipeline.compare.evaluated import folder_of

    if all(folder_of(run) and not storage.exists(storage.join(run, "resolved.json")) for run in args.runs):
        figures = compare_folders(args.runs)
    else:
        figures = run(args.runs, args.out, args.uri, args.ablation)
    if args.json:
        print_json(figures)
    return 0


def run(
    names: Sequence[str], out: str | None, uri: str | None = None, ablation: bool = False, asked: Asked | None = None
) -> dict[str, Any]:
    """Shows the comparison, writes its page, returns what `--json` prints."""
    from pipeline.compare.groups import group_runs, has_seeds
    from pipeline.compare.load import load_runs

    runs = load_runs(names, uri)
    groups = group_runs(runs)
    if has_seeds(groups):
        return _by_seeds(runs, groups, out, asked)
    return _by_runs(runs, out, ablation or asked is not None)


def compare_folders(names: Sequence[str]) -> dict[str, Any]:
    """Folders of evaluations without runs (of exported files, say)."""
    from cluster import storage
    from pipeline.compare.evaluated import compare_evaluations, folder_of, show_evaluations

    found = compare_evaluations([storage.name(name) for name in names], [folder_of(name) for name in names])
    show_evaluations(found)
    for reason in found.reasons:
        print(f"NOT COMPARABLE: {reason}")
    return {
        "comparable": not found.reasons, "reasons": found.reasons, "differs": {}, "notes": found.notes,
        "evaluations": found.to_json(),
    }  # fmt: skip


def _evaluated(runs: Sequence[RunData]) -> Evaluated:
    from pipeline.compare.evaluated import compare_evaluations, folder_of

    folders = [folder_of(run.folder) if run.folder else None for run in runs]
    return compare_evaluations([run.name for run in runs], folders)


def _by_runs(runs: Sequence[RunData], out: str | None, ablation: bool) -> dict[str, Any]:
    """One run per setting."""
    from dataclasses import asdict, replace

    from cluster import storage
    from pipeline.compare.evaluated import rows_of, show_evaluations
    from pipeline.compare.figures import ROWS, summarise
    from pipeline.compare.paired import pair
    from pipeline.compare.terminal import show
    from pipeline.compare.verdict import judge

    evaluated = _evaluated(runs)
    verdict, summaries = judge(runs), summarise(runs)
    reasons = [*verdict.reasons, *evaluated.reasons]
    verdict = replace(verdict, comparable=not reasons, reasons=reasons)
    pairs = pair(runs, summaries[0].samples)
    show(runs, verdict, summaries, pairs)
    show_evaluations(evaluated)
    if ablation:
        from pipeline.compare.ablation import show_ablation

        show_ablation(runs, summaries, pairs)
    if out:
        from pipeline.compare.report import html_report

        page = html_report(runs, verdict, summaries, pairs, ablation, rows_of(evaluated))
        storage.write_atomic(out, page.encode())
        print(f"report: {out}")
    return {
        "comparable": verdict.comparable, "reasons": verdict.reasons, "differs": verdict.differs,
        "notes": [*verdict.notes, *pairs.notes],
        "differences": {run.name: {key: asdict(d) for key, d in found.items()} for run, found in zip(runs, pairs.differences)},
        **{f"over_{row}": {run.name: {key: asdict(d) for key, d in s.over[row].items()} for run, s in zip(runs, summaries)} for row in ROWS},
        "evaluations": evaluated.to_json(),
    }  # fmt: skip


def _by_seeds(runs: Sequence[RunData], groups: Sequence[Group], out: str | None, asked: Asked | None) -> dict[str, Any]:
    """Several seeds of some setting: groups are what is compared."""
    from dataclasses import asdict, replace

    from cluster import storage
    from pipeline.compare.figures import summarise
    from pipeline.compare.findings import find
    from pipeline.compare.groups import differing_groups
    from pipeline.compare.seed_tables import show_tables, tables
    from pipeline.compare.terminal import show_fairness
    from pipeline.compare.verdict import judge

    if asked is not None:  # the ablation's own names
        groups = [replace(group, name=asked.variants[group.first]) for group in groups]
    references, claims = (asked.references, asked.claims) if asked else ({}, {})
    summaries, differs = summarise(runs), differing_groups(runs, groups)
    verdict = judge(runs, differs)
    figures, notes = find(runs, summaries, groups, references)
    found = tables(figures, differs, claims)
    show_fairness(verdict, notes)
    show_tables(found)
    if out:
        from pipeline.compare.report import html_groups

        storage.write_atomic(out, html_groups(runs, groups, verdict, notes, found).encode())
        print(f"report: {out}")
    return {
        "comparable": verdict.comparable, "reasons": verdict.reasons, "differs": differs, "notes": [*verdict.notes, *notes],
        "groups": {
            one.group.name: {
                "runs": [runs[i].where for i in one.group.members], "seeds": list(one.group.seeds), "reference": one.reference,
                "claim": claims.get(one.group.name), "probes": {key: asdict(spread) for key, spread in one.probes.items()},
                "gpu_hours": asdict(one.gpu_hours),
            } for one in figures
        },
        "findings": {one.group.name: {key: asdict(f) for key, f in one.against.items()} for one in figures},
        **{f"over_{row}": {one.group.name: {key: asdict(f) for key, f in one.over[row].items()} for one in figures} for row in figures[0].over},
    }  # fmt: skip
