"""Where samples lie, for the fetchers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where each sample lies: bytes [start, stop) of the shard `urls[shard]`. Plain lists: they are read one by one."""

    urls: list[str]
    shard: list[int]
    start: list[int]
    stop: list[int]


class SpanParts:
    """A sample whose whole span is in memory; `start` is the offset of its first byte in the shard."""

    def __init__(self, span: memoryview, start: int) -> None:
        self._span, self._start = span, start

    def part(self, offset: int, length: int, slot: int) -> memoryview:
        return self._span[offset - self._start : offset - self._start + length]
