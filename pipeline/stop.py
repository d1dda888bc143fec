"""Preemption: SIGTERM and SIGUSR1 set a flag; the loop finishes its step, saves, and ends with `exit_codes.REQUEUE`.

No torch at import: the flag is set up first of all, so that a signal during the slow imports is not lost.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from cluster.lease import Lease

FENCED = 1 << 10  # above every signal's number
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by a signal on any rank, agreed on by all: signals reach ranks in different steps."""

    def __init__(self) -> None:
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self, device: Any, lease: Lease | None = None) -> bool:
        """Whether any rank has been told to stop; collective, once per step.

        lease: the run directory's. Raises FencedTogether on every rank when one has noticed that a later start holds it.
        """
        from pipeline.health import FencedTogether
        from pipeline.parallel.processes import agree_max

        fenced = lease is not None and lease.is_lost
        answer = agree_max(float(FENCED if fenced else self.signal), device)
        if answer >= FENCED:
            raise FencedTogether(lease.why() if lease is not None else "a later start of this run has taken over")
        return answer > 0
