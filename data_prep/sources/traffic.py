"""What reading sources asks of the network in this process: requests, bytes, seconds. Counted only after `start`, for `build --dry-run`.

GDAL counts its own (`CPL_VSIL_NETWORK_STATS_ENABLED`); what goes through fsspec is counted where it is asked. What opening a file and judging
its pixels takes, once per process, is kept apart from what every site takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

JUDGED = " judged"


@dataclass
class Cost:
    """count: of files opened, or of reads."""

    count: int = 0
    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, requests: int, size: int, seconds: float = 0.0, count: int = 0) -> None:
        self.count += count
        self.requests += requests
        self.bytes += size
        self.seconds += seconds


class Traffic:
    """opened: by modality, what opening its files took, and (under the name with JUDGED) looking at their pixels; rest: everything else.

    files: by modality, how a file lies on disk: (rows, columns of a block, bytes of a pixel of the blocks that are fetched together).
    """

    def __init__(self) -> None:
        self.counting = False
        self.opened: dict[str, Cost] = {}
        self.rest = Cost()
        self.files: dict[str, tuple[int, int, int]] = {}
        self._own = Cost()
        self._stack: list[str] = []
        self._gdal: Any = None

    def start(self) -> None:
        """Begins to count. GDAL must not have made a request in this process yet: it looks at its switch once."""
        os.environ["CPL_VSIL_NETWORK_STATS_ENABLED"] = "YES"
        self.counting, self._gdal = True, _gdal_library()
        self._settle(self.rest)
        self.rest = Cost()

    def stop(self) -> None:
        """Ends counting, after putting what is not counted yet to `rest`."""
        self._settle(self.rest)
        self.counting = False

    def ask(self, size: int, requests: int = 1) -> None:
        """Notes requests that did not go through GDAL."""
        if self.counting:
            self._own.add(requests, size)

    @contextlib.contextmanager
    def opening(self, modality: str, count: int = 0) -> Iterator[None]:
        """What is asked for inside is asked once per process and file. count: files that are opened in it."""
        if not self.counting or self._stack:
            if self.counting and count:
                self.opened.setdefault(modality, Cost()).count += count
            yield
            return
        self._settle(self.rest)
        self._stack.append(modality)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stack.pop()
            cost = self.opened.setdefault(modality, Cost())
            self._settle(cost)
            cost.add(0, 0, time.perf_counter() - began, count)

    def saw(self, modality: str, block: tuple[int, int], pixel_bytes: int) -> None:
        """Notes how a file of a modality lies on disk."""
        if self.counting:
            self.files.setdefault(modality, (*block, pixel_bytes))

    def _settle(self, cost: Cost) -> None:
        requests, size = _taken(self._gdal)
        cost.add(requests + self._own.requests, size + self._own.bytes)
        self._own = Cost()


TRAFFIC = Traffic()


def _gdal_library() -> Any:
    """GDAL as rasterio has loaded it; None where its C functions cannot be reached."""
    import rasterio  # noqa: F401  (loads it)

    with open("/proc/self/maps") as maps:
        paths = [line.split()[-1] for line in maps if "libgdal" in line.rsplit("/", 1)[-1]]
    for path in dict.fromkeys(paths):
        library = ctypes.CDLL(path)
        if hasattr(library, "VSINetworkStatsGetAsSerializedJSON"):
            library.VSINetworkStatsGetAsSerializedJSON.restype = ctypes.c_void_p
            library.VSINetworkStatsGetAsSerializedJSON.argtypes = [ctypes.c_void_p]
            library.VSIFree.argtypes = [ctypes.c_void_p]
            return library
    return None


def _taken(library: Any) -> tuple[int, int]:
    """(requests, bytes) since the last call, over all methods."""
    if library is None:
        return 0, 0
    pointer = library.VSINetworkStatsGetAsSerializedJSON(None)
    found = json.loads(ctypes.string_at(pointer) or b"{}") if pointer else {}
    library.VSIFree(pointer)
    library.VSINetworkStatsReset()
    methods = found.get("methods", {}).values()
    return sum(its.get("count", 0) for its in methods), sum(its.get("downloaded_bytes", 0) for its in methods)
