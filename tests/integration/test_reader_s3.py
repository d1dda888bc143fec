"""The reader on a real S3-compatible server, with and without faults in between: the same training data, or a clear stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from cluster.errors import RunFailure, UsageError
from model.config import ModelConfig
from pipeline.config import DataConfig
from pipeline.reader.faults import BadSample, RetryPolicy, TransientFault
from pipeline.reader.ranges import FsspecRanges, S3Ranges
from pipeline.reader.reader import Reader
from tests.data_folder import REPOSITORY
from tests.fault_proxy import FaultProxy
from tests.require import require
from tests.sites import make_site, write_shard_set
from tests.unit.test_reader import delivered, over_ranks, settings_of

pytestmark = pytest.mark.integration

COUNT = 24
HASTY = RetryPolicy(retries=10, base_s=0.001, cap_s=0.01, timeout_s=2.0)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> str:
    """A shard set in a folder."""
    sites = [make_site(f"site_{i}", i, dates=5, side_px=12, hr_px=128) for i in range(COUNT)]
    return write_shard_set(str(tmp_path_factory.mktemp("local")), sites, per_shard=8)


@pytest.fixture
def s3_shards(s3_url, local) -> tuple[str, str]:
    """(URL in S3, the same set as a local folder)."""
    files = fsspec.filesystem("s3")
    for path in Path(local).iterdir():
        if path.is_file():
            files.put_file(str(path), f"{s3_url}/{path.name}")
    return s3_url, local


def rows_of(data: DataConfig, policy: RetryPolicy | None = None, world: int = 1) -> tuple[list, list[Reader]]:
    """Rows of one epoch over all ranks in order of batches, and the (closed) readers."""
    found, readers = [], []
    for rank in range(world):
        reader = Reader(data, ModelConfig(), seed=7, batch_per_rank=4, rank=rank, world=world, epochs=1, policy=policy)
        with reader:
            found.append(delivered(reader))
        readers.append(reader)
    return [row for step in zip(*found) for part in step for row in part], readers


@pytest.mark.parametrize(("threads", "world"), [(0, 1), (2, 2), (7, 3)])
def test_object_storage_delivers_what_local_files_do(s3_shards, threads, world):
    url, local = s3_shards
    assert rows_of(settings_of(url, threads=threads), world=world)[0] == rows_of(settings_of(local))[0]


def test_resume_from_object_storage_on_another_world(s3_shards):
    url, local = s3_shards
    data = settings_of(url, threads=2, range_mb=1, read_ahead_mb=2)
    first, state = over_ranks(data, 2, 3, batches=2)
    rest, _ = over_ranks(data, 3, 2, state)
    assert first + rest == over_ranks(settings_of(local), 1, 4)[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> str:
    """A key and its self-signed certificate for 127.0.0.1, in one file."""
    require(shutil.which("openssl"), "openssl", "apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "certificate.pem").read_text())
    return str(folder / "both.pem")


@pytest.mark.parametrize(("threads", "tls"), [(0, False), (3, False), (3, True)])
def test_faults_on_the_way_change_nothing_and_are_counted(s3_shards, s3_server, monkeypatch, request, threads, tls):
    url, local = s3_shards
    context = None
    if tls:
        certificate = request.getfixturevalue("certificate")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    kinds = ["503", "reset", "truncated", "wrong", "500", "stall", "cut_head", "503", "truncated", "reset"]
    with FaultProxy(s3_server.endpoint, lambda n: kinds[n // 2] if n % 2 and n < 20 else "ok", context) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        rows, (reader,) = rows_of(
            settings_of(url, threads=threads, block_samples=1, range_mb=1, read_ahead_mb=4), HASTY
        )
    assert rows == rows_of(settings_of(local, block_samples=1))[0]
    counts = reader.faults.counts
    assert not reader.faults.quarantined
    assert counts["http_503"] == proxy.done["503"] > 0
    assert counts["http_500"] == proxy.done["500"] > 0
    assert counts["timeout"] == proxy.done["stall"] == 1
    assert counts["checksum"] == proxy.done["wrong"] == 1
    # http.client takes a head that is cut between two lines for a whole one, and the missing body shows
    cut = counts["truncated"] + counts["reset"] + counts["connection"]
    assert cut == proxy.done["truncated"] + proxy.done["reset"] + proxy.done["cut_head"] == 5
    assert tls or counts["truncated"] >= 2
    assert reader.metrics()["data/faults"] == sum(counts.values())


@pytest.mark.parametrize(
    ("fault", "said"), [("503", "HTTP 503"), ("reset", "onnection"), ("truncated", "ended after"), ("stall", "no byte")]
)
def test_past_the_retry_budget_it_stops_and_names_object_and_range(s3_shards, s3_server, monkeypatch, fault, said):
    url, _ = s3_shards
    policy = RetryPolicy(retries=2, base_s=0.001, cap_s=0.01, timeout_s=0.2)
    with FaultProxy(s3_server.endpoint, lambda n: "ok" if n < 2 else fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(RunFailure) as failure:
            rows_of(settings_of(url, threads=2, range_mb=1, read_ahead_mb=4, block_samples=1), policy)
    for words in (f"{url}/train-00000", "bytes ", " to ", "failed 3 times", said):
        assert words in str(failure.value)


def test_bytes_that_stay_wrong_are_quarantined_not_trained_on(s3_shards, s3_server, monkeypatch):
    url, _ = s3_shards
    with FaultProxy(s3_server.endpoint, lambda n: "wrong") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(RunFailure, match="checksum") as failure:
            rows_of(settings_of(url, threads=1), HASTY)
    assert "error_budget" in str(failure.value)


def test_a_missing_object_is_named(s3_shards):
    url, _ = s3_shards
    fsspec.filesystem("s3").rm(f"{url}/train-000001.tar")
    _, (reader,) = rows_of(settings_of(url, threads=2, error_budget=1.0), HASTY)
    assert len(reader.faults.quarantined) == 8
    assert all("train-000001.tar does not exist" in why for why in reader.faults.quarantined.values())


def test_the_cache_serves_survives_damage_and_keeps_its_bound(s3_shards, s3_server, monkeypatch, tmp_path):
    url, local = s3_shards
    wanted = rows_of(settings_of(local))[0]
    cached = settings_of(url, threads=2, cache_dir=str(tmp_path / "cache"), cache_gb=1.0)
    rows, (cold,) = rows_of(cached)
    assert rows == wanted
    files = [path for path in (tmp_path / "cache").rglob("*-*") if path.is_file()]
    assert len(files) == COUNT
    files[0].write_bytes(files[0].read_bytes()[:-7])  # torn by a crash
    files[1].write_bytes(bytes(files[1].stat().st_size))  # whole, but never reached the disk
    (files[2].parent / "x.tmp").write_bytes(b"half")
    rows, (warm,) = rows_of(cached)
    assert rows == wanted
    assert warm.faults.counts["checksum"] == 1
    assert 0 < warm.bytes_read < cold.bytes_read / 4
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    rows, (third,) = rows_of(cached)
    assert rows == wanted
    assert third.bytes_read == 0

    size = files[3].stat().st_size
    small = settings_of(url, threads=2, cache_dir=str(tmp_path / "small"), cache_gb=60 * size / 1e9)
    for _ in range(2):
        assert rows_of(small)[0] == wanted
    assert sum(p.stat().st_size for p in (tmp_path / "small").rglob("*-*")) <= 60 * size


def test_ranks_share_one_cache_while_it_is_trimmed(s3_shards, tmp_path):
    """Several processes' worth of readers at once on a cache too small for the set: always the right bytes."""
    url, local = s3_shards
    wanted, results = rows_of(settings_of(local))[0], {}
    size = 60_000
    data = settings_of(url, threads=1, cache_dir=str(tmp_path / "cache"), cache_gb=20 * size / 1e9)

    def one(name: int) -> None:
        results[name] = [rows_of(data)[0] for _ in range(2)]

    threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(rows == wanted for found in results.values() for rows in found)
    assert len(results) == 3


