"""New sites into a set that stands: into new shards, with the set's own splits. Old shards keep their bytes.

CONFIG is the config of the set with more in it: other catalogs, or a prepared plan of a larger area. What the set holds already is left as
it is; what was removed from it stays out. After a kill run the same command again. A site that is to be built anew with newer
dates: `remove URL --key K --again` first. Sets that are to stay apart need none of this: data.url takes several.

examples:
  python -m data_prep append demo.yaml source.catalog=[more/catalog.parquet] output.url=demo_out/shards
  python -m data_prep append stac.yaml sites.bbox=[14,46,16,47] sites.url=wider.parquet prepare.url=wider output.url=s3://bucket/set
  python -m data_prep append stac.yaml output.url=s3://bucket/set --task 3 --tasks 16      # as for build; also --executor dask
"""

from __future__ import annotations

import argparse
import os

from data_prep.executors import add_arguments as add_executor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file: the set's own, naming what is to be added")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    parser.add_argument("--task", type=int, metavar="I", help="make only this share of the shards, counted from 0")
    parser.add_argument("--tasks", type=int, metavar="N", help="number of shares")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import config as settings
    from data_prep.build import over_budget
    from data_prep.commands.build import array_share, budget_fault, print_figures, say, summarise
    from data_prep.config import BuildConfig
    from data_prep.executors import executor_of
    from data_prep.grow import append

    config = settings.load(BuildConfig, args.config, args.overrides)
    task, tasks = array_share(args.task, args.tasks, os.environ)
    outcome = append(config, task, tasks, executor_of(args, config.workers))
    last = outcome.plan.report.get("appended", [])[-1:]
    if not outcome.built and outcome.manifest is not None:
        say("nothing was made: the set holds every site that can be added")
    elif outcome.plan.added and last:
        sites = last[0]["sites"]
        say(
            f"addition {len(outcome.plan.added)}: {sites['planned']} new sites; {sites['held']} were in the set already, "
            f"{sites['removed']} had been removed from it"
        )
    summarise(outcome, config, task, tasks)
    if args.json:
        print_figures(config.output.url, outcome)
    if over_budget(outcome, config):
        raise budget_fault(outcome, config)
    return 0
