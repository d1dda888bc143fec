"""Preemption: SIGTERM and SIGUSR1 set a flag; the loop finishes its step, saves, and ends with `exit_codes.REQUEUE`.

No torch at import: the flag is set up first of all, so that a signal during the slow imports is not lost.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by a signal on any rank, agreed on by all: signals reach ranks in different steps."""

    def __init__(self) -> None:
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self, device: Any) -> bool:
        """Whether any rank has been told to stop; collective, once per step."""
        from pipeline.parallel.processes import agree_max

        return agree_max(float(self.signal), device) > 0
