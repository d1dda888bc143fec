"""The parts under the fetchers: joining ranges, retrying, the disk cache, open files."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RunFailure
from pipeline.config import DataConfig
from pipeline.reader import cache as cache_module
from pipeline.reader import ranges
from pipeline.reader.cache import DiskCache
from pipeline.reader.faults import BadSample, FaultLog, RetryPolicy, TransientFault, with_retries
from pipeline.reader.fetch import OpenFiles, read_into
from pipeline.reader.read_ahead import GAP_BYTES, runs

SPANS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 60_000)), min_size=1, max_size=20)


@given(SPANS, st.integers(1, 400_000))
def test_ranges_cover_every_sample_and_keep_their_bound(spans, limit):
    shard = [s for s, _, _ in spans]
    start = [20_000 * place for _, place, _ in spans]
    stop = [first + length for first, (_, _, length) in zip(start, spans)]
    found = runs(shard, start, stop, limit)
    assert sorted(item for run in found for item in run.items) == list(range(len(spans)))
    for run in found:
        for item in run.items:
            assert shard[item] == run.shard
            assert run.start <= start[item] < stop[item] <= run.stop
        assert run.stop - run.start <= max(limit, max(stop[item] - start[item] for item in run.items))
        wanted = sum(stop[item] - start[item] for item in run.items)
        assert run.stop - run.start <= wanted + GAP_BYTES * (len(run.items) - 1)
    assert [min(run.items) for run in found] == sorted(min(run.items) for run in found)


def test_retries_are_counted_and_bounded():
    faults, policy, stop = FaultLog(0), RetryPolicy(retries=3, base_s=0.0), threading.Event()
    outcomes = iter([TransientFault("http_503", "busy"), TransientFault("reset", "gone"), None])

    def attempt() -> str:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return "bytes"

    assert with_retries(attempt, "x, bytes 1 to 2", policy, faults, stop) == "bytes"
    assert faults.counts == {"http_503": 1, "reset": 1}

    def never() -> None:
        raise TransientFault("reset", "gone for good")

    with pytest.raises(RunFailure, match=r"x, bytes 1 to 2 failed 4 times.*gone for good"):
        with_retries(never, "x, bytes 1 to 2", policy, faults, stop)
    assert faults.counts["reset"] == 5
    stop.set()
    with pytest.raises(RunFailure, match="interrupted"):
        with_retries(never, "x", policy, faults, stop)


@given(st.integers(0, 30))
def test_waits_grow_up_to_a_cap_and_are_jittered(attempt):
    policy = RetryPolicy(base_s=0.5, cap_s=8.0)
    most = min(8.0, 0.5 * 2**attempt)
    waits = [policy.wait_s(attempt) for _ in range(400)]
    assert all(0 <= wait <= most for wait in waits)
    # spread over the whole of [0, most], so that thousands of ranks do not come back together: each quarter has its share
    quarters = [sum(most * n / 4 <= wait < most * (n + 1) / 4 for wait in waits) for n in range(4)]
    assert min(quarters) > 40


def test_an_outage_of_a_minute_is_waited_out_by_default():
    data = DataConfig()
    policy = RetryPolicy(data.retries, timeout_s=data.timeout_s)
    assert sum(min(policy.cap_s, policy.base_s * 2**n) / 2 for n in range(policy.retries)) > 60


def test_the_budget_counts_distinct_samples():
    faults = FaultLog(2)
    for key in ("a", "b", "a"):
        faults.quarantine(key, "why")
    with pytest.raises(RunFailure, match=r"3 unreadable samples.*a: why; b: why; c: because"):
        faults.quarantine("c", "because")


def fill(cache: DiskCache, count: int, size: int, first: int = 0) -> list[Path]:
    paths = [cache.path("sha", n, n + size) for n in range(first, first + count)]
    for n, path in enumerate(paths):
        cache.put(path, memoryview(bytes([n % 256]) * size))
    return paths


def test_the_cache_keeps_what_was_used_last(tmp_path):

    cache = DiskCache(str(tmp_path), 100_000, FaultLog(0))
    paths = fill(cache, 70, 1000)
    for n, path in enumerate(paths):
        os.utime(path, (n, n))
    view = memoryview(bytearray(1000))
    assert cache.read_into(paths[0], view)
    assert bytes(view) == bytes(1000)
    fill(cache, 40, 1000, first=1000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*-*")) <= 100_000
    assert paths[0].exists()
    assert not paths[1].exists()
    assert not cache.read_into(paths[1], view)


def test_the_cache_drops_what_is_not_whole_and_old_leftovers(tmp_path, monkeypatch):
    faults = FaultLog(0)
    cache = DiskCache(str(tmp_path), 1_000_000, faults)
    short, long, good = fill(cache, 3, 1000)
    short.write_bytes(b"x")
    long.write_bytes(bytes(1001))
    (tmp_path / "sha" / "old.tmp").write_bytes(b"x")
    os.utime(tmp_path / "sha" / "old.tmp", (0, 0))
    (tmp_path / "sha" / "new.tmp").write_bytes(b"x")
    view = memoryview(bytearray(1000))
    assert [cache.read_into(path, view) for path in (short, long, good)] == [False, False, True]
    assert [path.exists() for path in (short, long, good)] == [False, False, True]
    monkeypatch.setattr(cache_module, "RECOUNT_S", -1.0)
    DiskCache(str(tmp_path), 1_000_000, faults)
    assert not (tmp_path / "sha" / "old.tmp").exists()
    assert (tmp_path / "sha" / "new.tmp").exists()
    assert faults.total == 0


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*-*"))


def test_ranks_share_one_account_and_nobody_walks_the_cache(tmp_path, monkeypatch):
    """A full cache of 200 shards, written to by turns: its bound holds, and trimming looks at what it removes, not at all."""
    looked, files = [], cache_module._files

    def counting(shards):
        found = files(shards)
        looked.append(len(found))
        return found

    monkeypatch.setattr(cache_module, "_files", counting)
    ranks = [DiskCache(str(tmp_path), 400_000, FaultLog(0)) for _ in range(3)]
    looked.clear()
    for n in range(3000):
        cache = ranks[n % 3]
        cache.put(cache.path(f"shard{n % 200}", n, n + 400), memoryview(bytes(400)))
        if n % 500 == 0:
            assert held(tmp_path) == ranks[0]._account(0)[0] <= 400_000
    assert held(tmp_path) == ranks[0]._account(0)[0] > 300_000
    assert sum(looked) < 4 * 3000


def test_an_account_that_is_wrong_is_made_right(tmp_path, monkeypatch):
    cache = DiskCache(str(tmp_path), 100_000, FaultLog(0))
    paths = fill(cache, 40, 1000)
    cache._account(10_000_000)  # as if it had been removed from by hand
    cache.trim()
    assert cache._account(0)[0] == held(tmp_path)
    fill(cache, 40, 1000)
    (tmp_path / "usage").write_bytes(b"torn")
    assert DiskCache(str(tmp_path), 100_000, FaultLog(0))._account(0)[0] == held(tmp_path) > 0
    assert paths


def test_a_cache_that_cannot_write_is_a_counted_fault(tmp_path):
    faults = FaultLog(0)
    cache = DiskCache(str(tmp_path), 1_000_000, faults)
    (tmp_path / "sha").write_bytes(b"a file where a folder should be")
    cache.put(cache.path("sha", 0, 10), memoryview(bytes(10)))
    assert faults.counts == {"cache": 1}


def test_an_evicted_file_lives_while_it_is_read(tmp_path):
    for n in range(3):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 10)
    files = OpenFiles(limit=1)
    held = files.get(str(tmp_path / "0"))
    for n in range(3):
        view = memoryview(bytearray(4))
        read_into(files, str(tmp_path / str(n)), 2, view)
        assert bytes(view) == bytes([n]) * 4

    assert os.pread(held.descriptor, 1, 0) == b"\0"
    with pytest.raises(BadSample, match="ends before byte 12"):
        read_into(files, str(tmp_path / "1"), 8, memoryview(bytearray(4)))
    files.drop(str(tmp_path / "1"))
    files.get(str(tmp_path / "2"))
    os.unlink(tmp_path / "2")
    read_into(files, str(tmp_path / "2"), 0, memoryview(bytearray(4)))  # still open


def test_open_files_stay_within_their_bound(tmp_path):
    """However many shards are read: descriptors of the process, not of the table."""
    before = len(os.listdir("/proc/self/fd"))
    files = OpenFiles(limit=16)
    for n in range(200):
        (tmp_path / str(n)).write_bytes(b"shard")
        read_into(files, str(tmp_path / str(n)), 0, memoryview(bytearray(5)))
        assert len(os.listdir("/proc/self/fd")) <= before + 16


class Signer:
    """Stands for botocore's client: counts, and waits where it is told to."""

    def __init__(self):
        self.signed, self.hold, self.held = [], threading.Event(), threading.Event()

    def generate_presigned_url(self, method, Params, ExpiresIn):
        self.signed.append(Params["Key"])
        if Params["Key"] == "slow":
            self.held.set()
            assert self.hold.wait(60)
        return f"https://host/{Params['Bucket']}/{Params['Key']}?signature={len(self.signed)}"


