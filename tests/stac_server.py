"""A real STAC API for integration tests: stac-fastapi on pgstac, in a private PostgreSQL with PostGIS, on the loopback."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mlflow_server import free_port, postgresql
from tests.require import require

READY_S = 120


@dataclass
class StacServer:
    """url of the API; log: what it has answered, one line per request."""

    environment: dict[str, str]
    folder: Path
    port: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def searches(self) -> int:
        """Searches (pages of them) it has answered."""
        return (self.folder / "api.log").read_text().count("/search")

    def load(self, collections: Sequence[str], items: Sequence[dict[str, Any]]) -> None:
        """Puts items into the database, as an operator does."""
        described = [
            {
                "type": "Collection", "stac_version": "1.0.0", "id": name, "description": name, "license": "proprietary", "links": [],
                "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}},
            }
            for name in collections
        ]  # fmt: skip
        for kind, entries in (("collections", described), ("items", items)):
            path = self.folder / f"{kind}.ndjson"
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            self._pypgstac("load", kind, str(path), "--method", "upsert")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.port = self.port or free_port()
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "stac_fastapi.pgstac.app:create_app",
            "--factory",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with open(self.folder / "api.log", "ab") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**os.environ, **self.environment}
            )
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, urllib.error.URLError):
                if urllib.request.urlopen(self.url, timeout=5).status == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the STAC API did not answer: {(self.folder / 'api.log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _pypgstac(self, *arguments: str) -> None:
        script = Path(sys.executable).with_name("pypgstac")
        done = subprocess.run(
            [str(script), *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"pypgstac {' '.join(arguments)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")


@contextlib.contextmanager
def stac_server(folder: Path) -> Iterator[StacServer]:
    """A running API without items."""
    require(
        importlib.util.find_spec("stac_fastapi") and importlib.util.find_spec("pypgstac"),
        "stac-fastapi-pgstac and pypgstac",
    )
    require(
        glob.glob("/usr/share/postgresql/*/extension/postgis.control"),
        "PostGIS (postgresql-15-postgis-3)",
        "make system-deps",
    )
    import psycopg

    with postgresql() as uri:
        port = uri.rpartition(":")[2].partition("/")[0]
        with psycopg.connect(
            host="127.0.0.1", port=int(port), user="postgres", dbname="mlflow", autocommit=True
        ) as connection:
            connection.execute("create database stac")
        environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": port,
            "PGUSER": "postgres",
            "PGPASSWORD": "any",
            "PGDATABASE": "stac",
        }
        server = StacServer(environment, folder)
        server._pypgstac("migrate")
        server.start()
        try:
            yield server
        finally:
            server.stop()
