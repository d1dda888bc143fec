"""Index, manifest and fault list of a build whose shards are all finished (array builds merge by themselves; this repeats it).

examples:
  python -m data_prep merge data_prep/runs/s3.yaml output.url=s3://bucket/set
  python -m data_prep merge data_prep/runs/s3.yaml output.url=s3://bucket/set --allow-missing   # one task will not finish today
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the YAML file the shards were built with")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="close the set over the finished shards; build adds the others later",
    )
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import config as settings
    from data_prep.build import Outcome, find_plan, finish
    from data_prep.commands.build import print_figures, summarise
    from data_prep.config import BuildConfig
    from data_prep.parts import gather

    config = settings.load(BuildConfig, args.config, args.overrides)
    plan = find_plan(config)
    manifest = finish(config, plan, args.allow_missing)
    parts = [part for bundle in gather(config.output.url, plan.names, plan.fingerprints) for part in bundle.parts]
    outcome = Outcome(plan, manifest, parts, [*plan.faults, *(fault for part in parts for fault in part["faults"])])
    summarise(outcome, config, 0, 1)
    if missing := manifest.get("missing"):
        print(
            f"without {len(missing)} unfinished shards ({', '.join(missing[:3])}…): build makes them, and merges again"
        )
    if args.json:
        print_figures(config.output.url, outcome)
    return 0
