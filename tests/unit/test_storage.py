"""The storage door on local files and in memory, and what a crash or a full disk leaves of a local file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import UsageError
from tests import storage_contract

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "s p") if request.param == "local" else f"memory://{uuid.uuid4().hex}/s p"


@pytest.mark.parametrize("check", storage_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str], None], url: str) -> None:
    check(url)


def test_uploads_arrive(url: str, tmp_path: Path) -> None:
    storage_contract.uploads_arrive(url, str(tmp_path / "source"))


def test_unknown_protocol_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        storage.read_bytes("nosuch://a/b")


def test_join_and_name() -> None:
    assert storage.join("s3://b/", "/a/", "c") == "s3://b/a/c"
    assert storage.name("s3://b/x/") == "x"


WRITER = """
import sys
from cluster import storage
path, version = sys.argv[1], 0
print("ready", flush=True)
while True:
    version = (version + 1) % 256
    with storage.open_atomic(path) as stream:
        for _ in range(64):
            stream.write(bytes([version]) * 65536)
"""


def test_kill_at_any_moment_leaves_a_whole_version(tmp_path: Path) -> None:
    path, chance = tmp_path / "a", random.Random(0)
    whole = 64 * 65536
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT)
        assert writer.stdout
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.05))  # the moment itself is what is varied
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if path.exists():
            data = path.read_bytes()
            assert len(data) == whole
            assert len(set(data)) == 1
        assert storage.list_names(str(tmp_path)) in ([], ["a"])  # what the dead one left is not shown


FULL = """
import resource, signal, sys
from cluster import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write_atomic(sys.argv[1], b"n" * 1_000_000)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_version_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    said = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, env=ENVIRONMENT, check=True)
    assert said.stdout == b"OSError\n"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
