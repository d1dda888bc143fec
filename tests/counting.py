"""A storage that counts: `count://…` is fsspec's memory file system, and every request to it is noted under the current rank."""

from __future__ import annotations

import collections
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CountingFileSystem(MemoryFileSystem):
    """Set `rank` to say on whose behalf the next requests are made. requests: (rank, kind) → count."""

    protocol = ("count", "memory")
    store: dict[str, Any] = {}  # noqa: RUF012  (shared by all instances, as the class it comes from has it)
    pseudo_dirs = [""]  # noqa: RUF012
    rank = 0
    requests: ClassVar[collections.Counter[tuple[int, str]]] = collections.Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("count://", "memory://", 1))

    @classmethod
    def note(cls, kind: str) -> None:
        cls.requests[cls.rank, kind] += 1

    @classmethod
    def take(cls) -> collections.Counter[tuple[int, str]]:
        """The requests since the last call."""
        found, cls.requests = cls.requests, collections.Counter()
        return found

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.note("get")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self.note("put")
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode == "rb":
            self.note("get")
        return super().open(path, mode, *args, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self.note("list")
        return super().ls(path, detail=detail, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        before = self.requests.copy()
        found = super().find(path, *args, **kwargs)
        type(self).requests = before  # a flat listing of an object store walks no folders
        self.note("list")
        return found

    def exists(self, path: str, **kwargs: Any) -> bool:
        self.note("head")
        return super().exists(path, **kwargs)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        before = self.requests.copy()
        super().rm(path, recursive=recursive, maxdepth=maxdepth)
        type(self).requests = before
        self.note("delete")


fsspec.register_implementation("count", CountingFileSystem, clobber=True)
