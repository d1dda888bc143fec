"""What a run says about itself: metrics.jsonl, the tracker, and the live line; throughput, waiting, MFU, cost and time left."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import Fenced
from cluster.progress import Progress
from cluster.rundir import RunDir
from pipeline.engine import StepResult
from pipeline.parallel.layout import Layout
from pipeline.parallel.processes import agree_max
from pipeline.tracking.experts import FAIR_SHARE, TAG, WINDOW, ExpertWatch
from pipeline.tracking.system import SystemSampler

log = logging.getLogger(__name__)

# Dense bf16 peak, FLOP/s, by a part of the device's name (vendors' data sheets); others are measured.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
}


class StepLog:
    """Counts time and samples on every rank; writes on the first. Figures of a step are the step's own, rates the window's.

    Args:
        flops_per_sample: forward + backward FLOPs of one sample that has everything, teacher included (0: unknown, no MFU); MFU counts
            the share of it that this step's samples really asked for.
        device_hours: spent before this start of the run.
    """

    def __init__(
        self, rundir: RunDir, tracker: Any, layout: Layout, device: torch.device, flops_per_sample: float,
        start: int, steps: int, device_hours: float,
    ) -> None:  # fmt: skip
        self.rundir, self.tracker, self.layout, self.device = rundir, tracker, layout, device
        self.flops_per_sample = flops_per_sample
        self.peak = peak_flops(device, layout.precision) if flops_per_sample else 0.0
        self._hours_before, self._start = device_hours, time.monotonic()
        self._window = (self._start, 0.0, 0)  # since when, seconds waited for data, samples
        self._bar = Progress(steps - start, "train") if layout.rank == 0 else None
        self._steps_left = steps - start
        self._system = SystemSampler()
        self._bad: dict[str, dict[str, Any]] = {}  # quarantined on any rank, by key
        self._told = 0  # of this rank's own
        self._experts = ExpertWatch(rundir.read_metrics()[-WINDOW:] if start and layout.rank == 0 else ())

    @property
    def device_hours(self) -> float:
        """Hours of all ranks together, earlier starts of the run included."""
        return self._hours_before + self.layout.world * (time.monotonic() - self._start) / 3600

    def count(self, waited_s: float, result: StepResult) -> None:
        """Notes one finished step."""
        since, waited, samples = self._window
        self._window = (since, waited + waited_s, samples + self.layout.batch)
        self._steps_left -= 1
        if self._bar is not None:
            self._bar.advance(1, f"loss {result.loss:.4f}  |g| {result.grad_norm:.2f}")

    def write(
        self,
        step: int,
        samples: int,
        result: StepResult,
        more: Mapping[str, float],
        quarantined: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """One line for this step, and a new window. Collective (the slowest reader's waiting time counts).

        quarantined: this rank's unreadable samples, key → why. The first rank counts and names those of all ranks.
        """
        now = time.monotonic()
        since, waited, seen = self._window
        window_s = max(now - since, 1e-9)
        waited = agree_max(waited, self.device)
        self._window = (now, 0.0, 0)
        self._gather_quarantined(step, quarantined)
        if self.layout.rank != 0:
            return
        rate = seen / window_s
        figures: dict[str, Any] = {
            "step": step, "samples": samples, "loss": result.loss, **dict(sorted(result.metrics.items())), "lr": result.lr,
            "grad_norm": result.grad_norm, "samples_per_s": rate, "data_wait": waited / window_s,
            "time": time.time(), "gpu_hours": self.device_hours, "eta_s": self._steps_left * self.layout.batch / rate if rate else 0.0, **self._system.sample(), **more,
            **({"data/quarantined": float(len(self._bad))} if self._bad else {}),
        }  # fmt: skip
        if self.peak:
            useful = self.flops_per_sample * result.metrics.get("work/share", 1.0)
            figures["mfu"] = rate * useful / (self.peak * self.layout.world)
        self._watch_experts(step, figures)
        with contextlib.suppress(Fenced):  # the lease remembers; all ranks end together, after the step
            self.tracker.log(step, samples, self.rundir.append_metrics(figures))

    def _gather_quarantined(self, step: int, own: Mapping[str, str]) -> None:
        """All ranks, when one of them has more than before: `artifacts/quarantine.json` then names every sample, rank and reason."""
        news = agree_max(float(len(own) - self._told), self.device)
        if news <= 0:
            return
        self._told = len(own)
        gathered: list[Any] = [dict(own)]
        if self.layout.world > 1:
            gathered = [None] * self.layout.world
            dist.all_gather_object(gathered, dict(own))
        for rank, found in enumerate(gathered):
            for key, why in found.items():
                self._bad.setdefault(key, {"why": why, "rank": rank, "step": step})
        if self.layout.rank == 0:
            with contextlib.suppress(Fenced):
                self.rundir.write("artifacts/quarantine.json", json.dumps(self._bad, indent=1, sort_keys=True).encode())
                self.tracker.tag(
                    "alarm.quarantined", f"{len(self._bad)} samples by step {step}, named in quarantine.json"
                )

    def _watch_experts(self, step: int, figures: dict[str, Any]) -> None:
        """First rank: one warning when experts die, a metric of how many are dead, and a tag that names them."""
        before = self._experts.dead
        died = self._experts.look(figures)
        dead = self._experts.dead
        if self._experts.is_sure:
            figures["moe/dead_experts_lasting"] = len(dead)
        if died:
            log.warning(
                "step %d: dead experts, under %g of a fair share in the last %d logged steps: %s; a larger "
                "model.moe.balance_weight or a smaller optimizer.lr may bring them back",
                step, FAIR_SHARE, WINDOW, "; ".join(map(str, died)),
            )  # fmt: skip
        if dead != before:
            self.tracker.tag(TAG, "; ".join(map(str, dead)) or f"none since step {step}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            with contextlib.suppress(Fenced):
                self.rundir.close()


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s one rank's device can do at best: a data-sheet figure for known GPUs, else a measured matrix product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_BF16.items():
            if part in name.split() or part in name.replace("-", " ").split():
                return peak if dtype is torch.bfloat16 else peak / 2
    size, best = 768, 0.0
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
