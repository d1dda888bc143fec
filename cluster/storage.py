"""The one door to storage: every path of ours is an fsspec URL (`/plain/path`, `file:///…`, `s3://…`, `memory://…`).

Credentials and endpoints come from the standard AWS variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …), never from a
config file. What is written becomes visible whole or not at all: local files by temporary name + fsync + rename, object
stores by their own atomic put (a multipart upload that is not completed shows nothing).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from cluster.errors import RunFailure, UsageError

PART_BYTES = 16 << 20
"""Part size of a multipart upload: several are in flight, and a lost one costs little."""

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
"""What `open_atomic` adds to a name while it writes; a killed writer may leave one, `list_names` does not show it."""


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it) of a URL. Raises UsageError for an unknown protocol."""
    # other processes write too: a listing kept from earlier would hide what they did
    options = {"use_listings_cache": False} if url.startswith(("s3://", "s3a://")) else {}
    try:
        return url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {error}") from None


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns an object store's own exceptions (no credentials, endpoint away) into one line that names the URL and the fix."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        text = " ".join(str(error).split())
        raise RunFailure(
            f"{url}: {text} (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say where and who)"
        ) from error


def is_local(url: str) -> bool:
    """Whether the URL lies on a mounted file system (and may be memory-mapped)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The plain path of a local URL."""
    return filesystem(url)[1]


def join(url: str, *parts: str) -> str:
    """Joins with `/`, whatever the protocol. Raises UsageError for a part that would lead out of `url`."""
    if any(".." in part and ".." in part.split("/") for part in parts):
        raise UsageError(f"{'/'.join(parts)} leads out of {url}: names inside a set or run hold no '..'")
    return "/".join([url.rstrip("/") if len(url) > 1 else url, *[part.strip("/") for part in parts]])


def name(url: str) -> str:
    """Last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    with explained(url):
        return bool(fs.exists(path))


def size(url: str) -> int:
    """Bytes of an object. Raises FileNotFoundError."""
    fs, path = filesystem(url)
    with explained(url):
        return int(fs.info(path)["size"])


def list_names(url: str) -> list[str]:
    """Sorted names directly under a folder; empty if there is no such folder."""
    fs, path = filesystem(url)
    folder = path.rstrip("/")
    with explained(url):
        try:
            entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
    # object stores may list the folder itself, by its marker
    names = {entry.rsplit("/", 1)[-1] for entry in entries if entry != folder}
    return sorted(name for name in names if not TEMPORARY.search(name))


def list_sizes(url: str) -> dict[str, int]:
    """Bytes of each object directly under a folder, in one listing; empty if there is no such folder."""
    fs, path = filesystem(url)
    with explained(url):
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    found = {name(entry["name"]): int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}
    return {own: size for own, size in sorted(found.items()) if not TEMPORARY.search(own)}


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Whole object, or the byte range [start, end)."""
    fs, path = filesystem(url)
    with explained(url):
        return fs.cat_file(path, start=start, end=end)


def open_read(url: str) -> IO[bytes]:
    fs, path = filesystem(url)
    with explained(url):
        return fs.open(path, "rb")


def make_folder(url: str) -> None:
    fs, path = filesystem(url)
    if "file" in fs.protocol or "memory" in fs.protocol:  # object stores have no folders
        fs.makedirs(path, exist_ok=True)


def remove(url: str, recursive: bool = False) -> None:
    """Removes an object or (recursive) a folder; absent is fine."""
    fs, path = filesystem(url)
    with explained(url), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=recursive)


def remove_all(urls: Sequence[str]) -> None:
    """Removes objects of one storage, in as few requests as it allows (S3: 1,000 in each); absent ones are fine."""
    if not urls:
        return
    fs, _ = filesystem(urls[0])
    paths = [filesystem(url)[1] for url in urls]
    with explained(urls[0]):
        try:
            fs.rm(paths)
        except FileNotFoundError:  # one of them went meanwhile: those left one by one
            for url in urls:
                remove(url)


def list_tree(url: str) -> list[str]:
    """Paths of all objects below a folder, relative to it, sorted, in one listing; empty if there is no such folder."""
    fs, path = filesystem(url)
    folder = path.rstrip("/")
    with explained(url):
        found = fs.find(folder)
    return sorted(entry[len(folder) + 1 :] for entry in found)


def write_atomic(url: str, data: bytes) -> None:
    """Writes an object so that readers see the old one or the new one, never a part."""
    with open_atomic(url) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """A stream whose content appears under `url` when the block ends well, and leaves nothing when it raises."""
    fs, path = filesystem(url)
    if "memory" in fs.protocol:  # it shows what is written so far: hand it the whole at the end
        buffer = io.BytesIO()
        yield buffer
        fs.pipe_file(path, buffer.getvalue())
        return
    if not is_local(url):
        with explained(url):
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
    fsync_folder(os.path.dirname(path) or ".")


def create(url: str, data: bytes) -> bool:
    """Writes an object only if there is none: of several callers exactly one gets True. Content appears whole."""
    fs, path = filesystem(url)
    if not is_local(url):
        try:
            with explained(url):
                fs.pipe_file(path, data, mode="create")  # S3: If-None-Match
        except OSError:
            # servers say "exists" in several ways (s3fs: FileExistsError, or errno 22 for a failed precondition)
            if not exists(url):
                raise
            return False
        return True
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)  # fails if it exists, and never shows a part
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    fsync_folder(os.path.dirname(path) or ".")
    return True


def version(url: str) -> str | None:
    """What changes whenever an object of an object store is replaced (its ETag); None if there is none."""
    fs, path = filesystem(url)
    with explained(url):
        try:
            return str(fs.info(path)["ETag"])
        except FileNotFoundError:
            return None


def replace(url: str, data: bytes, expected: str | None) -> bool:
    """Writes an object of an object store only if it still is the `version` given (None: only if there is none).

    Returns False, with nothing written, if somebody else has replaced or made it meanwhile. At most PART_BYTES.
    """
    if expected is None:
        return create(url, data)
    fs, path = filesystem(url)
    try:
        with explained(url):
            fs.pipe_file(path, data, IfMatch=expected)
    except OSError:
        if version(url) == expected:
            raise
        return False
    return True


def upload(local: str, url: str) -> None:
    """Copies a finished local file to `url`, atomically."""
    if is_local(url):
        with open(local, "rb") as source, open_atomic(url) as target:
            while block := source.read(8 << 20):
                target.write(block)
        return
    fs, path = filesystem(url)
    options = {"chunksize": PART_BYTES} if url.startswith(("s3://", "s3a://")) else {}
    with explained(url):
        fs.put_file(local, path, **options)


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Makes names that were just given in a local folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "create",
    "exists",
    "filesystem",
    "fsspec",
    "is_local",
    "join",
    "list_names",
    "list_sizes",
    "list_tree",
    "local_path",
    "make_folder",
    "name",
    "open_atomic",
    "open_read",
    "read_bytes",
    "remove",
    "remove_all",
    "replace",
    "size",
    "upload",
    "version",
    "write_atomic",
]  # fmt: skip
