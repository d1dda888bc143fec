"""What a run costs on given nodes, before it is queued: memory per GPU, communication, step time, GPU-hours, best layout.

examples:
  python -m cluster plan pipeline/runs/skysense_v2.yaml --nodes 16 --gpus-per-node 8 --hardware h20
  python -m cluster plan pipeline/runs/tiny.yaml parallel.ep=4 --nodes 1 --gpus-per-node 8 --price-per-gpu-hour 2.5
  python -m cluster plan pipeline/runs/tiny.yaml parallel.ep=8 train.batch=1024 train.micro_batch=1 --nodes 128 --gpus-per-node 8 --verify 0,513,1023
  python -m cluster plan pipeline/runs/demo.yaml --nodes 1 --gpus-per-node 0 --tasks-per-node 2

Memory (CPU formulas) and communication volumes are checked against measured ones by the integration tests. Not validated
here: step times, what accelerators' fused kernels save, the reserve for allocator and libraries, ZeRO-3's gathers.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from cluster.cli import print_json
from cluster.errors import UsageError
from cluster.plan.communication import payload_bytes, share_leaving_node
from cluster.plan.compute import anchor, step_flops, step_seconds
from cluster.plan.facts import Hardware, Layout, configured_layout, hardware, model_facts
from cluster.plan.memory import memory_bytes
from cluster.plan.recommend import FILL, as_overrides, recommend
from cluster.slurm.resolve import resolve, run_layout

CHECKED = ["memory on CPU ranks, ZeRO 0-2: within 10 %", "collective bytes, ZeRO 0-2: within 5 %"]
NOT_CHECKED = ["step time and GPU-hours", "what accelerators' fused attention keeps", "reserve", "ZeRO-3", "offload"]
"""What tests/integration/test_plan_measured.py compares with real steps, and what nothing here was compared with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=None, help="default: the profile's; 0: CPU processes")
    parser.add_argument("--tasks-per-node", type=int, default=None, help="processes per node with --gpus-per-node 0")
    parser.add_argument(
        "--hardware", default=None, help="profile of cluster/plan/hardware.yaml (default h100; cpu without GPUs)"
    )
    parser.add_argument(
        "--verify", nargs="?", const="", default=None, metavar="RANK,…",
        help="also build these ranks of the job here, under a fake process group, and compare them with the plan",
    )  # fmt: skip
    parser.add_argument("--price-per-gpu-hour", type=float, default=None, help="any currency; adds the cost of the run")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    device = hardware(args.hardware or ("cpu" if args.gpus_per_node == 0 else "h100"))
    per_node = _per_node(args, device)
    answer = resolve("train", args.config, args.overrides)
    model = model_facts(answer)
    layout = configured_layout(answer["resolved"], args.nodes, per_node)
    if layout.ep > 1 and (not model.experts or model.experts % layout.ep or layout.world % layout.ep):
        raise UsageError(
            f"parallel.ep={layout.ep} must divide both {model.experts} experts and {layout.world} processes"
        )
    best = recommend(model, layout, device)
    figures = {
        **figures_of(answer, layout, device),
        "recommended": None if best is None else {
            **as_overrides(best), "memory_gb": memory_bytes(model, best, device)["total"] / 1e9,
            "step_s": list(step_seconds(model, best, device)),
        },
    }  # fmt: skip
    if args.price_per_gpu_hour is not None:
        figures["cost"] = args.price_per_gpu_hour * figures["gpu_hours"]
    for line in describe(figures, layout, device):
        print(line)
    code = 0
    if args.verify is not None:
        ranks = ["--ranks", args.verify] if args.verify else []
        world = ["--world", str(layout.world), "--per-node", str(per_node), *ranks]
        code, lines = run_layout(args.config, args.overrides, world)
        print("\n".join(["", "built here (python -m pipeline layout)", *lines[:-1]]))
        figures["verified"] = json.loads(lines[-1])
    if args.json:
        print_json(figures)
    return code


