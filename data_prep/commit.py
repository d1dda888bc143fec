"""How a tar comes to stand under its name: written beside it, read back, put in place whole; what failing storage is called."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Iterator

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import parts
from data_prep.column_file import COLUMNS
from data_prep.shards import FAULTS, INDEX, LOSSES, MANIFEST
from data_prep.tar import extend_crc32c

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def temporary(url: str, name: str, scratch: str | None) -> Iterator[str]:
    """A local path for a tar in the making: beside its final place, or in scratch on its way to object storage."""
    if storage.is_local(url):
        folder = storage.local_path(url)
        os.makedirs(folder, exist_ok=True)
    else:
        folder = scratch or tempfile.gettempdir()
        os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def commit(local: str, url: str) -> None:
    """Makes a checked tar visible under its name, whole."""
    if not storage.is_local(url):
        storage.upload(local, url)
        if storage.size(url) != os.path.getsize(local):
            raise RunFailure(f"{url} has not the size that was sent; run the command again")
        return
    target = storage.local_path(url)
    with contextlib.suppress(FileNotFoundError):  # another builder of the same plan has swept: its tar is the same
        os.replace(local, target)
    if not os.path.exists(target):
        raise RunFailure(f"{target} could not be put in place; run the command again")
    storage.fsync_folder(os.path.dirname(target))


def check_written(path: str, crc32c: int) -> None:
    """Reads the finished file back, from the disk and not from the kernel's memory of it: what stands there is what was meant."""
    found, piece = 0, memoryview(bytearray(4 << 20))
    with open(path, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it was synced: nothing is lost
        while count := stream.readinto(piece):
            found = extend_crc32c(found, piece[:count])
    if found != crc32c:
        raise RunFailure(f"{path} reads back differently from what was written: check that disk")


def storage_failure(url: str, error: OSError) -> RunFailure | UsageError:
    if error.errno in FULL:
        return RunFailure(f"{url}: no space left; finished shards are kept: free space and run the same command again")
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | FileNotFoundError):
        return UsageError(f"{url} cannot be written: {error.strerror or error}")
    return RunFailure(f"{url}: {type(error).__name__}: {error}")


def sweep(url: str) -> None:
    """Removes temporary files that killed builders left. Every shard is finished, so none of a shard's can still be wanted;
    those of index, manifest and fault list may be another task's that merges at this moment."""
    if not storage.is_local(url):
        return
    folder = storage.local_path(url)
    for where in (folder, os.path.join(folder, parts.PARTS)):
        for entry in os.listdir(where):
            if entry.endswith(".tmp") and not entry.startswith((INDEX, MANIFEST, FAULTS, LOSSES, COLUMNS)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(where, entry))
