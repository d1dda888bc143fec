"""Builds on a real dask cluster: workers killed and stopped, every shard once, the bytes of one process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.audit import audit
from data_prep.bench.units import empty
from data_prep.executors import Executor, run_units
from data_prep.verify import verify
from tests.data_folder import REPOSITORY
from tests.integration.test_build_runs import DEMO, content, reference, run, scenes, start
from tests.patience import patience
from tests.require import require
from tests.slurm_cluster import slurm_cluster

pytestmark = pytest.mark.integration
__all__ = ["reference", "scenes"]


@contextlib.contextmanager
def dask_cluster(folder: Path, workers: int):
    """(address, worker processes) of a scheduler and workers in processes of their own."""
    pytest.importorskip("distributed")
    place = folder / "scheduler.json"
    command = [sys.executable, "-m", "dask"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DASK_DISTRIBUTED__DASHBOARD__LINK": ""}
    log = open(folder / "dask.log", "ab")  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [
                *command,
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--scheduler-file",
                str(place),
                "--no-dashboard",
            ],
            stdout=log,
            stderr=log,
            env=environment,
        )
    ]
    try:
        deadline = time.monotonic() + 60 * patience()
        while not place.exists() and time.monotonic() < deadline and processes[0].poll() is None:
            time.sleep(0.1)
        require(place.exists(), "a dask scheduler that starts", "pip install -r requirements.txt")
        address = json.loads(place.read_text())["address"]
        for _ in range(workers):
            processes.append(
                subprocess.Popen(
                    [
                        *command,
                        "worker",
                        address,
                        "--nthreads",
                        "1",
                        "--no-nanny",
                        "--no-dashboard",
                        "--host",
                        "127.0.0.1",
                    ],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=folder,
                )
            )
        yield address, processes[1:]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        log.close()


def test_workers_killed_and_stopped_the_same_bytes(scenes, reference, tmp_path):
    with dask_cluster(tmp_path, 4) as (address, workers):
        url = tmp_path / "set"
        process = start(
            "build",
            DEMO,
            scenes,
            "shards.max_samples=2",
            f"output.url={url}",
            "--executor",
            "dask",
            "--scheduler",
            address,
            "--json",
        )
        wait_for_parts(url, 1, process)
        workers[0].kill()
        workers[3].send_signal(signal.SIGSTOP)
        wait_for_parts(url, 3, process)
        workers[1].kill()
        wait_for_parts(url, 5, process)
        workers[3].send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=300 * patience())
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["samples"] == 18
    assert content(url) == content(reference)
    assert run("verify", str(url), "--json")[0]["faults"] == 0
    figures = run("status", str(url), "--json")[0]
    assert (figures["state"], figures["done"], figures["faulty"]) == ("finished", figures["shards"], 0)


def test_workers_that_are_slurm_jobs(scenes, reference, tmp_path):
    """dask-jobqueue on a real SLURM; one of its jobs is cancelled while it works."""
    pytest.importorskip("dask_jobqueue")
    url = tmp_path / "set"
    with slurm_cluster(nodes=2, cpus=4, gpus=0) as slurm:
        process = start(
            "build", DEMO, scenes, "shards.max_samples=2", f"output.url={url}", "--executor", "slurm", "--jobs", "3", "--json",
            SLURM_CONF=slurm.environment["SLURM_CONF"], DASK_JOBQUEUE__SLURM__INTERFACE="lo", DASK_JOBQUEUE__SLURM__MEMORY="1GiB",
            DASK_JOBQUEUE__SLURM__JOB_DIRECTIVES_SKIP="['--mem']", DASK_JOBQUEUE__SLURM__LOCAL_DIRECTORY=str(tmp_path),
            DASK_JOBQUEUE__SLURM__LOG_DIRECTORY=str(tmp_path / "logs"),
        )  # fmt: skip
        wait_for_parts(url, 1, process)
        working = slurm.run("squeue", "-h", "-t", "R", "-o", "%A").split()
        slurm.run("scancel", working[0], check=bool(working))
        out, err = process.communicate(timeout=600 * patience())
        assert process.returncode == 0, err
        assert 2 <= len(working) <= 3
        slurm.wait(lambda: not slurm.run("squeue", "-h", "-o", "%A").split(), "the cluster's jobs end with the build")
    assert json.loads(out.splitlines()[-1])["samples"] == 18
    assert content(url) == content(reference)


def wait_for_parts(url: Path, count: int, process: subprocess.Popen) -> None:
    while (
        process.poll() is None
        and len(list((url / "_build").glob("*-0*.json")) if (url / "_build").exists() else []) < count
    ):
        time.sleep(0.02)


def test_a_cluster_on_this_machine(scenes, reference, tmp_path):
    run("build", DEMO, scenes, "shards.max_samples=2", f"output.url={tmp_path}/set", "workers=2", "--executor", "dask")
    assert content(tmp_path / "set") == content(reference)


def test_audit_and_verify_say_the_same_on_a_cluster(scenes, reference, tmp_path):
    """Of a catalog, of a sound set and of a spoiled one: rows, faults and their order are those of one process."""
    spoiled = tmp_path / "set"
    shutil.copytree(reference, spoiled)
    tar = sorted(spoiled.glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with dask_cluster(tmp_path, 2) as (address, _):
        there = Executor("dask", 2, address)
        catalog = scenes.partition("=")[2].strip("[]")
        assert audit(catalog, None, there) == audit(catalog)
        assert audit(str(spoiled), None, there) == audit(str(spoiled))
        assert verify(str(reference), True, executor=there) == []
        faults = verify(str(spoiled), True, executor=there)
    assert faults == verify(str(spoiled), True)
    assert {fault.file for fault in faults} == {tar.name}


def test_every_unit_comes_back_once(tmp_path):
    found = list(run_units(empty, range(5000), [str(i) for i in range(5000)], Executor("dask", 2), lambda _: None))
    assert sorted(found) == list(range(5000))


def test_a_cluster_that_is_not_there_is_one_line(scenes, tmp_path):
    out = f"output.url={tmp_path}/x"
    _, err = run("build", DEMO, scenes, out, "--scheduler", "tcp://127.0.0.1:1", code=2)
    assert "--scheduler goes with --executor dask" in err
