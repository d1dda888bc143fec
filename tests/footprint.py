"""What a training step really takes on CPU ranks: bytes allocated, by part, and bytes handed to each kind of collective.

Runs inside `tests.rank_jobs`: `run_ranks("tests.footprint:measure", processes, {"overrides": […], "steps": 4}, folder)`.
Allocations are those of torch's CPU allocator, as its profiler reports them; collectives are counted where they enter
`torch.distributed`, by the size of this rank's input (for all_gather: of its own part).
"""

from __future__ import annotations

import functools
import gc
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from cluster.config import load
from cluster.ranks import Ranks
from model.losses.reduce import DistributedReduce
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.first_weights import first_networks
from pipeline.parallel.layout import Layout
from tests.synthetic_batch import STATISTICS, make_batch

INPUT = {  # collective → position of the tensor this rank puts in
    "all_reduce": 0, "all_to_all_single": 1, "all_gather_into_tensor": 1, "_all_gather_base": 1, "reduce_scatter_tensor": 1,
    "_reduce_scatter_base": 1, "reduce": 0, "broadcast": 0, "all_gather": 1,
}  # fmt: skip


class Counter:
    """Bytes per collective; patches `torch.distributed`, through which DeepSpeed and we both go."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        for name, position in INPUT.items():
            if hasattr(dist, name):
                setattr(dist, name, self._wrap(name, getattr(dist, name), position))
        import deepspeed.comm.comm as door  # keeps its own references, taken when it was initialised

        door.cdb.all_gather_function = dist.all_gather_into_tensor
        door.cdb.reduce_scatter_function = dist.reduce_scatter_tensor

    def _wrap(self, name: str, function: Any, position: int) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = (
                args[position]
                if len(args) > position
                else kwargs.get("input", kwargs.get("tensor", kwargs.get("input_tensor")))
            )
            alone = dist.get_world_size(kwargs.get("group")) == 1
            if isinstance(tensor, torch.Tensor) and not alone:
                self.bytes[name] += tensor.numel() * tensor.element_size()
                self.calls[name] += 1
            return function(*args, **kwargs)

        return counted

    def take(self) -> dict[str, int]:
        taken = dict(self.bytes)
        self.bytes.clear()
        self.calls.clear()
        return taken


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one of `steps` steps: {"collectives": {kind: bytes}, "memory": {part: bytes, "peak": bytes}}."""
    counter = Counter()
    config, ranks = load(PretrainConfig, None, argument["overrides"]), Ranks.from_environment()
    layout = Layout.of(config, ranks)
    view = config.data.views_global
    canvas = {"hr": view.hr_px, "s2": view.series_px, "s1": view.series_px}
    dates = {"hr": 1, "s2": view.s2_dates, "s1": view.s1_dates}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        device = torch.device("cpu")
        student, teacher = first_networks(config, layout, STATISTICS, None, device)
        engine = Engine(student, teacher, config, layout, device, DistributedReduce())
        del student, teacher
        for step in range(argument["steps"]):
            counter.take()
            gc.collect()  # what only a reference cycle keeps is not memory that the step needs
            batches = [
                make_batch(
                    layout.micro_batch, seed=step * 100 + ranks.rank * 10 + i, canvas=canvas, dates=dates, missing=0.0
                )
                for i in range(layout.accumulation)
            ]
            with torch.profiler.record_function(f"step-{step}"):
                engine.step(batches, step * layout.batch)
            collectives = counter.take()
    return {"collectives": collectives, "memory": _memory(profiler, engine, argument["steps"])}


def _memory(profiler: Any, engine: Engine, steps: int) -> dict[str, int]:
    """Peak of allocated bytes during a step, and what the lasting parts hold of it. Of the steps after the first (which makes
    the optimizer's state) the one with the least: what a collective's own thread frees is freed late, or not reported at all."""
    events = profiler.profiler.kineto_results.events()
    allocations = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    peaks = []
    for step in range(1, steps):
        window = next(e for e in events if e.name() == f"step-{step}")
        first, last = window.start_ns(), window.start_ns() + window.duration_ns()
        level = peak = 0
        for event in allocations:
            level += event.nbytes()
            if first <= event.start_ns() <= last:
                peak = max(peak, level)
        peaks.append(peak)
    parts = {
        "weights": storages(list(engine.deepspeed.module.parameters())),
        "masters": storages([master.tensor for master in engine.state.masters]),
        "moments": storages([t for state in engine.state.optimizer.state.values() for t in state.values()
                           if isinstance(t, torch.Tensor)]),
        "teacher": storages([*engine.teacher.module.parameters(), *engine.teacher.averages.values()]),
    }  # fmt: skip
    return {**parts, "peak": min(peaks)}


def storages(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
