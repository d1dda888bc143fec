"""Faults of real training runs: `python -m pipeline train` on two ranks (ZeRO-2, experts over both), each compared with the run
that nobody disturbed: losses, gradients and expert loads bit by bit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.exit_codes import REQUEUE
from tests.data_folder import REPOSITORY
from tests.faults.campaign import Case, Kind, Result
from tests.integration.test_train import STEPS, Job, command, learned, metrics
from tests.patience import patience

LIMIT_S = 400


@functools.cache
def shards(folder: str, name: str = "train", seed: int = 0) -> str:
    scenes, url = f"{folder}/{name}-scenes", f"{folder}/{name}-shards"
    if Path(url, "manifest.json").exists():
        return url
    config = REPOSITORY / "data_prep" / "runs" / "demo.yaml"
    for step in (
        command("data_prep", "simulate", scenes, "--sites", "14", "--seed", str(seed)),
        command("data_prep", "build", str(config), f"source.catalog=[{scenes}/catalog.parquet]", f"output.url={url}"),
    ):
        subprocess.run(step, cwd=REPOSITORY, check=True, capture_output=True, timeout=300 * patience())
    return url


@functools.cache
def truth(folder: str) -> list[dict[str, Any]]:
    # with --keep it may stand there already: then there is nothing to do
    job = Job(shards(folder), Path(folder, "whole"))
    assert job.wait() == 0, job.text()[-2000:]
    return learned(Path(folder, "whole"))


def begun(case: Case, *overrides: str) -> Job:
    return on(case, shards(str(case.shared.kept)), *overrides)


def on(case: Case, url: str, *overrides: str) -> Job:
    job = Job(url, case.folder / "run", *overrides)
    case.ends.callback(job.process.kill)  # its ranks die with it
    return job


def verdict(case: Case, seen: str) -> Result:
    run = case.folder / "run"
    steps, found = [line["step"] for line in metrics(run)], learned(run)
    wrong = sum(a != b for a, b in zip(found, truth(str(case.shared.kept))))
    return Result(len(set(range(1, STEPS + 1)) - set(steps)), len(steps) - len(set(steps)), wrong, seen)


def finish(case: Case) -> None:
    job = begun(case)
    assert job.wait() == 0, job.text()[-2000:]


def killed(case: Case) -> Result:
    """kill -9 of the launcher or of either rank."""
    job = begun(case)
    job.reach_step(case.rng.randint(2, 8))
    who = case.rng.randrange(3)
    ranks = job.ranks()
    (job.process if who == 2 else ranks[who]).kill()
    job.wait()
    finish(case)
    lines = [line for line in job.text().splitlines() if "was killed by" in line]
    return verdict(case, lines[-1] if lines else "nothing; the same command goes on")


def terminated(case: Case) -> Result:
    job = begun(case)
    job.reach_step(case.rng.randint(2, 6))
    job.process.terminate()
    assert job.wait() == REQUEUE, job.text()[-2000:]
    seen = next(line for line in job.text().splitlines() if "stopped by signal" in line)
    finish(case)
    return verdict(case, seen[24:])


def frozen(case: Case, rank: int) -> Result:
    """SIGSTOP of a rank: the others end the job, name it, and leave their stacks."""
    stall_s = round(30 * patience())  # longer than any phase of a step takes on a loaded machine
    job = begun(case, f"train.stall_timeout_s={stall_s}")
    job.reach_step(3)
    job.ranks()[rank].suspend()
    began = time.monotonic()
    assert job.wait() == 1, job.text()[-2000:]
    assert time.monotonic() - began < stall_s + 60 * patience(), "not over a minute after the watch spoke"
    message = next((line for line in job.text().splitlines() if "no progress for" in line), "")
    assert message, job.text()[-2000:]
    assert f"rank {rank}" in message.partition("no progress")[2], message
    assert (case.folder / "run" / "logs" / f"stacks-{1 - rank:05d}.txt").stat().st_size > 500
    finish(case)
    return verdict(case, message)


def out_of_memory(case: Case) -> Result:
    """A rank may take no more memory (a limit on its address space): its next larger allocation fails. It says so, the job ends,
    and with memory again it goes on. (What the kernel's OOM killer does is SIGKILL, the kind above.)"""
    job = begun(case)
    job.reach_step(case.rng.randint(2, 6))
    rank = case.rng.randrange(2)
    process = job.ranks()[rank]
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms // 2, psutil.RLIM_INFINITY))
    code = job.wait()
    records = [json.loads(path.read_text()) for path in (case.folder / "run" / "logs").glob("failure-*.json")]
    told = next((record["error"] for record in records if record["rank"] == rank), "")
    assert code != 0, job.text()[-2000:]
    # "could not create a primitive" is how oneDNN says it
    assert re.search("(?i)allocat|memory|create a primitive", told), f"rank {rank}: {records}\n{job.text()[-2000:]}"
    finish(case)
    return verdict(case, told)


def slow(case: Case) -> Result:
    """A rank that stands still for seconds again and again, each time less than the watchdog allows: it is waited for."""
    job = begun(case, f"train.stall_timeout_s={round(30 * patience())}")
    job.reach_step(2)
    ranks = job.ranks()
    for _ in range(4):
        if job.process.poll() is not None:
            break
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = case.rng.choice(ranks)
            rank.suspend()
            time.sleep(case.rng.uniform(1, 3))
            rank.resume()
            time.sleep(0.3)
    assert job.wait() == 0, job.text()[-2000:]
    return verdict(case, "nothing; samples_per_s falls")


def poisoned(case: Case) -> Result:
    """Weights that grow without bound: every rank stops at the same step, naming the samples."""
    job = begun(case, "optimizer.lr=1e30", "optimizer.warmup=0")
    assert job.wait() == 1
    [line] = [line for line in job.text().splitlines() if "error:" in line]
    return Result(wrong=int("not finite; samples rank 0" not in line), seen=line)


def second_start(case: Case) -> Result:
    """While the first is held up (its other rank stands still for a while, less than the watch allows)."""
    first = begun(case, f"train.stall_timeout_s={round(120 * patience())}")
    first.reach_step(2)
    other = first.ranks()[1]
    other.suspend()
    second = begun(case)
    code = second.wait()
    other.resume()
    assert first.wait() == 0, first.text()[-2000:]
    seen = next(line for line in first.text().splitlines() if "is being written" in line)  # both write to one log
    result = verdict(case, seen)
    result.wrong += code != 2
    return result


def another_set(case: Case) -> Result:
    """The set is replaced between two starts: refused; with checkpoint.allow_changed_data the run goes on, on the new one."""
    folder = str(case.shared.kept)
    first = begun(case, "train.steps=4")
    assert first.wait() == 0
    other = shards(folder, "other-train", 5)
    again = on(case, other)
    refused = again.wait() == 2
    seen = next(line for line in again.text().splitlines() if "was trained on a shard set" in line)
    allowed = on(case, other, "checkpoint.allow_changed_data=true")
    assert allowed.wait() == 0, allowed.text()[-2000:]
    steps = [line["step"] for line in metrics(case.folder / "run")]
    return Result(wrong=(not refused) + (steps != list(range(1, STEPS + 1))), seen=seen)


def unreadable(case: Case) -> Result:
    """Broken samples on both ranks, below the budget: named in the logs, in artifacts/quarantine.json and counted."""
    url = case.folder / "set"
    shutil.copytree(shards(str(case.shared.kept)), url)
    tar = next(url.glob("train-*.tar"))
    size = tar.stat().st_size
    with open(tar, "r+b") as stream:
        for place in range(size // 8, size, size // 4):
            stream.seek(place)
            stream.write(os.urandom(2000))
    job = on(case, str(url), "data.error_budget=1")
    assert job.wait() == 0, job.text()[-2000:]
    named = (case.folder / "run" / "artifacts" / "quarantine.json").read_text()
    last = metrics(case.folder / "run")[-1]
    count = named.count('"why"')
    return Result(
        wrong=int(count < 1 or last["data/quarantined"] != count),
        seen=f"alarm.quarantined: {count} samples, {named[:80]}",
    )


KINDS = [
    Kind("train: a rank or the launcher killed", "as undisturbed, bit by bit", 2, killed, LIMIT_S, 60),
    Kind(
        "train: a rank out of memory", "ends, says so; then as undisturbed, bit by bit", 2, out_of_memory, LIMIT_S, 60
    ),
    Kind("train: a slow rank", "waited for; as undisturbed, bit by bit", 1, slow, LIMIT_S, 60),
    Kind("train: SIGTERM", "checkpoint of the last step; then bit by bit", 1, terminated, LIMIT_S, 60),
    Kind(
        "train: the first rank frozen",
        "ends within a minute, names it, stacks kept",
        1,
        lambda case: frozen(case, 0),
        LIMIT_S,
        60,
    ),
    Kind(
        "train: another rank frozen",
        "ends within a minute, names it, stacks kept",
        1,
        lambda case: frozen(case, 1),
        LIMIT_S,
        60,
    ),
    Kind("train: weights not finite", "all ranks stop at the step, samples named", 1, poisoned, LIMIT_S, 60),
    Kind("train: a second start beside the first", "refused; the first undisturbed", 1, second_start, LIMIT_S, 60),
    Kind("train: another set at a resume", "refused, or allowed by the setting", 1, another_set, LIMIT_S, 60),
    Kind(
        "train: unreadable samples below the budget",
        "named on every rank and in MLflow's files",
        1,
        unreadable,
        LIMIT_S,
        60,
    ),
]
