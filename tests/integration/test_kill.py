"""`kill -9` at random moments, also in the middle of a save: the next start finds a complete checkpoint, and it is the right one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import store
from pipeline.launch import free_port, rank_environment
from tests.data_folder import REPOSITORY

pytestmark = pytest.mark.integration
KILLS = int(os.environ.get("GEOLOOM_KILLS", "6"))


def start(folder: Path, processes: int) -> list[subprocess.Popen]:
    port, ranks = free_port(), []
    for rank in range(processes):
        env = {**rank_environment(rank, processes, port), "OMP_NUM_THREADS": "1"}
        with open(folder / f"rank-{rank}.log", "ab") as log:
            command = [sys.executable, "-m", "tests.rank_jobs", "tests.integration.layouts:survive", str(folder)]
            ranks.append(subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=log, stderr=log))
    return ranks


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_killed_at_random_moments(tmp_path: Path) -> None:
    log, url, chance = tmp_path / "log", str(tmp_path / "checkpoints"), random.Random(4)
    job = {"case": {"stage": 2, "ep": 2}, "steps": 400, "url": url, "log": str(log)}
    (tmp_path / "argument.json").write_text(json.dumps(job))
    committed_before = 0
    for kill in range(KILLS):
        ranks, before = start(tmp_path, 2), len(lines(log))
        deadline = time.monotonic() + 120
        while len(lines(log)) == before and time.monotonic() < deadline:  # until it has resumed
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "rank-0.log").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(chance.random() * (0.3 if kill % 3 else 3.0))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()
        newest = max((store.open_checkpoint(u).step for u in store.committed(url)), default=0)
        assert newest >= committed_before  # nothing that was committed is lost
        committed_before = newest
    digests: dict[str, str] = {}
    resumed = []
    for what, step, digest in lines(log):  # a step is the same state whoever computed it, whenever it was loaded
        assert digests.setdefault(step, digest) == digest, (what, step)
        resumed += [int(step)] if what == "resumed" else []
    assert resumed == sorted(resumed)
    assert len(resumed) == KILLS
    print(f"resumed at {resumed}, committed {committed_before}")
