"""Who am I among the processes of this job: torchrun, the deepspeed launcher, srun and a plain process all answer here."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Mapping

from cluster.errors import UsageError

FIRST_PORT, NUM_PORTS = 10_000, 22_000


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Place of this process in the job, and where the job meets."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    launcher: str = "none"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        return self.rank // max(self.local_world, 1)

    def environment(self) -> dict[str, str]:
        """The variables `torch.distributed`'s env:// rendezvous reads."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world), "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip

    @staticmethod
    def from_environment(env: Mapping[str, str] | None = None) -> Ranks:
        """Reads RANK/WORLD_SIZE/… (torchrun, deepspeed) or, failing that, a SLURM task's variables; else one process.

        Raises UsageError for variables that contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" in env and "WORLD_SIZE" in env:
            ranks = Ranks(
                int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])),
                int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])), env.get("MASTER_ADDR", "127.0.0.1"),
                int(env.get("MASTER_PORT", "29500")), "env",
            )  # fmt: skip
        elif "SLURM_PROCID" in env and env.get("SLURM_STEP_ID") not in (None, "4294967291", "batch"):
            ranks = _from_slurm(env)
        else:
            return Ranks()
        if not 0 <= ranks.rank < ranks.world:
            raise UsageError(f"rank {ranks.rank} is outside a world of {ranks.world}; check RANK and WORLD_SIZE")
        return ranks


def job_port(job: int) -> int:
    """Where the ranks of a SLURM job meet: below 32768, where Linux begins to hand out ports to whoever connects somewhere."""
    return FIRST_PORT + job % NUM_PORTS


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    world = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    address = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    job = int(env.get("SLURM_JOB_ID", "0"))
    return Ranks(
        int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", "0")), max(world // max(nodes, 1), 1),
        address, int(env.get("MASTER_PORT", str(job_port(job)))), "srun",
    )  # fmt: skip


def _first_host(nodelist: str) -> str:
    """First name of a SLURM node list; `scontrol` expands the bracket notation."""
    if not nodelist or "[" not in nodelist:
        return nodelist.split(",")[0] or "127.0.0.1"
    expanded = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True, timeout=30
    )
    return expanded.stdout.split()[0]
