"""What all injections share: an S3 server, an MLflow server, a SLURM, a shard set and what reading it gives. Started when first used."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.faults.campaign import NotInjected
from tests.mlflow_server import MlflowServer
from tests.s3_server import S3Server, _free_ports
from tests.sites import make_site, write_shard_set
from tests.slurm_cluster import SlurmCluster

COUNT = 18


class Shared:
    """folder: of this call alone; kept: what later calls may use again."""

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        self.folder, self.kept = folder, kept or folder
        self._ends = contextlib.ExitStack()

    @functools.cached_property
    def shards(self) -> str:
        """A local set of COUNT sites in shards of 6."""
        return self._set("shards", 0)

    @functools.cached_property
    def other(self) -> str:
        """A set with the same names and other pixels."""
        return self._set("other", 1000)

    def _set(self, name: str, seed: int) -> str:
        sites = [
            make_site(f"site_{i}", seed + i, dates=4, side_px=12, hr_px=48, place=(200.0 * i, 0)) for i in range(COUNT)
        ]
        return write_shard_set(str(self.folder / name), sites, per_shard=6)

    @functools.cached_property
    def truth(self) -> dict[str, str]:
        """Key → hash of every sample, as an undisturbed reader delivers it."""
        from tests.faults.data import rows

        good, bad, doubled = rows(self.shards)
        assert (len(good), bad, doubled) == (COUNT, {}, 0)
        return good

    @functools.cached_property
    def truth_in_order(self) -> dict[str, str]:
        """The same for a reader with the settings of `data.IN_ORDER`."""
        from tests.faults.data import IN_ORDER, rows

        return rows(self.shards, **IN_ORDER)[0]

    @functools.cached_property
    def s3(self) -> S3Server:
        ports = _free_ports(5)
        place = self.folder / "seaweed"
        place.mkdir()
        server = S3Server(f"http://127.0.0.1:{ports[0]}", place, ports)
        server.start()
        self._ends.callback(server.kill)
        os.environ.update(server.environment)
        return server

    def s3_prefix(self) -> str:
        assert self.s3
        return f"s3://shards/{uuid.uuid4().hex[:12]}"

    @functools.cached_property
    def s3_shards(self) -> str:
        """The same set on the server."""
        from cluster import storage

        url = self.s3_prefix()
        for path in Path(self.shards).iterdir():
            if path.is_file():
                storage.upload(str(path), f"{url}/{path.name}")
        return url

    @contextlib.contextmanager
    def endpoint(self, url: str) -> Iterator[None]:
        """Clients made inside go to `url` instead of the server."""
        import s3fs

        assert self.s3_shards
        before = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = url
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            os.environ["AWS_ENDPOINT_URL"] = before
            s3fs.S3FileSystem.clear_instance_cache()

    @functools.cached_property
    def mlflow(self) -> MlflowServer:
        server = MlflowServer(f"sqlite:///{self.folder}/mlflow.db", str(self.folder / "artifacts"), self.folder)
        server.start()
        self._ends.callback(server.kill)
        return server

    @functools.cached_property
    def slurm(self) -> SlurmCluster:
        missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if not shutil.which(name)]
        if missing or os.geteuid():
            raise NotInjected(f"needs {', '.join(missing) or 'root, for a mount namespace per node'}")
        cluster = self._ends.enter_context(SlurmCluster(nodes=2, cpus=8, gpus=0))
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        return cluster

    def close(self) -> None:
        self._ends.close()


@contextlib.contextmanager
def shared(keep: Path | None = None) -> Iterator[Shared]:
    """keep: a folder that is left behind; the trainer's shard sets and undisturbed run found there are used again."""
    folder = Path(tempfile.mkdtemp(prefix="geoloom-faults-"))
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    common = Shared(folder, keep.absolute() if keep is not None else None)
    try:
        yield common
    finally:
        common.close()
        shutil.rmtree(folder, ignore_errors=True)
