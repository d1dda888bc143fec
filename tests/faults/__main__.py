"""Puts faults into geoloom and checks what must hold afterwards; prints a table, exits 1 if anything was lost, doubled or wrong.

Every finished injection is kept in RECORD: the same command goes on after a kill, and makes nothing twice.

examples:
  python -m tests.faults --side-by-side         # everything: files and servers, SLURM and the real trainer in three processes
  python -m tests.faults --share 0.2 --no-train # a fifth of each kind, without the trainer
  python -m tests.faults --only 'S3|frozen' --seed 7 --record '' --out faults.md
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

from cluster.progress import clock
from tests.faults import data, runs, services, slurm
from tests.faults.campaign import Kind, Record, code_digest, collect, figures, run, table
from tests.faults.shared import shared

parser = argparse.ArgumentParser(
    prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--share", type=float, default=1.0, help="of each kind's injections (default 1)")
parser.add_argument("--only", default="", help="regular expression over the kinds' names")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--no-train", action="store_true", help="leave out the kinds that start the real trainer on 2 ranks"
)
parser.add_argument(
    "--side-by-side", action="store_true", help="SLURM and the trainer beside the rest: they mostly wait for processes"
)
parser.add_argument("--group", choices=("here", "slurm", "train"), help="one of the three alone")
parser.add_argument(
    "--record", type=str, default="faults_out/injections.jsonl", help="file of what is done; '' keeps none"
)
parser.add_argument(
    "--keep",
    type=Path,
    help="folder for what the real trainer's kinds share, used again by the next call with the same code",
)
parser.add_argument("--out", type=Path, help="also write the table here")
parser.add_argument("--json", action="store_true", help="figures on stdout instead of the table")


def chosen(args: argparse.Namespace) -> dict[str, list[Kind]]:
    """The kinds asked for, by group."""
    groups = {"here": [*runs.KINDS, *data.KINDS, *services.KINDS], "slurm": slurm.KINDS}
    if not args.no_train:
        from tests.faults import training

        groups["train"] = training.KINDS
    return {
        name: found
        for name, kinds in groups.items()
        if args.group in (None, name) and (found := [kind for kind in kinds if re.search(args.only, kind.name)])
    }


def beside(args: argparse.Namespace, groups: list[str]) -> None:
    """One process per group, all adding to one record."""
    same = ["--share", str(args.share), "--only", args.only, "--seed", str(args.seed), "--record", args.record]
    same += ["--keep", str(args.keep)] if args.keep else []
    children = [subprocess.Popen([sys.executable, "-m", "tests.faults", *same, "--group", group], stdout=subprocess.DEVNULL)
                for group in groups]  # fmt: skip
    try:
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def main() -> int:
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # servers end with us
    groups = chosen(args)
    kinds = [kind for found in groups.values() for kind in found]
    logging.getLogger().setLevel(logging.ERROR)  # what every fault logs is in the table's last column
    record = Record(Path(args.record), args.seed) if args.record else None
    if args.side_by_side and record is None:
        parser.error("--side-by-side needs a --record")
    if args.side_by_side and len(groups) > 1:
        beside(args, list(groups))
        assert record is not None
        rows = collect(kinds, args.share, record.read())
    else:
        with shared(args.keep / code_digest() if args.keep else None) as common:
            rows = run(
                kinds, common, args.seed, args.share, lambda text: print(text, file=sys.stderr, flush=True), record
            )
    facts = {"seed": args.seed, **figures(rows)}
    text = f"{table(rows)}\n\nseed {args.seed}, {clock(facts['total']['seconds'])} of injections"
    print(json.dumps(facts, indent=1) if args.json else text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    missing = [row.kind.name for row in rows if not row.outcomes]
    if missing:
        print(f"error: not run: {', '.join(missing)}", file=sys.stderr)
    return 0 if all(row.is_clean for row in rows) and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
