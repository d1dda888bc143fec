"""Pretrains a model, or continues an interrupted run: the same command again.

Ranks come from --processes (started here), torchrun, the deepspeed launcher or srun. SIGTERM or SIGUSR1 make it finish the
step, write a checkpoint and exit with code 85; the same command then continues.

examples:
  python -m pipeline train pipeline/runs/demo.yaml data.url=demo_out/shards run.dir=demo_out/moe --processes 2
  python -m pipeline train pipeline/runs/skysense_v2.yaml --dry-run
  python -m pipeline train pipeline/runs/demo_dense.yaml --explain model.moe
  python -m pipeline train pipeline/runs/demo.yaml data.url=other/shards run.dir=runs/adapted --init-from demo_out/dense
  torchrun --nproc-per-node 8 -m pipeline train pipeline/runs/tiny.yaml data.url=s3://bucket/shards
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import replace
from typing import NoReturn

from cluster.cli import explain, print_json, private_files
from cluster.config import fingerprint, load, to_dict
from cluster.errors import RunFailure, UsageError
from cluster.exit_codes import DONE, FAILED
from cluster.ranks import Ranks
from cluster.rundir import RunDir
from cluster.secrets import redacted
from pipeline.config import PretrainConfig
from pipeline.launch import die_with_launcher, free_port, launch
from pipeline.parallel.layout import Layout
from pipeline.stop import StopFlag
from pipeline.tracking.uri import tracking_uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run, such as pipeline/runs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="start N ranks on this machine (default: 1, or the launcher's)"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH",
        help="auto: continue run.dir if it holds a checkpoint; never: refuse to; PATH: a checkpoint or run directory",
    )  # fmt: skip
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="weights of step 0: a run, checkpoint or export; the same as init.weights=PATH",
    )
    parser.add_argument("--explain", metavar="KEY", help="what a key or section is, and its value here; starts nothing")
    parser.add_argument("--dry-run", action="store_true", help="parameters, FLOPs and layout; starts nothing")
    parser.add_argument("--json", action="store_true", help="print figures as a JSON last line")


def main(args: argparse.Namespace) -> int:
    if args.init_from:
        args.overrides = [*args.overrides, f"init.weights={json.dumps(args.init_from)}"]
    if args.explain:
        from cluster.schema import explain as explain_key

        print(explain_key(PretrainConfig, args.config, args.overrides, args.explain))
        return 0
    config = load(PretrainConfig, args.config, args.overrides)
    if args.dry_run:
        return dry_run(config, args.processes, args.json)
    private_files()
    ranks = Ranks.from_environment()
    check(config, args.processes, ranks)
    json_flag = ["--json"] if args.json else []
    if args.processes and ranks.launcher == "none" and args.processes > 1:
        die_with_launcher()  # of `ablate`, if it is one that started us; the ranks die with us
        return launch(args.processes, ["train", args.config, *args.overrides, "--resume", args.resume, *json_flag])
    run_rank(config, ranks, args.resume, args.json)


def check(config: PretrainConfig, processes: int | None, ranks: Ranks) -> None:
    """What can be refused before torch is imported and ranks are started. Raises UsageError."""

    from data_prep.shards import ShardSet

    if processes is not None and processes < 1:
        raise UsageError(f"--processes {processes}: at least 1")
    if processes and ranks.launcher != "none" and processes != ranks.world:
        raise UsageError(f"--processes {processes} under a launcher that started {ranks.world}; leave --processes out")
    if ranks.launcher == "none":
        ranks = replace(ranks, world=processes or 1)
    Layout.of(config, ranks)
    tracking_uri(config.tracking.uri)
    urls = (config.data.url,) if isinstance(config.data.url, str) else config.data.url
    if not urls or not all(urls):
        raise UsageError("data.url is missing: give the shard set, such as data.url=demo_out/shards")
    if ranks.is_first:
        splits = [ShardSet.open(url).manifest["counts"]["splits"] for url in urls]
        samples = sum(int(split.get(config.data.split, {}).get("samples", 0)) for split in splits)
        if samples < ranks.world:
            raise UsageError(
                f"{', '.join(urls)}: {samples} samples in split {config.data.split} for {ranks.world} processes; "
                "use fewer processes or build more sites"
            )


def run_rank(config: PretrainConfig, ranks: Ranks, resume: str, as_json: bool) -> NoReturn:
    """One rank, from its first import to its exit code; never returns (`processes.finish` says why)."""

    die_with_launcher()
    stop = StopFlag()

    from pipeline.parallel.processes import choose_accelerator, finish

    choose_accelerator()
    from pipeline.health import AgreedFailure
    from pipeline.train import train

    if ranks.launcher == "none":  # alone: any port will do, and a fixed one may be another run's
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks = replace(ranks, port=free_port())
    code, together = FAILED, None
    try:
        code = train(config, ranks, resume, stop)
    except (UsageError, RunFailure) as error:
        code, together = error.exit_code, isinstance(error, AgreedFailure)
        if ranks.is_first or not isinstance(error, AgreedFailure | UsageError):
            explain("python -m pipeline train", error)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
    if as_json and code == DONE and ranks.is_first:
        report(config)
    finish(code, together)


def report(config: PretrainConfig) -> None:
    """The last line of `--json`: the last metrics line."""

    rundir = RunDir(config.run.dir)
    print_json({"run_dir": rundir.url, "run_id": rundir.run_id, **rundir.read_metrics()[-1]})


def dry_run(config: PretrainConfig, processes: int | None, as_json: bool) -> int:
    """Parameters and FLOPs by arithmetic alone: no torch, no data."""
    from model import activations
    from model.counts import table

    figures = table(config)
    if processes:
        print(f"layout  {Layout.of(config, Ranks(world=processes, local_world=processes))}")
    for name, count in figures["parameters"].items():
        print(f"{name:<14}{count / 1e6:>12.3f} M parameters")
    for name, flops in figures["flops_per_sample"].items():
        if isinstance(flops, int):
            print(f"{name:<14}{flops / 1e9:>12.3f} GFLOP per sample")
    if as_json:  # `cluster submit` and `cluster plan` read the resolved tree and the model's figures from here
        kept = {"cpu": activations.table(config, fused=False), "gpu": activations.table(config, fused=True)}
        more = {"activations": kept, "routed": activations.routed(config)}
        print_json({**figures, **more, "fingerprint": fingerprint(config), "resolved": to_dict(config)})
    return 0
