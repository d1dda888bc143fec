"""Which images every site gets: searched in a STAC API, a stac-geoparquet dump or a static catalog, ranked, with spares.

Time, clouds, spread over the year, orbits, minimum numbers: prepare.sensors.SENSOR.*. One overpass is one date. The plan is written in
slices under prepare.url; after a kill or a failing service run the same command again: finished slices are kept, nothing is read
twice. `build` with the same config then makes the shards.

examples:
  python -m data_prep prepare data_prep/runs/stac.yaml
  python -m data_prep prepare data_prep/runs/stac.yaml prepare.sensors.s2.source=items.parquet prepare.sensors.s2.collections=[]
  python -m data_prep prepare data_prep/runs/stac.yaml --executor dask --scheduler tcp://10.0.0.1:8786
"""

from __future__ import annotations

import argparse

from data_prep.executors import add_arguments as add_executor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. data_prep/runs/stac.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file")
    add_executor(parser)
    parser.add_argument("--json", action="store_true", help="last line: the figures as one JSON object")


def main(args: argparse.Namespace) -> int:
    from cluster import config as settings
    from cluster.cli import print_json
    from cluster.progress import Progress
    from data_prep.config import BuildConfig
    from data_prep.executors import executor_of, run_units
    from data_prep.prepare.run import SliceJob, claim, finish, prepare_slice, read_dumps, unfinished

    config = settings.load(BuildConfig, args.config, args.overrides)
    number, mark = claim(config)
    todo = unfinished(config, number)
    if todo:
        read_dumps(config)
        bar = Progress(len(todo), "prepare")
        jobs = [SliceJob(i, config) for i in todo]
        try:
            for _ in run_units(
                prepare_slice, jobs, [f"slice {i}" for i in todo], executor_of(args, config.workers), lambda _: None
            ):
                bar.advance(1, f"({number - len(todo)} slices already done)" if len(todo) < number else "")
        finally:
            bar.close()
    entries = finish(config, number, mark)["slices"]
    sites = sum(entry["sites"] for entry in entries)
    reasons: dict[str, int] = {}
    for entry in entries:
        for reason, count in entry["left_out"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    sensors = {
        name: {key: sum(entry["sensors"][name][key] for entry in entries) for key in ("found", "items", "dates")}
        for name in (entries[0]["sensors"] if entries else {})
    }
    print(
        f"{config.prepare.url}: {sites} sites in {number} slices ({len(todo)} made now), {sum(reasons.values())} sites left out"
    )
    for name, counts in sensors.items():
        print(
            f"  {name}: {counts['dates']} dates, {counts['dates'] / max(sites, 1):.1f} per site, from {counts['items']} of {counts['found']} items"
        )
    for reason, count in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))[:8]:
        print(f"  left out {count}: {reason}")
    if args.json:
        left = sum(reasons.values())
        print_json(
            {
                "sites": sites,
                "slices": number,
                "made": len(todo),
                "left_out": left,
                "reasons": reasons,
                "sensors": sensors,
            }
        )
    if not sites:
        from cluster.errors import RunFailure

        raise RunFailure(
            f"no site has the images asked for; the reasons stand above and in {config.prepare.url}/*.sites.parquet (column why)"
        )
    return 0
