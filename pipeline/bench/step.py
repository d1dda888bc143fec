"""Whole optimizer steps (teacher, student, update, average) in one process: the ladder of optimisations in a plain torch loop, a row each,
then the engine by ZeRO stage.

One batch of the shard set is used again and again, so that reading is not measured. --operations counts, in one more step, what torch
dispatches and how often the host would wait for an accelerator: figures that no load of the machine changes.

examples:
  python -m pipeline bench step pipeline/runs/demo.yaml data.url=demo_out/shards parallel.ep=1
  python -m pipeline bench step pipeline/runs/demo.yaml data.url=demo_out/shards parallel.ep=1 --operations --ladder --json
"""

from __future__ import annotations

import argparse
import time
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--operations", action="store_true", help="also operations and host synchronisations of a step")
    parser.add_argument("--ladder", action="store_true", help="only the plain loop, one row per optimisation")
    parser.add_argument("--json", action="store_true")


# name → overrides: what each row changes against the one that is used
LADDER: dict[str, list[str]] = {
    "as_configured": [],
    "fusion_frames": ["model.fusion.kind=frames"],
    "experts_loop": ["model.moe.grouped=false"],
    "experts_grouped": ["model.moe.grouped=true"],
    "checkpointing": ["model.activation_checkpointing=true"],
}


def main(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from pipeline.parallel.processes import choose_accelerator

    choose_accelerator()
    from cluster.cli import print_json
    from cluster.config import load
    from cluster.ranks import Ranks
    from model.counts import table
    from model.losses.reduce import SingleProcess
    from model.pretrain import Student
    from model.teacher import make_teacher
    from pipeline.bench.operations import Operations
    from pipeline.config import PretrainConfig
    from pipeline.engine import Engine
    from pipeline.launch import free_port
    from pipeline.parallel.layout import Layout
    from pipeline.parallel.processes import finish, start
    from pipeline.reader.reader import Reader
    from pipeline.steplog import peak_flops

    config = load(PretrainConfig, args.config, args.overrides)
    config = replace(config, parallel=replace(config.parallel, ep=1))
    ranks = Ranks(port=free_port())
    Layout.of(config, ranks)
    device = start(ranks, 600.0)
    reader = Reader(config.data, config.model, seed=0, batch_per_rank=config.train.batch)
    statistics = {name: bands.to_dict() for name, bands in reader.statistics.items()}
    batch = next(iter(reader)).to(device)
    flops = table(config)["flops_per_sample"]["train"]
    peak = peak_flops(device, config.train.precision)
    figures: dict[str, dict[str, float]] = {}

    def report(name: str, step: Any, useful: float = flops) -> None:
        loss = step()
        seconds = _best(step, args.steps)
        rate = config.train.batch / seconds
        figures[name] = {"step_s": seconds, "samples_per_s": rate, "mfu": rate * useful / peak, "loss": loss}
        line = (
            f"{name:<16}{seconds:>9.3f} s/step{rate:>10.2f} samples/s{rate * useful / peak:>8.1%} MFU  loss {loss:.5f}"
        )
        if args.operations:
            with Operations() as found:
                step()
            figures[name] |= {"operations": found.count, "synchronisations": found.synchronisations}
            line += f"{found.count:>8} operations{found.synchronisations:>5} synchronisations"
        print(line, flush=True)

    def student(run: PretrainConfig = config) -> Any:
        torch.manual_seed(0)
        return Student(run.model, run.objective, statistics, reader.classes)

    for name, overrides in LADDER.items() if args.ladder else [("plain_torch", [])]:
        run = replace(load(PretrainConfig, args.config, [*args.overrides, *overrides]), parallel=config.parallel)
        model = student(run).to(device)
        report(name, _plain(model, make_teacher(model), batch), table(run)["flops_per_sample"]["train"])
    if args.ladder:
        if args.json:
            print_json({"step": figures})
        finish()
    for stage in (0, 1, 2, 3):
        if config.train.precision == "bf16" and stage == 0:
            continue
        run = replace(config, parallel=replace(config.parallel, zero_stage=stage))
        model, layout = student(), Layout.of(run, ranks)
        engine = Engine(model, make_teacher(model), run, layout, device, SingleProcess())
        parts = [batch.part(i, i + layout.micro_batch) for i in range(0, layout.batch_per_rank, layout.micro_batch)]
        report(f"zero_{stage}", lambda: engine.step(parts, 0, diagnose=False).loss)  # noqa: B023  (called here and now)
        engine.deepspeed.destroy()
    if args.json:
        print_json({"step": figures})
    finish()


def _plain(student: Any, teacher: Any, batch: Any) -> Any:
    """What one would write without DeepSpeed: AdamW over all parameters, average in place. Returns the step, which returns its loss."""
    import torch

    from model.losses.reduce import SingleProcess

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=True)
    student.train()

    def step() -> float:
        targets = teacher.center([teacher.teacher_forward(batch)], 0, SingleProcess())
        loss, _ = student(batch, targets[0], diagnose=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
        student.finish_step(SingleProcess())
        return float(loss.detach())

    return step


def _best(step: Any, steps: int) -> float:
    import torch

    best = float("inf")
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
