"""`run.profile`: torch's profiler over chosen steps, one trace per rank, for chrome://tracing and Perfetto."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from typing import Any

import torch

from cluster import storage
from cluster.errors import Fenced
from cluster.ranks import Ranks
from cluster.rundir import RunDir

log = logging.getLogger(__name__)


class Profile:
    """Steps `first` to `last` of a run, data waits, probes and checkpoints between them included. Without steps it does nothing."""

    def __init__(self, steps: tuple[int, int] | None, rundir: RunDir, ranks: Ranks) -> None:
        self._steps, self._rundir, self._ranks = steps, rundir, ranks
        self._running: Any = None

    def at(self, step: int) -> None:
        """Called as a step begins."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running is None and first <= step <= last:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = torch.profiler.profile(activities=kinds)
            self._running.start()
        elif self._running is not None and step > last:
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is under way, and writes it: `profile/steps-4-6-rank-00000.json`."""
        if self._running is None or self._steps is None:
            return
        running, self._running = self._running, None
        running.stop()
        name = f"profile/steps-{self._steps[0]}-{self._steps[1]}-rank-{self._ranks.rank:05d}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            running.export_chrome_trace(path)
            url = storage.join(self._rundir.url, name)
            with suppress(Fenced):
                self._rundir.check_claim()
                storage.upload(path, url)
        if self._ranks.is_first:
            log.info("profile of steps %d to %d: %s (one per rank)", *self._steps, url)
