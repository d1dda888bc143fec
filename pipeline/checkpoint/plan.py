"""Which bytes of a checkpoint a rank reads: pure functions of what was saved and what is needed. No torch.

A saved piece is (start, count, file) in the flattened logical parameter; a need is (name, start, size). A rank asks one
request per run of neighbouring bytes in a file, or one for all of a file of which it needs most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

Span = tuple[int, int, str]  # start, count, file
Need = tuple[str, int, int]  # name, start, size
Part = tuple[str, int, int, int]  # name, start of the saved piece, elements [a, b) of it

WHOLE_SHARE = 0.5  # of a file's bytes: from here on the rest is read too, in one request and checked by one digest
GAP_BYTES = 1 << 20  # neighbours no further apart are read in one request


def overlapping(spans: Sequence[Span], start: int, size: int) -> list[Span]:
    """The pieces (ascending, gapless) that hold elements [start, start + size)."""
    index = bisect_right(spans, start, key=lambda span: span[0]) - 1
    found = []
    while index < len(spans) and spans[index][0] < start + size:
        found.append(spans[index])
        index += 1
    return found


def reads(spans: Mapping[str, Sequence[Span]], needs: Iterable[Need]) -> dict[str, list[Part]]:
    """Per file the parts of saved pieces that hold what is needed. spans: the pieces of each logical parameter."""
    found: dict[str, list[Part]] = {}
    for name, start, size in needs:
        for first, count, file in overlapping(spans[name], start, size):
            a, b = max(start - first, 0), min(start + size - first, count)
            if a < b:
                found.setdefault(file, []).append((name, first, a, b))
    return found


def runs(wanted: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Byte ranges joined where no more than `gap` lies between them: ascending, disjoint."""
    joined: list[tuple[int, int]] = []
    for a, b in sorted(wanted):
        if joined and a <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], b))
        elif b > a:
            joined.append((a, b))
    return joined
