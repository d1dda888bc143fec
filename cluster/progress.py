"""Progress with ETA for long work: a live bar on a terminal, one line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts `total` units of `label`; call `advance(n, note)` as work completes. Writes to stderr."""

    def __init__(self, total: int, label: str, every_s: float = 10.0) -> None:
        self.total, self.label, self.every_s = total, label, every_s
        self.done, self.start, self._last = 0, time.monotonic(), 0.0
        self._live = sys.stderr.isatty()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self._last < (0.1 if self._live else self.every_s) and self.done < self.total:
            return
        self._last = now
        print(self._line(now, note), end="" if self._live else "\n", file=sys.stderr, flush=True)

    def _line(self, now: float, note: str) -> str:
        elapsed = now - self.start
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        share = self.done / self.total if self.total else 1.0
        text = (
            f"{self.label} {self.done}/{self.total} {share:4.0%}  {clock(elapsed)} elapsed, {clock(left)} left  {note}"
        )
        if not self._live:
            return text
        bar = "█" * int(24 * share)
        return f"\r\x1b[2K{bar:░<24} {text}"

    def close(self) -> None:
        if self._live:
            print(file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """`with progress(n, "sites") as bar: … bar.advance()`."""
    bar = Progress(total, label)
    try:
        yield bar
    finally:
        bar.close()


def clock(seconds: float) -> str:
    """3725.2 → `1:02:05`; 65 → `1:05`."""
    seconds = int(max(seconds, 0))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
