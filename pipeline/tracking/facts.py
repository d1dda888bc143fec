"""What identifies a run beside its settings: code revision, data, machine, layout. They become tags and dataset inputs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.slurm.freeze import REVISION_FILE
from data_prep.shards import ShardSet
from pipeline.config import DataConfig

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_DIFF_BYTES = 1 << 20
_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID",
          "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME")  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """One shard set as the run reads it; the hashes are those of its manifest and of the statistics in it."""

    url: str
    manifest_sha256: str
    statistics_sha256: str = ""
    split: str = "train"
    samples: int = 0


@dataclass(frozen=True)
class RunFacts:
    """world: ranks; layout: the parallel layout in words; datasets: what is read; parent: MLflow run this one belongs under."""

    world: int = 1
    layout: str = ""
    datasets: tuple[Dataset, ...] = ()
    parent: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> RunFacts:
        datasets = tuple(Dataset(**dataset) for dataset in tree.get("datasets", ()))
        return RunFacts(int(tree.get("world", 1)), str(tree.get("layout", "")), datasets, tree.get("parent"))


def datasets_of(data: DataConfig) -> tuple[Dataset, ...]:
    """The shard sets a run reads, with the hashes of their manifests."""
    urls = (data.url,) if isinstance(data.url, str) else data.url
    sets = [ShardSet.open(url) for url in urls]
    return tuple(
        Dataset(s.url, s.manifest_sha256, s.manifest["statistics_sha256"], data.split, s.num_samples) for s in sets
    )


def describe(facts: RunFacts, run_url: str, fingerprint: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Tags of a run. Of the environment only named variables are taken, never the rest: it holds secrets."""
    env = os.environ if env is None else env
    tags = {
        "geoloom.run_dir": absolute(run_url), "geoloom.config_fingerprint": fingerprint,
        "geoloom.host": socket.gethostname(), "geoloom.pid": str(os.getpid()),
        "geoloom.world": str(facts.world), "geoloom.layout": facts.layout,
        "geoloom.manifest_sha256": ",".join(dataset.manifest_sha256 for dataset in facts.datasets),
        "geoloom.statistics_sha256": ",".join(dataset.statistics_sha256 for dataset in facts.datasets),
    }  # fmt: skip
    tags |= {name.lower().replace("slurm_", "slurm."): env[name] for name in _SLURM if env.get(name)}
    parent = facts.parent or env.get("GEOLOOM_PARENT_RUN")
    if parent:
        tags["mlflow.parentRunId"] = parent
    revision = git_revision()
    if revision:
        tags |= {"mlflow.source.git.commit": revision, "geoloom.dirty": str(bool(git_diff())).lower()}
    return {name: value for name, value in tags.items() if value}


def absolute(url: str) -> str:
    """A run directory's URL that means the same in every working directory."""
    return os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url


def git_revision() -> str | None:
    """Commit of the code that runs: of the checkout, or of what a submission has frozen; `GEOLOOM_REVISION` says it where
    there is neither (an image); None if unknown."""
    return os.environ.get("GEOLOOM_REVISION") or _frozen().get("revision") or _git("rev-parse", "HEAD")


def git_diff() -> str:
    """What the code changes against that commit (tracked files, at most MAX_DIFF_BYTES); empty if nothing."""
    if _frozen():
        beside = REPOSITORY.parent / "code.diff"
        return beside.read_text(errors="replace")[:MAX_DIFF_BYTES] if beside.is_file() else ""
    return (_git("diff", "HEAD") or "")[:MAX_DIFF_BYTES]


def _frozen() -> dict[str, Any]:
    """What `cluster submit` noted of the copy that runs; empty in a checkout."""
    try:
        return dict(json.loads((REPOSITORY / REVISION_FILE).read_text()))
    except (OSError, ValueError):
        return {}


def _git(*arguments: str) -> str | None:
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        done = subprocess.run(
            # in a container the checkout often belongs to somebody else, which git refuses unless told
            ["git", "-c", f"safe.directory={REPOSITORY}", "-C", str(REPOSITORY), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
