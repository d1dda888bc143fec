"""Index, manifest and fault list of a build whose shards are all finished (array builds merge by themselves; this repeats it).

example:
  python -m data_prep merge data_prep/runs/s3.yaml output.url=s3://bucket/set
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the YAML file the shards were built with")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import config as settings
    from data_prep.build import Outcome, claim, finish
    from data_prep.commands.build import print_figures, summarise
    from data_prep.config import BuildConfig
    from data_prep.merge import read_part
    from data_prep.plan import make_plan, read_catalogs

    config = settings.load(BuildConfig, args.config, args.overrides)
    records, unplaced = read_catalogs(config)
    plan = make_plan(records, config, unplaced)
    claim(config.output.url, plan, config)
    manifest = finish(config, plan)
    parts = [part for name in plan.names if (part := read_part(config.output.url, name))]
    outcome = Outcome(plan, manifest, parts, [*plan.faults, *(fault for part in parts for fault in part["faults"])])
    summarise(outcome, config, 0, 1)
    if args.json:
        print_figures(config.output.url, outcome)
    return 0
