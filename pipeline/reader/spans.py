"""Where samples lie, for the fetchers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where each sample lies: bytes [start, stop) of the shard `urls[shard]`. Read one by one: lists or memoryviews."""

    urls: list[str]
    shard: Sequence[int]
    start: Sequence[int]
    stop: Sequence[int]


class SpanParts:
    """A sample whose whole span is in memory; `start` is the offset of its first byte in the shard."""

    def __init__(self, span: memoryview, start: int) -> None:
        self._span, self._start = span, start

    def part(self, offset: int, length: int, slot: int) -> memoryview:
        return self._span[offset - self._start : offset - self._start + length]
