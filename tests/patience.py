"""How much longer everything takes on a machine that has more to do than it has cores."""

from __future__ import annotations

import os


def patience() -> float:
    """Factor for a limit that means "this hangs": load per core, from 1 to 6. A limit that is a promise to a user is not scaled."""
    return min(max(os.getloadavg()[0] / len(os.sched_getaffinity(0)), 1.0), 6.0)
