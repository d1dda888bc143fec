"""How many connections a rank of a large job holds on the host: ranks are threads of one process, each with its own process group."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.distributed as dist

from pipeline.parallel.processes import MESH_RANKS, connect_when_needed

pytestmark = pytest.mark.integration
RANKS = 32


def connections() -> int:
    """TCP connections of this process that stand, each counted at both of its ends."""
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections("tcp"))


def per_rank() -> float:
    """After the collectives that we use on the host have run once, in a job of RANKS."""
    before, store = connections(), dist.HashStore()

    def rank(number: int) -> dist.ProcessGroupGloo:
        group = dist.ProcessGroupGloo(store, number, RANKS, datetime.timedelta(seconds=60))
        value = torch.ones(1000) * number
        group.allreduce([value]).wait()
        assert float(value[0]) == sum(range(RANKS))
        group.broadcast(value, 0).wait()
        found = [[torch.empty(1) for _ in range(RANKS)]]
        group.allgather(found, [torch.tensor([float(number)])]).wait()
        assert torch.cat(found[0]).tolist() == list(range(RANKS))
        group.barrier().wait()
        return group

    with ThreadPoolExecutor(RANKS) as pool:
        groups = list(pool.map(rank, range(RANKS)))
        found = connections() - before
    del groups
    return found / RANKS


def test_large_jobs_make_no_full_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    connect_when_needed(MESH_RANKS)
    assert "TORCH_GLOO_LAZY_INIT" not in os.environ
    mesh = per_rank()
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")  # so that what is set below does not outlive the test
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    connect_when_needed(MESH_RANKS + 1)
    needed = per_rank()
    assert mesh == pytest.approx(RANKS - 1)
    assert needed <= 14, needed  # a ring, and trees over 32 ranks
