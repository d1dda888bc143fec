"""A real MLflow server for integration tests, on SQLite or on a real PostgreSQL, that can be killed and started again."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.require import require

READY_S = 300  # a start takes 6 s on a free machine, minutes on one that runs other tests


@dataclass
class MlflowServer:
    """backend: store URI; artifacts: where files go. environment: what the server needs beside, such as AWS variables."""

    backend: str
    artifacts: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts (or starts again, on the same port and store) and waits until it answers."""
        self.port = self.port or free_port()
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.backend, "--artifacts-destination", self.artifacts,
            "--serve-artifacts", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        settings = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20", "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip
        log = self.folder / "mlflow.log"
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True, cwd=self.folder,
                env={**os.environ, **settings, **self.environment},
            )  # fmt: skip
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"mlflow server ended with {self.process.returncode}: {log.read_text()[-2000:]}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                if urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"mlflow server did not answer within {READY_S} s: {log.read_text()[-2000:]}")

    def signal(self, number: int) -> None:
        """To the server and its workers: SIGSTOP makes them accept connections and never answer, SIGCONT go on."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """`kill -9` of the server and its workers; the store stays."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A private PostgreSQL cluster; yields the SQLAlchemy URI of an empty database."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    initdb = programs[-1] if programs else shutil.which("initdb")
    require(initdb, "PostgreSQL (initdb)")
    folder = Path(initdb).parent  # type: ignore[arg-type]
    data = Path(tempfile.mkdtemp(prefix="geoloom-pg-"))
    prefix: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(data, "postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
    port = free_port()
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"

    def call(name: str, *arguments: str) -> None:
        subprocess.run(
            [*prefix, str(folder / name), *arguments], check=True, stdout=subprocess.DEVNULL, timeout=120, cwd=data
        )

    call("initdb", "-D", str(data / "cluster"), "-A", "trust", "-U", "postgres", "--no-sync")
    call("pg_ctl", "-D", str(data / "cluster"), "-o", options, "-l", str(data / "log"), "-w", "start")
    try:
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "mlflow")
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/mlflow"
    finally:
        call("pg_ctl", "-D", str(data / "cluster"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(data, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
