"""Puts faults into geoloom and checks what must hold afterwards; prints a table, exits 1 if anything was lost, doubled or wrong.

examples:
  python -m tests.faults                        # everything, about 5 minutes on 2 cores, and real training runs
  python -m tests.faults --share 0.2 --no-train # a fifth of each kind, without the trainer
  python -m tests.faults --only 'S3|frozen' --seed 7 --out faults.md
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from pathlib import Path

from tests.faults import data, runs, services, slurm
from tests.faults.campaign import run, table
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
    "--keep",
    type=Path,
    help="folder for what the real trainer's kinds share, used again by the next call (a campaign in slices)",
)
parser.add_argument("--out", type=Path, help="also write the table here")


def main() -> int:
    args = parser.parse_args()
    kinds = [*runs.KINDS, *data.KINDS, *services.KINDS, *slurm.KINDS]
    if not args.no_train:
        from tests.faults import training

        kinds += training.KINDS
    kinds = [kind for kind in kinds if re.search(args.only, kind.name)]
    logging.getLogger().setLevel(logging.ERROR)  # what every fault logs is in the table's last column
    began = time.monotonic()
    with shared(args.keep) as common:
        rows = run(kinds, common, args.seed, args.share)
    text = f"{table(rows)}\n\nseed {args.seed}, {time.monotonic() - began:.0f} s"
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0 if all(row.is_clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
