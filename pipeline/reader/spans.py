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

    def what(self, row: int) -> str:
        """Object and range in words, for errors."""
        return f"{self.urls[self.shard[row]]}, bytes {self.start[row]} to {self.stop[row]}"
