"""Job that runs inside ranks: what a rank's host memory rises to while its networks and engine are made, and what it keeps of it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from cluster.config import load
from cluster.ranks import Ranks
from model.losses.reduce import DistributedReduce
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.first_weights import first_networks
from pipeline.parallel.layout import Layout
from tests.footprint import storages
from tests.synthetic_batch import STATISTICS


def measure(cases: list[list[str]]) -> list[dict[str, int]]:
    """Per list of overrides, bytes: `risen`, the most that the process took beyond what it had before; `kept`, of weights,
    masters, moments, averages and buffers. What a process takes once (code, tables of libraries) a first, tiny start has taken."""
    found = []
    for overrides in [[*cases[0], *TINY], *cases]:
        before = _settle()
        config, ranks = load(PretrainConfig, None, overrides), Ranks.from_environment()
        layout, device = Layout.of(config, ranks), torch.device("cpu")
        engine = Engine(
            *first_networks(config, layout, STATISTICS, None, device), config, layout, device, DistributedReduce()
        )
        risen = _status("VmHWM") - before
        moments = [t for state in engine.state.optimizer.state.values() for t in state.values()]
        both = [
            t
            for network in (engine.student, engine.teacher.module)
            for t in (*network.parameters(), *network.buffers())
        ]
        kept = storages([*both, *moments, *(m.tensor for m in engine.state.masters), *engine.teacher.averages.values()])
        found.append({"risen": risen, "kept": kept})
        engine.deepspeed.destroy()
        del engine, moments, both
    return found[1:]


TINY = ["objective.prototypes=64", "objective.head_hidden=16"]


def _settle() -> int:
    """Resident bytes once all that is free has been given back to the system; the high-water mark starts from there."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return _status("VmRSS")


def _status(key: str) -> int:
    line: Any = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
