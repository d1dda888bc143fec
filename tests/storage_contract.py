"""What every file system behind `cluster.storage` must do. `test_storage` runs it on local files and in memory, and
`test_storage_s3` on a real S3 server: each function takes an empty folder URL."""

from __future__ import annotations

import pytest

from cluster import storage

BIG = 11 << 20
"""Above one multipart part of s3fs (5 MiB) and not a multiple of it."""


def written_whole_is_read_whole(url: str) -> None:
    for data in (b"", b"x", bytes(range(256)) * (BIG // 256)):
        storage.write_atomic(storage.join(url, "a"), data)
        assert storage.read_bytes(storage.join(url, "a")) == data
        assert storage.size(storage.join(url, "a")) == len(data)


def ranges_are_half_open(url: str) -> None:
    path = storage.join(url, "a")
    storage.write_atomic(path, bytes(range(100)))
    assert storage.read_bytes(path, 10, 20) == bytes(range(10, 20))
    assert storage.read_bytes(path, 95) == bytes(range(95, 100))
    with storage.open_read(path) as stream:
        stream.seek(50)
        assert stream.read(3) == bytes([50, 51, 52])


def absent_is_said(url: str) -> None:
    path = storage.join(url, "nothing")
    assert not storage.exists(path)
    assert storage.list_names(path) == []
    storage.remove(path)
    storage.remove(path, recursive=True)
    for look in (storage.size, storage.read_bytes):
        with pytest.raises(FileNotFoundError):
            look(path)


def a_failed_write_leaves_the_old(url: str) -> None:
    path = storage.join(url, "a")
    for old in (None, b"old"):
        if old is not None:
            storage.write_atomic(path, old)
        for size in (1, BIG):
            with pytest.raises(RuntimeError, match="half"):
                _write_half(path, size)
            assert storage.exists(path) == (old is not None)
            assert old is None or storage.read_bytes(path) == old
        assert storage.list_names(url) == ([] if old is None else ["a"])


def _write_half(path: str, size: int) -> None:
    with storage.open_atomic(path) as stream:
        stream.write(b"n" * size)
        raise RuntimeError("half written")


def nothing_shows_before_the_end(url: str) -> None:
    path = storage.join(url, "a")
    with storage.open_atomic(path) as stream:
        stream.write(b"n" * BIG)
        assert not storage.exists(path)
        assert storage.list_names(url) == []
    assert storage.size(path) == BIG


def names_are_listed_and_sorted(url: str) -> None:
    for name in ("b", "a", "folder/c", "with space", "ü"):
        storage.write_atomic(storage.join(url, name), b"1")
    assert storage.list_names(url) == sorted(["a", "b", "folder", "with space", "ü"])
    assert storage.list_names(storage.join(url, "folder")) == ["c"]
    storage.remove(storage.join(url, "folder"), recursive=True)
    storage.remove(storage.join(url, "b"))
    assert storage.list_names(storage.join(url, "folder")) == []
    # a store may show an emptied folder for a while (SeaweedFS does)
    assert [name for name in storage.list_names(url) if name != "folder"] == sorted(["a", "with space", "ü"])


def another_writer_is_seen(url: str) -> None:
    """No listing or size is remembered: what another process does shows at once."""
    from fsspec.core import url_to_fs

    path = storage.join(url, "a")
    assert not storage.exists(path)
    assert storage.list_names(url) == []
    fs, inside = url_to_fs(path, skip_instance_cache=True)
    if storage.is_local(url):
        fs.makedirs(inside.rpartition("/")[0], exist_ok=True)
    for data in (b"1", b"22"):
        fs.pipe_file(inside, data)
        assert storage.list_names(url) == ["a"]
        assert storage.size(path) == len(data)


def uploads_arrive(url: str, local: str) -> None:
    with open(local, "wb") as stream:
        stream.write(b"u" * BIG)
    storage.upload(local, storage.join(url, "deep/er/a"))
    assert storage.size(storage.join(url, "deep/er/a")) == BIG


def folders_may_be_made(url: str) -> None:
    storage.make_folder(storage.join(url, "x/y"))
    storage.make_folder(storage.join(url, "x/y"))
    storage.write_atomic(storage.join(url, "x/y/a"), b"1")
    assert storage.list_names(storage.join(url, "x/y")) == ["a"]


CONTRACT = [
    written_whole_is_read_whole, ranges_are_half_open, absent_is_said, a_failed_write_leaves_the_old,
    nothing_shows_before_the_end, names_are_listed_and_sorted, another_writer_is_seen, folders_may_be_made,
]  # fmt: skip
