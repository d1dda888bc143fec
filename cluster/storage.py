"""The one door to storage: every path of ours is an fsspec URL (`/plain/path`, `file:///…`, `s3://…`, `memory://…`).

Credentials and endpoints come from the standard AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …), never from a
config file. What is written becomes visible whole or not at all: local files by temporary name + fsync + rename, object
stores by their own atomic put (a multipart upload that is not completed shows nothing).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from cluster.errors import UsageError


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it) of a URL. Raises UsageError for an unknown protocol."""
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {error}") from None


def is_local(url: str) -> bool:
    """Whether the URL lies on a mounted file system (and may be memory-mapped)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The plain path of a local URL."""
    return filesystem(url)[1]


def join(url: str, *parts: str) -> str:
    """Joins with `/`, whatever the protocol."""
    return "/".join([url.rstrip("/") if len(url) > 1 else url, *[part.strip("/") for part in parts]])


def name(url: str) -> str:
    """Last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError."""
    fs, path = filesystem(url)
    return int(fs.info(path)["size"])


def list_names(url: str) -> list[str]:
    """Sorted names directly under a folder; empty if there is no such folder."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Whole object, or the byte range [start, end)."""
    fs, path = filesystem(url)
    return fs.cat_file(path, start=start, end=end)


def open_read(url: str) -> IO[bytes]:
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def make_folder(url: str) -> None:
    fs, path = filesystem(url)
    if fs.protocol == "file" or "file" in fs.protocol or "memory" in fs.protocol:
        fs.makedirs(path, exist_ok=True)


def remove(url: str, recursive: bool = False) -> None:
    """Removes an object or (recursive) a folder; absent is fine."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=recursive)


def write_atomic(url: str, data: bytes) -> None:
    """Writes an object so that readers see the old one or the new one, never a part."""
    with open_atomic(url) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """A stream whose content appears under `url` when the block ends well, and leaves nothing when it raises."""
    fs, path = filesystem(url)
    if not is_local(url):
        stream = fs.open(path, "wb")
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                stream.discard()  # fsspec: abort the multipart upload, show nothing
            stream.closed = True
            raise
        stream.close()
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync_folder(os.path.dirname(path) or ".")


def upload(local: str, url: str) -> None:
    """Copies a finished local file to `url`, atomically."""
    if is_local(url):
        with open(local, "rb") as source, open_atomic(url) as target:
            while block := source.read(8 << 20):
                target.write(block)
        return
    fs, path = filesystem(url)
    fs.put_file(local, path)


def _fsync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "exists", "filesystem", "fsspec", "is_local", "join", "list_names", "local_path", "make_folder", "name", "open_atomic",
    "open_read", "read_bytes", "remove", "size", "upload", "write_atomic",
]  # fmt: skip