@pytest.fixture
def signer(monkeypatch):
    found = Signer()
    monkeypatch.setattr(ranges, "_s3_client", lambda: found)
    return found


def test_a_url_is_signed_once_per_shard_and_again_when_half_its_time_is_over(signer, monkeypatch):
    """Finding: a cache of 4,096 that was cleared whole signed nearly every sample of 100,000 shards."""
    clock = [0.0]
    monkeypatch.setattr(ranges.time, "monotonic", lambda: clock[0])
    held = ranges.S3Ranges(RetryPolicy())
    names = [f"s3://bucket/train-{n:06d}.tar" for n in range(5000)]
    first = [held._signed(name) for name in names]
    assert [held._signed(name) for name in names] == first
    assert len(signer.signed) == len(set(signer.signed)) == len(names)
    clock[0] = ranges.SIGNED_S / 2
    assert held._signed(names[0]) != first[0]
    assert len(signer.signed) == len(names) + 1


def test_signatures_that_are_kept_are_bounded_and_the_oldest_go_first(signer, monkeypatch):
    monkeypatch.setattr(ranges, "SIGNED_URLS", 100)
    held = ranges.S3Ranges(RetryPolicy())
    for n in range(250):
        held._signed(f"s3://bucket/{n}")
    assert len(held._urls) == 100
    for n in range(150, 250):
        held._signed(f"s3://bucket/{n}")
    assert len(signer.signed) == 250


def test_signing_one_shard_holds_up_no_other(signer):
    """Finding: all threads signed under one lock."""
    held = ranges.S3Ranges(RetryPolicy())
    held._signed("s3://bucket/known")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(held._signed, "s3://bucket/slow")
        assert signer.held.wait(60)
        try:
            others = [pool.submit(held._signed, f"s3://bucket/{name}") for name in ("known", "new")]
            assert [other.result(timeout=60).path for other in others] == ["/bucket/known", "/bucket/new"]
            assert not slow.done()
        finally:
            signer.hold.set()
        assert slow.result().path == "/bucket/slow"
