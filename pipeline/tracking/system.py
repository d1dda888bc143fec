"""System metrics of one rank, cheap enough for every logged step; they stand in `metrics.jsonl` like all others."""

from __future__ import annotations

import sys
import time

import psutil


class SystemSampler:
    """Rates are averages since the previous `sample`. Units: %, GB (1e9 bytes), MB/s."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)
        self._network, self._time = psutil.net_io_counters(), time.monotonic()

    def sample(self) -> dict[str, float]:
        """`system/…`: CPU of the machine and of this process, memory, network; of the GPU its memory where there is one."""
        network, now = psutil.net_io_counters(), time.monotonic()
        seconds = max(now - self._time, 1e-3)
        memory = psutil.virtual_memory()
        figures = {
            "system/cpu_percent": psutil.cpu_percent(None), "system/process_cpu_percent": self._process.cpu_percent(None),
            "system/memory_gb": (memory.total - memory.available) / 1e9, "system/process_memory_gb": self._process.memory_info().rss / 1e9,
        }  # fmt: skip
        if network is not None and self._network is not None:
            figures["system/network_in_mb_s"] = (network.bytes_recv - self._network.bytes_recv) / 1e6 / seconds
            figures["system/network_out_mb_s"] = (network.bytes_sent - self._network.bytes_sent) / 1e6 / seconds
        self._network, self._time = network, now
        torch = sys.modules.get("torch")  # never imported for this
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            figures["system/gpu_memory_gb"] = (total - free) / 1e9
        return figures
