"""Whole optimizer steps (teacher, student, update, average) in one process: the ladder of optimisations in a plain torch loop, a row each,
then the engine by ZeRO stage.

One batch of the shard set is used again and again, so that reading is not measured. --operations counts, in one more step, what torch
dispatches and how often the host would wait for an accelerator: figures that no load of the machine changes.

examples:
  python -m pipeline bench step pipeline/runs/demo.yaml data.url=demo_out/shards parallel.ep=1
  python -m pipeline bench step pipeline/runs/demo.yaml --simulated --operations --ladder --json
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--operations", action="store_true", help="also operations and host synchronisations of a step")
    parser.add_argument("--ladder", action="store_true", help="only the plain loop, one row per optimisation")
    parser.add_argument(
        "--compiled", action="store_true", help="the ladder's row with torch.compile too (minutes on a CPU)"
    )
    parser.add_argument("--simulated", action="store_true", help="a batch made in memory instead of one of data.url")
    parser.add_argument("--json", action="store_true")


class Rung(NamedTuple):
    """What a row of the ladder changes against the step as configured: keys of the config, and settings of `model.plan`."""

    overrides: tuple[str, ...] = ()
    packing: tuple[tuple[str, int], ...] = ()


LADDER: dict[str, Rung] = {
    "as_configured": Rung(),
    "fusion_frames": Rung(("model.fusion.kind=frames",)),
    "no_short_way": Rung(("model.fusion.skip=false",)),
    "experts_loop": Rung(("model.moe.grouped=false",)),
    "experts_grouped": Rung(("model.moe.grouped=true",)),
    "checkpointing": Rung(("model.activation_checkpointing=true",)),
    "exact_buckets": Rung(packing=(("PADDED_SLOTS", 0), ("PADDED_SCORES", 0), ("MAX_BUCKETS", 1_000_000))),
    "one_bucket": Rung(packing=(("MAX_BUCKETS", 1), ("PADDED_SLOTS", 1 << 40))),
    "windows_by_mask": Rung(packing=(("MASKED_SCORES", 0),)),
    "compiled": Rung(("train.compile=true",)),
}


def main(args: argparse.Namespace) -> int:
    import torch

    from pipeline.parallel.processes import choose_accelerator

    choose_accelerator()
    from dataclasses import replace

    from cluster.cli import print_json
    from cluster.config import load
    from cluster.ranks import Ranks
    from pipeline.config import PretrainConfig
    from pipeline.launch import free_port
    from pipeline.parallel.processes import finish, set_matmul_precision, start

    config = load(PretrainConfig, args.config, args.overrides)
    config = replace(config, parallel=replace(config.parallel, ep=1))
    ranks = Ranks(port=free_port())
    if args.ladder:  # one process without a group, and without DeepSpeed
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        set_matmul_precision(device.type == "cuda")
    else:
        device = start(ranks, 600.0)
    figures = Figures(args, config, device)
    figures.ladder() if args.ladder else figures.stages(ranks)
    if args.json:
        print_json({"step": figures.rows})
    if not args.ladder:
        finish()
    return 0


class Figures:
    """The rows of one call: the batch they share, and what was found."""

    def __init__(self, args: argparse.Namespace, config: Any, device: Any) -> None:
        from pipeline.bench.simulated import STATISTICS, batch_of
        from pipeline.steplog import peak_flops

        self.args, self.config, self.device = args, config, device
        self.peak = peak_flops(device, config.train.precision)
        self.rows: dict[str, dict[str, float]] = {}
        self.statistics: Any = STATISTICS
        self.classes: list[str] | None = None
        if args.simulated:
            self.batch = batch_of(config, config.train.batch, missing=0.2).to(device)
            return
        from pipeline.reader.reader import Reader

        reader = Reader(config.data, config.model, seed=0, batch_per_rank=config.train.batch)
        self.statistics = {name: bands.to_dict() for name, bands in reader.statistics.items()}
        self.batch, self.classes = next(iter(reader)).to(device), reader.classes

    def ladder(self) -> None:
        """One row per optimisation, each against the first: the loss of the first step says what it leaves unchanged."""
        from cluster.config import load
        from model import plan
        from pipeline.config import PretrainConfig

        for name, rung in LADDER.items():
            if name == "compiled" and not self.args.compiled:
                continue
            run = load(PretrainConfig, self.args.config, [*self.args.overrides, *rung.overrides])
            usual = {key: getattr(plan, key) for key, _ in rung.packing}
            try:
                for key, value in rung.packing:
                    setattr(plan, key, value)
                self._plain(name, run)
            finally:
                for key, value in usual.items():
                    setattr(plan, key, value)

    def stages(self, ranks: Any) -> None:
        """The plain loop, then the engine by ZeRO stage."""
        from dataclasses import replace

        from model.losses.reduce import SingleProcess
        from pipeline.engine import Engine
        from pipeline.first_weights import first_networks
        from pipeline.parallel.layout import Layout

        self._plain("plain_torch", self.config)
        for stage in (0, 1, 2, 3):
            if self.config.train.precision == "bf16" and stage == 0:
                continue
            run = replace(self.config, parallel=replace(self.config.parallel, zero_stage=stage))
            layout = Layout.of(run, ranks)
            student, teacher = first_networks(run, layout, self.statistics, self.classes, self.device)
            engine = Engine(student, teacher, run, layout, self.device, SingleProcess())
            size = layout.micro_batch
            parts = [self.batch.part(i, i + size) for i in range(0, layout.batch_per_rank, size)]
            self._report(f"zero_{stage}", lambda: engine.step(parts, 0, diagnose=False).loss, run)  # noqa: B023  (called here and now)
            engine.deepspeed.destroy()

    def _student(self, run: Any) -> Any:
        from model.initial import draw_all
        from model.pretrain import Student

        student = Student(run.model, run.objective, self.statistics, self.classes)
        draw_all(student, run.train.seed)  # as the engine's rows: equal losses at the same step
        return student

    def _plain(self, name: str, run: Any) -> None:
        from model.teacher import make_teacher

        model = self._student(run).to(self.device)
        teacher = make_teacher(model)
        if run.train.compile:
            for each in (model, teacher):
                each.skysense.compile_blocks()
        self._report(name, _plain(model, teacher, self.batch), run)

    def _report(self, name: str, step: Any, run: Any) -> None:
        from model.counts import table
        from pipeline.bench.operations import Operations

        loss = step()
        seconds, busy = _best(step, self.args.steps)
        rate = self.config.train.batch / seconds
        mfu = rate * table(run)["flops_per_sample"]["train"] / self.peak
        self.rows[name] = {"step_s": seconds, "cpu_s": busy, "samples_per_s": rate, "mfu": mfu, "loss": loss}
        line = (
            f"{name:<16}{seconds:>9.3f} s/step{busy:>9.3f} CPU s{rate:>10.2f} samples/s{mfu:>8.1%} MFU  loss {loss:.5f}"
        )
        if self.args.operations:
            with Operations() as found:
                step()
            self.rows[name] |= {"operations": found.count, "synchronisations": found.synchronisations}
            line += f"{found.count:>8} operations{found.synchronisations:>5} synchronisations"
        print(line, flush=True)


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


def _best(step: Any, steps: int) -> tuple[float, float]:
    """Seconds of the best of several steps, and of this process's CPU time in the best: on a machine that others use too, the second
    is the steadier."""
    import torch

    best, busy = float("inf"), float("inf")
    for _ in range(steps + 1):
        began, began_busy = time.perf_counter(), time.process_time()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best, busy = min(best, time.perf_counter() - began), min(busy, time.process_time() - began_busy)
    return best, busy
