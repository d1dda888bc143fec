"""Builds the engine for chosen ranks of a world that is not here, and compares what they hold with the plan.

Torch's fake process group lets one process be any rank of any job; collectives move nothing, so this shows structure (pieces,
groups, bytes), not values. A rank is built as it would be on its node: the whole model must fit into this machine's memory, so
a large one is checked with `model.size=…` smaller, which has the same structure.

examples:
  python -m pipeline layout pipeline/runs/tiny.yaml --world 1024 --per-node 8 parallel.ep=8 train.batch=1024 train.micro_batch=1
  python -m pipeline layout pipeline/runs/tiny.yaml --world 64 --per-node 8 --ranks 0,9,63 --json
"""

from __future__ import annotations

import argparse
from typing import Any

BYTES_PER_PARAMETER = 24  # fp32 student, teacher, and what the engine makes of them, on one host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--world", type=int, required=True, help="processes of the job")
    parser.add_argument("--per-node", type=int, default=8, help="processes per node (default 8)")
    parser.add_argument("--ranks", help="comma-separated; default: the first, one in the middle, the last")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.config import load
    from cluster.errors import UsageError
    from pipeline.config import PretrainConfig

    config = load(PretrainConfig, args.config, args.overrides)
    ranks = _ranks(args.ranks, args.world)
    if args.per_node < 1 or args.world % args.per_node:
        raise UsageError(f"--per-node {args.per_node} does not divide --world {args.world}")
    _check_memory(config)
    from pipeline.parallel.fake import built

    found = []
    for rank in ranks:
        figures = built(config, rank, args.world, args.per_node)
        pairs = {
            "parameters": (figures["planned_parameters"], figures["parameters"]),
            "state_bytes": (figures["planned_state_bytes"], figures["state_bytes"]),
            "pieces": (len(figures["planned_pieces"]), len(figures["pieces"])),
        }
        agree = figures["pieces"] == figures["planned_pieces"] and all(a == b for a, b in pairs.values())
        found.append({"rank": rank, "agree": agree, "groups": figures["groups"], **pairs})
        shown = "  ".join(f"{name} {a:,} / {b:,}" for name, (a, b) in pairs.items())
        print(
            f"rank {rank:>5}  {'agrees' if agree else 'DIFFERS'}  planned / built: {shown}  groups {figures['groups']}"
        )
    agree = all(row["agree"] for row in found)
    if args.json:
        print_json({"world": args.world, "agree": agree, "ranks": found})
    return 0 if agree else 1


def _ranks(text: str | None, world: int) -> list[int]:
    """Raises UsageError."""
    from cluster.errors import UsageError

    if text is None:
        return sorted({0, min(world // 2 + 1, world - 1), world - 1})
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--ranks {text}: give numbers such as 0,513,1023") from None
    beyond = [rank for rank in found if not 0 <= rank < world]
    if beyond:
        raise UsageError(f"--ranks {beyond[0]} is outside a world of {world}")
    return found


def _check_memory(config: Any) -> None:
    """Raises UsageError before a model is built that this machine cannot hold."""
    import psutil

    from cluster.errors import UsageError
    from model.counts import table

    needed, there = BYTES_PER_PARAMETER * table(config)["parameters"]["total"], psutil.virtual_memory().available
    if needed > there:
        raise UsageError(
            f"building this model takes {needed / 1e9:.0f} GB of this machine's memory, {there / 1e9:.0f} GB are free; a smaller "
            "model.size has the same structure"
        )