def figures_of(answer: dict[str, Any], layout: Layout, device: Hardware) -> dict[str, Any]:
    """The plan of one layout as plain numbers."""
    model = model_facts(answer)
    memory = memory_bytes(model, layout, device)
    step_s = step_seconds(model, layout, device)
    hours = [s * model.steps * layout.world / 3600 for s in step_s]
    return {
        "memory_gb": {part: size / 1e9 for part, size in memory.items()},
        "fits": memory["total"] <= FILL * device.memory_gb * 1e9,
        "step_s": list(step_s),
        "samples_per_s": [layout.batch / s for s in reversed(step_s)],
        "step_tflop_per_gpu": step_flops(model, layout) / 1e12,
        "comm_gb_per_step": {kind: size / 1e9 for kind, size in payload_bytes(model, layout).items()},
        "all_to_all_leaving_node": share_leaving_node(layout) if layout.ep > 1 else 0.0,
        "gpu_hours": sum(hours) / 2, "gpu_hours_range": hours,
        "anchor": anchor(model, layout, step_s, device), "checked": CHECKED, "not_checked": NOT_CHECKED,
    }  # fmt: skip


def describe(figures: dict[str, Any], layout: Layout, device: Hardware) -> list[str]:
    """The plan for a person."""
    lines = [
        f"{layout.nodes} x {layout.per_node} {device.name} · ZeRO-{layout.zero_stage} · ep={layout.ep} · {layout.precision} · "
        f"batch {layout.batch} = {layout.world} x {layout.micro_batch} x {layout.accumulation}"
        + (" · activation checkpointing" if layout.checkpointing else ""),
        "", f"memory per {'process' if device.is_cpu else 'GPU'}, GB",
    ]  # fmt: skip
    lines += [f"  {part:<22}{size:>9.3f}" for part, size in figures["memory_gb"].items()]
    fits = "fits" if figures["fits"] else "DOES NOT FIT"
    lines += [f"  {fits} in {FILL:.0%} of {device.memory_gb:g} GB", "", "collectives per process and step, GB"]
    lines += [f"  {kind:<22}{size:>9.3f}" for kind, size in figures["comm_gb_per_step"].items()]
    if layout.ep > 1:
        lines.append(f"  {figures['all_to_all_leaving_node']:.0%} of the all-to-all leaves the node")
    low, high = figures["step_s"]
    slow, fast = figures["samples_per_s"]
    hours = figures["gpu_hours_range"]
    lines += ["", f"step       {low:.3g} - {high:.3g} s ({slow:.4g} - {fast:.4g} samples/s)",
              f"GPU-hours  {hours[0]:,.0f} - {hours[1]:,.0f} for the whole run"]  # fmt: skip
    if "cost" in figures:
        lines.append(f"cost       {figures['cost']:,.0f} at the middle of that range")
    lines += _describe_anchor(figures["anchor"])
    lines += [
        "",
        f"checked against measured steps   {'; '.join(CHECKED)}",
        f"not validated                    {', '.join(NOT_CHECKED)}",
    ]
    best = figures["recommended"]
    if best is None:
        return [*lines, "", "no supported layout fits: use more nodes, a smaller batch, or a smaller model"]
    keys = " ".join(f"{key}={str(value).lower()}" for key, value in best.items() if "." in key)
    return [*lines, "", f"recommended  {keys}",
            f"             {best['memory_gb']:.1f} GB, {best['step_s'][0]:.3g} - {best['step_s'][1]:.3g} s per step"]  # fmt: skip


def _describe_anchor(anchor: dict[str, Any] | None) -> list[str]:
    if anchor is None:
        return []
    low, high = anchor["planned_samples_per_s_per_gpu"]
    return [
        f"published  {anchor['published_samples_per_s_per_gpu']} samples/s per H20; planned here {low:.2f} - {high:.2f}",
        f"           this config computes {anchor['tflop_per_sample_here']:.1f} TFLOP per sample; the published rate at 40 % "
        f"MFU leaves {anchor['tflop_per_sample_at_40_percent_mfu']:.1f} (it would take {anchor['mfu_that_would_match']:.0%} MFU)",
    ]


def _per_node(args: argparse.Namespace, device: Hardware) -> int:
    if args.nodes < 1:
        raise UsageError(f"--nodes must be at least 1, found {args.nodes}")
    if args.gpus_per_node == 0 or device.is_cpu:
        per_node = args.gpus_per_node or args.tasks_per_node or 1
    else:
        per_node = args.gpus_per_node if args.gpus_per_node is not None else device.gpus_per_node
    if per_node < 1:
        raise UsageError(f"--gpus-per-node and --tasks-per-node must not be negative, found {per_node}")
    return int(per_node)