def test_memory_of_read_ahead_is_bounded(s3_shards):
    url, _ = s3_shards
    reader = Reader(settings_of(url, threads=2, read_ahead_mb=1, range_mb=1), ModelConfig(), seed=0, batch_per_rank=4)
    with reader:
        for _ in range(30):
            next(reader)
        assert sum(len(arena.memory) for arena in reader._fetcher._arenas) <= 1 << 20


def test_ranges_say_what_is_wrong(s3_shards, tmp_path):
    url, local = s3_shards
    for ranges, place in ((S3Ranges(HASTY), url), (FsspecRanges(), local)):
        view = memoryview(bytearray(100))
        ranges.read_into(f"{place}/train-000000.tar", 512, view)
        with open(f"{local}/train-000000.tar", "rb") as file:
            file.seek(512)
            assert file.read(100) == view.tobytes()
        with pytest.raises(BadSample, match="does not exist"):
            ranges.read_into(f"{place}/none.tar", 0, view)
        with pytest.raises(BadSample, match="ends before"):
            ranges.read_into(f"{place}/manifest.json", 10**9, view)
        ranges.close()


def test_wrong_credentials_and_none_are_explained(s3_shards, monkeypatch):
    url, _ = s3_shards
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TransientFault, match="403"):
        S3Ranges(HASTY).read_into(f"{url}/train-000000.tar", 0, memoryview(bytearray(10)))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        S3Ranges(HASTY)


def test_a_process_that_forgets_to_close_still_ends(s3_shards):
    url, _ = s3_shards
    code = (
        "import tests.integration.test_reader_s3 as t\n"
        f"r = t.Reader(t.settings_of({url!r}, threads=2), t.ModelConfig(), seed=0, batch_per_rank=4)\n"
        "print(next(r).keys)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "site_" in done.stdout


def test_a_server_that_goes_and_comes_back_is_waited_for(s3_shards, s3_server):
    url, local = s3_shards
    data = settings_of(url, threads=2, block_samples=1, range_mb=1, read_ahead_mb=1)
    with Reader(data, ModelConfig(), seed=7, batch_per_rank=4, epochs=1) as reader:  # as a run reads
        first = delivered(reader, 1)
        s3_server.kill()
        again = threading.Thread(target=s3_server.start)
        again.start()
        rest = delivered(reader)
        again.join()
    rows = [row for part in first + rest for row in part]
    assert rows == rows_of(settings_of(local, block_samples=1))[0]


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_storage_that_stands_still(s3_shards, s3_server, monkeypatch):
    url, _ = s3_shards
    stalled = threading.Event()

    def plan(number: int) -> str:
        if number:
            stalled.set()
        return "stall" if number else "ok"

    with FaultProxy(s3_server.endpoint, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        data = settings_of(url, threads=2, block_samples=1, range_mb=1, read_ahead_mb=1)
        reader = Reader(data, ModelConfig(), seed=7, batch_per_rank=1, policy=RetryPolicy(timeout_s=600.0))

        def read() -> None:
            with contextlib.suppress(RunFailure):  # "interrupted", or "closed"
                for _ in range(9):
                    next(reader)

        waiting = threading.Thread(target=read, daemon=True)
        waiting.start()
        stalled.wait(30)
        reader.close()
