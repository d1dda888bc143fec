"""Where columns lie: carried by their set and refused if they are not the manifest's, or shared between processes without trust."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import column_file, index
from data_prep.column_file import COLUMNS
from data_prep.repair import repair
from data_prep.shards import ShardSet
from data_prep.verify import verify
from model.config import ModelConfig
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader import shared
from pipeline.reader import table as tables
from pipeline.reader.buffers import tensors
from pipeline.reader.reader import Reader
from tests.sites import make_site, write_shard_set
from tests.unit.test_reader_table import ALL, bytes_of, changed, plain, samples, shards

__all__ = ["shards"]


@pytest.fixture
def sharing(monkeypatch, tmp_path):
    """Every set is shared, in a folder of this test."""
    monkeypatch.setattr(shared, "SHARED_FROM", 1)
    return tmp_path / "cache"


@pytest.fixture
def old(shards, tmp_path) -> Path:
    """The set as an older build left it: without columns."""
    return changed(shards, tmp_path / "old_build")


def shared_data(shards, sharing, **changes) -> DataConfig:
    return DataConfig(url=str(shards), cache_dir=str(sharing), **changes)


def entries(sharing: Path) -> list[Path]:
    return sorted(path for path in (sharing / "index").iterdir() if path.is_dir())


def is_mapped(table: tables.Table) -> bool:
    base = table.columns["s2.clear"]
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, (mmap.mmap, memoryview)) and "mmap" in repr(getattr(base, "obj", base))


def test_the_carried_columns_are_those_of_the_index_and_mapped(shards, old, sharing):
    for changes in ({}, {"split": ""}, {"max_cloud": 0.1, "split": ""}):
        mine, made = (tables.load(shared_data(url, sharing, **changes), ALL) for url in (shards, old))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared, "SHARED_FROM", 10**9)
            alone = tables.load(shared_data(old, sharing, **changes), ALL)
        assert samples(mine) == samples(made) == samples(alone) == plain(shards, DataConfig(url=str(shards), **changes))
        assert bytes_of(mine) == bytes_of(made) == bytes_of(alone)
        assert mine.fingerprints == made.fingerprints == alone.fingerprints
        assert is_mapped(mine)
        assert is_mapped(made)
        assert not is_mapped(alone)
        assert not mine.columns["s2.clear"].flags.writeable
    assert len(entries(sharing)) == 1  # the old one's, whatever the filters


def test_stock_safetensors_reads_the_columns(shards):
    from safetensors.numpy import load_file

    ours = tables.load(DataConfig(url=str(shards)), ALL).columns
    theirs = load_file(shards / COLUMNS)
    assert theirs.keys() == ours.keys()
    for name, column in ours.items():
        np.testing.assert_array_equal(theirs[name], column)
        assert column.ctypes.data % column.dtype.itemsize == 0, name


def test_object_storage_is_fetched_once_per_node(shards, sharing, monkeypatch):
    url = "memory://carried/set"
    for path in shards.iterdir():
        if path.is_file():
            storage.write_atomic(f"{url}/{path.name}", path.read_bytes())
    opened, open_read = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda place: opened.append(place) or open_read(place))
    right = samples(tables.load(DataConfig(url=str(shards)), ALL))
    for _ in range(3):
        table = tables.load(shared_data(url, sharing), ALL)
        assert samples(table) == right
        assert is_mapped(table)
    assert opened == [f"{url}/{COLUMNS}"]
    monkeypatch.setattr(shared, "SHARED_FROM", 10**9)
    assert samples(tables.load(shared_data(url, sharing), ALL)) == right


def test_several_sets_are_joined_once_per_node(shards, old, sharing):
    data = DataConfig(url=(str(shards), str(old)), cache_dir=str(sharing))
    table = tables.load(data, ALL)
    assert is_mapped(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "SHARED_FROM", 10**9)
        alone = tables.load(data, ALL)
    assert bytes_of(table) == bytes_of(alone)
    assert samples(table) == samples(alone) == plain(shards, DataConfig(url=str(shards))) * 2


def own_reader(folder: Path, threads: int) -> Reader:
    """Small views over a copy of the set, batches of two."""
    views = {"views_global": ViewConfig(16, 8, 2, 1), "views_local": ViewConfig(8, 4, 1, 1)}
    return Reader(DataConfig(url=str(folder), threads=threads, **views), ModelConfig(), seed=1, batch_per_rank=2)


@pytest.fixture
def running(shards, sharing, tmp_path) -> Path:
    """A copy of the set whose columns a reader maps; they are older than anything that is written later."""
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    os.utime(folder / COLUMNS, (0, 0))
    return folder


@pytest.mark.parametrize(("harm", "threads"), [("zeros", 0), ("zeros", 2), ("cut", 0), ("empty", 0)])
def test_columns_that_are_written_over_under_a_reader_end_it_by_name(running, harm, threads):
    """Finding: mapped bytes change under the reader: other pixels, IndexError, or the end of the process where the file got shorter."""
    with own_reader(running, threads) as reader:
        next(reader)
        {"zeros": zeros, "cut": cut, "empty": empty}[harm](running / COLUMNS)
        with pytest.raises(RunFailure, match=f"{running / COLUMNS} was written over where it lies"):
            next(reader)


def test_columns_that_are_replaced_beside_a_reader_do_not_disturb_it(running):
    with own_reader(running, 2) as reader, own_reader(running, 0) as undisturbed:
        assert reader.table.columns.keys() == undisturbed.table.columns.keys()
        for step in range(8):
            mine, right = next(reader), next(undisturbed)
            assert mine.keys == right.keys
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors(mine), tensors(right)))
            if step == 2:
                (running / "other").write_bytes(bytes((running / COLUMNS).stat().st_size))
                os.replace(running / "other", running / COLUMNS)


def test_columns_of_a_small_set_are_nobody_elses(shards, sharing, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "SHARED_FROM", 10**9)
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    table = tables.load(shared_data(folder, sharing), ALL)
    assert not is_mapped(table)
    cut(folder / COLUMNS)
    table.check()
    assert samples(table) == plain(shards, DataConfig(url=str(shards)))


def _digest(url: str, cache: str, start, out) -> None:
    shared.SHARED_FROM = 1
    start.wait()
    table = tables.load(DataConfig(url=url, cache_dir=cache), ALL)
    text = b"".join(name.encode() + data for name, (_, data) in sorted(bytes_of(table).items()))
    out.put((hashlib.sha256(text).hexdigest(), is_mapped(table)))


@pytest.mark.parametrize("locks", [True, False])
def test_builders_at_the_same_time(old, sharing, locks, monkeypatch):
    if not locks:  # a file system without them

        def refuse(*_):
            raise OSError("no locks here")

        monkeypatch.setattr(shared.fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    start, out = context.Barrier(3), context.Queue()
    started = [context.Process(target=_digest, args=(str(old), str(sharing), start, out)) for _ in range(3)]
    for process in started:
        process.start()
    found = {out.get(timeout=60) for _ in started}
    for process in started:
        process.join(60)
    assert len(found) == 1
    assert found.pop()[1]
    (entry,) = entries(sharing)  # and no temporary folder
    assert not entry.name.endswith(".tmp")


def _killed(url: str, cache: str) -> None:
    shared.SHARED_FROM, number = 1, itertools.count()
    append = column_file.Spool.append

    def dying(self, name, values):
        append(self, name, values)
        if next(number) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    column_file.Spool.append = dying
    tables.load(DataConfig(url=url, cache_dir=cache), ALL)


def test_a_killed_builder_leaves_nothing_that_is_believed_and_no_lock(old, sharing):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(str(old), str(sharing)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = entries(sharing)
    assert left.name.endswith(".tmp")
    data = shared_data(old, sharing)
    assert samples(tables.load(data, ALL)) == plain(old, data)
    assert len([entry for entry in entries(sharing) if not entry.name.endswith(".tmp")]) == 1


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps([object()]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [COLUMNS, "facts.json"])
@pytest.mark.parametrize("harm", [cut, zeros, flip, flip_header, pickled, empty, Path.unlink])
def test_a_torn_entry_is_made_again(old, sharing, name, harm):
    data = shared_data(old, sharing)
    right = bytes_of(tables.load(data, ALL))
    (entry,) = entries(sharing)
    held = (entry / name).read_bytes()
    harm(entry / name)
    table = tables.load(data, ALL)
    assert bytes_of(table) == right
    assert is_mapped(table)
    assert entries(sharing) == [entry]
    assert (entry / name).read_bytes() == held


@pytest.mark.parametrize("harm", [cut, zeros, flip, flip_header, pickled, empty, Path.unlink])
@pytest.mark.parametrize("where", ["local", "small", "fetched"])
def test_wrong_carried_columns_are_refused_by_name(shards, sharing, tmp_path, monkeypatch, harm, where):
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    harm(folder / COLUMNS)
    url = str(folder)
    if where != "local":
        url = f"memory://wrong-{where}-{harm.__name__}"
        for path in folder.iterdir():
            if path.is_file():
                storage.write_atomic(f"{url}/{path.name}", path.read_bytes())
        monkeypatch.setattr(shared, "SHARED_FROM", 1 if where == "fetched" else 10**9)
    with pytest.raises(UsageError, match=f"{url}/{COLUMNS} is not the index that the manifest lists.*verify.*--repair"):
        tables.load(shared_data(url, sharing), ALL)
    if where == "fetched":
        assert entries(sharing) == []
    assert any(fault.file == COLUMNS for fault in verify(str(folder)))


def test_stale_columns_are_refused_and_mended(shards, tmp_path):
    """The columns of an earlier state of the set, whole in themselves: as a merge leaves them that is killed half-way."""
    folder, other = tmp_path / "set", tmp_path / "other"
    shutil.copytree(shards, folder)
    write_shard_set(str(other), [make_site(f"other_{i}", 50 + i, dates=4, side_px=8, hr_px=16) for i in range(12)])
    shutil.copy(other / COLUMNS, folder)
    with pytest.raises(UsageError, match=r"another state of the set|bytes instead of"):
        tables.load(DataConfig(url=str(folder)), ALL)
    repair(str(folder), lambda _: None)
    assert (folder / COLUMNS).read_bytes() == (shards / COLUMNS).read_bytes()
    assert verify(str(folder)) == []


def test_an_index_that_is_not_the_manifests_is_not_read(shards, old):
    """Finding: a wrong index.parquet was trusted, and cached under the right name."""
    path = old / "index.parquet"
    table = index.read_parquet(path.read_bytes())
    pq.write_table(table.slice(1), path)
    for load in (
        lambda: tables.load(DataConfig(url=str(old)), ALL),
        lambda: ShardSet.open(str(old)).read_index(["key"]),
    ):
        with pytest.raises(UsageError, match=r"index\.parquet cannot be read.*sha256 is not that of manifest\.json"):
            load()


def test_columns_of_another_version_are_made_again(shards, sharing, monkeypatch):
    right = samples(tables.load(DataConfig(url=str(shards)), ALL))
    monkeypatch.setattr(column_file.columns, "FORMAT", 2)
    assert samples(tables.load(shared_data(shards, sharing), ALL)) == right
    assert len(entries(sharing)) == 1


def test_an_entry_of_another_set_is_not_believed(shards, old, sharing, tmp_path):
    data = shared_data(old, sharing)
    right = bytes_of(tables.load(data, ALL))
    (mine,) = entries(sharing)
    tables.load(shared_data(changed(shards, tmp_path / "less", lambda rows: rows[:-1]), sharing), ALL)
    foreign = next(path for path in entries(sharing) if path != mine)
    shutil.rmtree(mine)
    shutil.copytree(foreign, mine)
    assert bytes_of(tables.load(data, ALL)) == right


def test_without_a_usable_folder_each_process_holds_its_own(old, sharing, monkeypatch, tmp_path, caplog):
    right = bytes_of(tables.load(shared_data(old, sharing), ALL))
    (tmp_path / "file").write_text("in the way")
    for cache in (str(tmp_path / "file"), None):
        monkeypatch.setattr(shared.tempfile, "gettempdir", lambda: str(tmp_path))
        own = tmp_path / f"geoloom-{os.getuid()}"
        own.mkdir(exist_ok=True)
        own.chmod(0o777)  # anybody could have put files there
        caplog.clear()
        table = tables.load(DataConfig(url=str(old), cache_dir=cache), ALL)
        assert bytes_of(table) == right
        assert not is_mapped(table)
        assert "holds its own copy of the index" in caplog.text
    own.chmod(0o700)
    assert is_mapped(tables.load(DataConfig(url=str(old)), ALL))


def test_what_nobody_uses_is_removed_and_what_failed_leaves_nothing(shards, old, sharing, tmp_path):
    tables.load(shared_data(old, sharing), ALL)
    (entry,) = entries(sharing)
    left = entry.with_name("abc.0123.tmp")
    left.mkdir()
    for path in (entry, left):
        os.utime(path, (0, 0))
    tables.load(shared_data(changed(shards, tmp_path / "less", lambda rows: rows[:-1]), sharing), ALL)
    assert entry not in entries(sharing)
    assert left not in entries(sharing)
    torn = changed(shards, tmp_path / "torn", lambda rows: rows[::-1])
    with pytest.raises(UsageError, match="not in order"):
        tables.load(shared_data(torn, sharing), ALL)
    assert len(entries(sharing)) == 1


@pytest.mark.parametrize("shared_from", [1, 10**9], ids=["mapped", "alone"])
def test_samples_with_contradicted_dates_can_be_left_out(tmp_path, sharing, monkeypatch, shared_from):
    monkeypatch.setattr(shared, "SHARED_FROM", shared_from)
    sites = [make_site(f"site_{i}", i, place=(1000.0 * i, 0.0)) for i in range(4)]
    sites[2].series["s2"].decisions[1]["flags"] = ["offset contradicted"]
    write_shard_set(str(tmp_path / "set"), sites)
    for unflagged, kept in ((False, [0, 1, 2, 3]), (True, [0, 1, 3])):
        table = tables.load(shared_data(tmp_path / "set", sharing, split="", unflagged=unflagged), ALL)
        assert [sample["key"] for sample in samples(table)] == [f"site_{i}" for i in kept]
