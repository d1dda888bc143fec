"""The storage door and the run directory on a real S3 server, and what they say when it is away."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import Fenced, RunFailure
from cluster.lease import Lease, history
from cluster.rundir import RunDir
from tests import storage_contract

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("check", storage_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None], s3_url: str) -> None:
    check(s3_url)


def test_uploads_arrive(s3_url: str, tmp_path: Path) -> None:
    storage_contract.uploads_arrive(s3_url, str(tmp_path / "source"))


def test_run_directory_on_s3(s3_url: str) -> None:
    first = RunDir(s3_url)
    first.claim()
    first.start_metrics(0)
    for step in (1, 2, 3):
        first.append_metrics({"step": step, "loss": 0.1})
    first.sync()
    second = RunDir(s3_url)
    second.claim()
    second.start_metrics(2)
    second.append_metrics({"step": 3, "loss": 0.2})
    second.close()
    assert [line["loss"] for line in RunDir(s3_url).read_metrics()] == [0.1, 0.1, 0.2]
    with pytest.raises(RunFailure, match="later start"):
        first.check_claim()


def test_an_endpoint_that_is_away_is_one_line(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises((RunFailure, OSError)) as caught:
            storage.read_bytes(storage.join(s3_url, "a"))
        assert "127.0.0.1:9" in str(caught.value)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_write_under_way_during_a_takeover_does_not_survive_it(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start has looked at the version and the lease, is frozen, and sends its write after the second's."""
    first, target = Lease.acquire(s3_url), storage.join(s3_url, "tracked.json")
    first.write(target, b"before")
    replace = storage.replace

    def frozen(url: str, data: bytes, expected: str | None) -> bool:
        monkeypatch.setattr(storage, "replace", replace)
        Lease.acquire(s3_url).write(target, b"of the second")
        return replace(url, data, expected)

    monkeypatch.setattr(storage, "replace", frozen)
    with pytest.raises(Fenced, match="a later start"):
        first.write(target, b"of the first")
    assert storage.read_bytes(target) == b"of the second"
    assert [record["epoch"] for record in history(s3_url)] == [1, 2]


def test_of_many_starts_at_once_each_gets_its_own_number(s3_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: Lease.acquire(s3_url).epoch, range(6)))
    assert sorted(found) == list(range(1, 7))
