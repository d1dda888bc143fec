"""What went wrong while reading: transient faults are retried and counted, unreadable samples are quarantined by name.

Nothing is skipped silently: a quarantined sample keeps its place in its batch, all invalid, and counts against the error
budget; past the budget, and when storage stays unreachable, the run stops with the names.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from cluster.errors import RunFailure

T = TypeVar("T")
log = logging.getLogger(__name__)


class TransientFault(Exception):
    """An attempt failed in a way that may pass: 5xx, reset, timeout, cut body. kind: short name for the counters."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class BadSample(Exception):
    """One sample cannot be read, now or later: missing object, wrong checksum, bytes that do not decode."""


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """attempts after the first; waits grow from `base_s` by doubling up to `cap_s`, each drawn from [0, that] (full jitter,
    so that thousands of ranks do not come back at once)."""

    retries: int = 5
    base_s: float = 0.5
    cap_s: float = 20.0
    timeout_s: float = 30.0

    def wait_s(self, attempt: int) -> float:
        return random.uniform(0, min(self.cap_s, self.base_s * 2**attempt))


class FaultLog:
    """Counters and the quarantine list of one reader. Thread-safe.

    Args:
        budget: greatest number of distinct samples that may be quarantined.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.counts: collections.Counter[str] = collections.Counter()
        self.quarantined: dict[str, str] = {}
        self._lock = threading.Lock()

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def quarantine(self, key: str, why: str) -> None:
        """Lists a sample. Raises RunFailure, with the list, when that is more than the budget."""
        with self._lock:
            if key not in self.quarantined:
                log.warning("sample %s cannot be read and takes part as all invalid: %s", key, why)
            self.quarantined[key] = why
            over = len(self.quarantined) > self.budget
            listed = list(self.quarantined.items())
        if over:
            first = "; ".join(f"{name}: {reason}" for name, reason in listed[:10])
            more = f"; and {len(listed) - 10} more" if len(listed) > 10 else ""
            raise RunFailure(
                f"{len(listed)} unreadable samples are more than data.error_budget allows ({self.budget}): {first}{more}. "
                "Check the set with python -m data_prep verify, or raise data.error_budget"
            )

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def with_retries(
    attempt: Callable[[], T], what: str, policy: RetryPolicy, faults: FaultLog, stop: threading.Event
) -> T:
    """`attempt()` until it returns, at most 1 + retries times.

    Raises RunFailure naming `what` (object and range) when the last attempt failed too, or when `stop` was set meanwhile.
    """
    for number in range(policy.retries + 1):
        try:
            return attempt()
        except TransientFault as fault:
            faults.count(fault.kind)
            last = fault
        if number < policy.retries and stop.wait(policy.wait_s(number)):
            raise RunFailure(f"reading {what} was interrupted")
    raise RunFailure(
        f"reading {what} failed {policy.retries + 1} times, last: {last}. Check storage, then resume the run"
    )


def deadline(policy: RetryPolicy, num_bytes: int) -> float:
    """When a request of so many bytes has to be done (monotonic clock): the timeout, plus time at 1 MiB/s."""
    return time.monotonic() + policy.timeout_s + num_bytes / (1 << 20)
