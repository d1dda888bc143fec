"""Faults of a run and its directory. The trainer is a forked process that keeps the real one's conventions (lease, metrics,
checkpoints, requeue code) and whose weights are a chain of hashes: one step lost, doubled or redone otherwise changes the last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster import storage
from cluster.errors import Fenced
from cluster.exit_codes import DONE, FENCED, REQUEUE
from cluster.metrics import read_lines
from cluster.rundir import RunDir
from tests.faults.campaign import Case, Kind, NotInjected, Result

STEPS, EVERY = 30, 4
SEGMENT = re.compile(r"/metrics/(\d{6})-[\d-]+\.jsonl$")


def weight_after(step: int, before: str) -> str:
    return hashlib.sha256(f"{before} {step}".encode()).hexdigest()


def undisturbed(steps: int = STEPS) -> list[str]:
    """The weights after each step, from 0."""
    found = [""]
    for step in range(1, steps + 1):
        found.append(weight_after(step, found[-1]))
    return found


def trainer(url: str, step_s: float = 0.002, steps: int = STEPS) -> int:
    try:
        return train(url, step_s, steps)
    except Fenced:
        return FENCED


def train(url: str, step_s: float, steps: int) -> int:
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    run = RunDir(url)
    newest = storage.join(run.checkpoints_url, "LATEST")
    run.claim()
    kept = json.loads(storage.read_bytes(newest)) if storage.exists(newest) else {"step": 0, "weights": ""}
    step, weights = kept["step"], kept["weights"]
    run.start_metrics(step)
    while step < steps:
        step += 1
        weights = weight_after(step, weights)
        time.sleep(step_s)
        loss = int(weights[:8], 16) / 2**32
        run.append_metrics({"step": step, "samples": step * 8, "loss": loss, "weights": weights})
        if stop or step % EVERY == 0 or step == steps:
            run.sync()
            run.write("checkpoints/LATEST", json.dumps({"step": step, "weights": weights}).encode())
        if stop:
            return REQUEUE
    run.write("tracked.json", json.dumps({"status": "FINISHED", "by": os.getpid()}).encode())
    run.close()
    return DONE


def fork(job: Callable[[], int], said: Path | None = None) -> int:
    """Process id of a child that runs `job` and ends with its code; 1, and the error in `said`, if it raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(0)
        code = job()
    except BaseException as error:
        if said is not None:
            said.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(url: str) -> int:
    """Starts the run until it is done; returns the number of starts."""
    for number in range(1, 20):
        if ended(fork(lambda: trainer(url, 0.0))) == DONE:
            return number
    raise AssertionError("the run never ends")


def verdict(url: str, seen: str = "", steps: int = STEPS) -> Result:
    """Compares metrics and last weights with those of a run that nobody disturbed. On a file system every line of the file counts;
    on an object store what readers make of the segments does, since a resume leaves there what it has made void."""
    if storage.is_local(url):
        found = storage.read_bytes(RunDir(url).metrics_url).splitlines()
    else:
        found = [line for _, line in read_lines(url)]
    lines = [json.loads(line) for line in found]
    numbers, truth = [line["step"] for line in lines], undisturbed(steps)
    kept = json.loads(storage.read_bytes(storage.join(url, "checkpoints", "LATEST")))
    wrong = sum(line["weights"] != truth[line["step"]] for line in lines if line["step"] <= steps)
    wrong += kept != {"step": steps, "weights": truth[-1]}
    return Result(len(set(range(1, steps + 1)) - set(numbers)), len(numbers) - len(set(numbers)), wrong, seen)


def place(case: Case, s3: bool) -> str:
    return case.shared.s3_prefix() if s3 else str(case.folder / "run")


def at_work(url: str, child: int) -> None:
    """Returns when the run has logged a step (on an object store: saved one): a fault before that meets nothing. Or when it is over."""
    newest = storage.join(url, "checkpoints", "LATEST")
    while not (storage.exists(newest) if "://" in url else RunDir(url).last_step()):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)


def killed(case: Case, s3: bool = False) -> Result:
    """The second time wherever it is, also before it has done anything."""
    url = place(case, s3)
    for number in range(3):
        child = fork(lambda: trainer(url))
        if number != 1:
            at_work(url, child)
        time.sleep(case.rng.random() * (1.5 if s3 else 0.12))
        os.kill(child, signal.SIGKILL)
        ended(child)
    return verdict(url, f"nothing; the same command goes on ({finish(url)} start)")


def terminated(case: Case) -> Result:
    url = place(case, False)
    child = fork(lambda: trainer(url))
    at_work(url, child)
    time.sleep(case.rng.random() * 0.05)
    os.kill(child, signal.SIGTERM)
    code = ended(child)
    stopped = (
        json.loads(storage.read_bytes(storage.join(url, "checkpoints", "LATEST")))["step"] if code == REQUEUE else None
    )
    result = verdict(url, f"exit code {REQUEUE}, checkpoint of the last step") if code == DONE else None
    if result is None:
        assert code in (REQUEUE, -signal.SIGTERM), code  # the latter: before the handler was set
        assert stopped is None or stopped == RunDir(url).last_step()
        finish(url)
        result = verdict(url, f"exit code {REQUEUE}, checkpoint of the last step")
    return result


def frozen(case: Case, s3: bool = False) -> Result:
    """Stopped at a random moment; a successor finishes the run; thawed, it must not change one byte."""
    url = place(case, s3)
    child = fork(lambda: trainer(url, 0.003, 10_000))
    while (
        RunDir(url).read_writer() is None
    ):  # one that is stopped before it takes the directory is a late start, no predecessor
        time.sleep(0.005)
    time.sleep(0.02 + case.rng.random() * (1.2 if s3 else 0.1))
    os.kill(child, signal.SIGSTOP)
    finish_after_takeover(url)
    before, read = content(url), read_lines(url)
    os.kill(child, signal.SIGCONT)
    code = ended(child)
    assert code == FENCED, code
    result = verdict(url, f"exit code {FENCED}: a later start of this run writes here now; this one stops")
    after = content(url)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if (
        s3
    ):  # what was on its way to the server when it was stopped arrives, under a name of its own, and counts for nothing
        changed -= {name for name in changed - set(before) if is_of_an_earlier_start(name, before)}
    result.wrong += len(changed) + (read_lines(url) != read)
    result.seen += f" (changed: {sorted(changed)})" if changed else ""
    return result


def is_of_an_earlier_start(name: str, before: dict[str, bytes]) -> bool:
    """Whether an object is a segment of metrics of a start before the newest one."""
    starts = [int(found[1]) for found in map(SEGMENT.search, before) if found]
    found = SEGMENT.search(name)
    return found is not None and int(found[1]) < max(starts)


def finish_after_takeover(url: str) -> None:
    """The predecessor ran with more steps: the successor goes on from its checkpoint if that lies within STEPS, else anew."""
    newest = storage.join(url, "checkpoints", "LATEST")
    if storage.exists(newest) and json.loads(storage.read_bytes(newest))["step"] > STEPS:
        storage.remove(newest)
    finish(url)


def content(url: str) -> dict[str, bytes]:
    fs, path = storage.filesystem(url)
    return {name: fs.cat_file(name) for name in fs.find(path)}


def at_once(case: Case, s3: bool = False) -> Result:
    """Several starts on one directory at the same moment: one goes on, the others end as fenced."""
    url = place(case, s3)
    said = case.folder / "said"
    codes = [ended(child) for child in [fork(lambda: trainer(url, 0.005), said) for _ in range(3)]]
    # who ends before anybody took it over is done, too
    assert DONE in codes, codes
    assert set(codes) <= {DONE, FENCED}, f"{codes}, {said.read_text() if said.exists() else ''}"
    return verdict(url, "exit code 86 for all but one, naming host, process and job of the one that goes on")


def torn(case: Case) -> Result:
    url = place(case, False)
    child = fork(lambda: trainer(url))
    at_work(url, child)
    time.sleep(case.rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    ended(child)
    path = Path(RunDir(url).metrics_url)
    if path.exists():
        newest = Path(url, "checkpoints", "LATEST")
        saved = json.loads(newest.read_text())["step"] if newest.exists() else 0
        data = path.read_bytes()
        # lines up to the checkpoint were synced before it: a power cut can tear what came later only
        kept = (
            sum(len(line) + 1 for line in data.splitlines() if json.loads(line)["step"] <= saved)
            if data.endswith(b"\n")
            else 0
        )
        path.write_bytes(data[: case.rng.randint(kept, len(data))] if kept else data)
    finish(url)
    return verdict(url, "nothing")


def full_disk(case: Case) -> Result:
    """The file system has no room left: a real one of 48 kB where we may mount, else a limit on the size of a file."""
    url, said = place(case, False), case.folder / "said"
    os.makedirs(url)
    limit = case.rng.randint(200, 3000)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return trainer(url, 0.0)

    mounted = (
        os.getuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", url], check=False, capture_output=True
        ).returncode
    )
    try:
        if mounted:
            filler = Path(url, "filler")
            filler.write_bytes(b"x" * case.rng.randint(4096, 12288))
            with open(Path(url, "rest"), "wb", buffering=0) as rest, contextlib.suppress(OSError):
                while True:  # until it is full
                    rest.write(b"x" * 4096)
            filler.unlink()
        code = ended(fork(lambda: trainer(url, 0.0) if mounted else limited(), said))
        if code != DONE:
            assert said.exists(), "no reason was given"
            assert "No space left" in said.read_text() or "too large" in said.read_text(), said.read_text()
        if mounted:
            Path(url, "rest").unlink()
        finish(url)
        return verdict(url, said.read_text() if said.exists() else "")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", url], check=True)


def read_only(case: Case) -> Result:
    """The file system is read-only when the run is started again (as Linux leaves a disk that failed), and later is not."""
    url, said = place(case, False), case.folder / "said"
    os.makedirs(url)
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", url], check=False, capture_output=True).returncode
    ):
        raise NotInjected("needs the right to mount")
    try:
        child = fork(lambda: trainer(url))
        time.sleep(case.rng.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        ended(child)
        subprocess.run(["mount", "-o", "remount,ro", url], check=True)
        assert ended(fork(lambda: trainer(url), said)) == 1
        assert "Read-only file system" in said.read_text(), said.read_text()
        subprocess.run(["mount", "-o", "remount,rw", url], check=True)
        finish(url)
        return verdict(url, said.read_text())
    finally:
        subprocess.run(["umount", "-l", url], check=True)


def clock_jumps(case: Case) -> Result:
    """Every look at the wall clock is off by up to a year, differently each time: nothing may depend on it."""
    url, real = place(case, False), time.time

    def jumping() -> int:
        time.time = lambda: real() + case.rng.uniform(-3e7, 3e7)
        return trainer(url)

    child = fork(jumping)
    at_work(url, child)
    time.sleep(case.rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    ended(child)
    finish(url)
    return verdict(url, "nothing")


def outage(case: Case, seconds: float = 1.0) -> Result:
    """The S3 server dies under a run (kill -9) and comes back with its data."""
    url, said, server = place(case, True), case.folder / "said", case.shared.s3
    child = fork(lambda: trainer(url, 0.01), said)
    time.sleep(0.3 + case.rng.random())
    server.kill()
    try:
        time.sleep(seconds + case.rng.random())
    finally:
        server.start()
    ended(child)
    finish(url)
    return verdict(url, said.read_text() if said.exists() else "nothing")


KINDS = [
    Kind("trainer killed (kill -9), three times", "metrics and weights equal the undisturbed run", 16, killed),
    Kind("SIGTERM", "checkpoint of the last step; then as undisturbed", 12, terminated),
    Kind("frozen, taken over, thawed", "it changes no byte; the run is the successor's", 16, frozen),
    Kind("three starts on one directory at once", "one goes on, each step once", 12, at_once),
    Kind("metrics torn at any byte", "each step once, same values", 16, torn),
    Kind("disk full", "a clean stop with the reason; then as undisturbed", 8, full_disk),
    Kind("file system turns read-only", "a clean stop with the reason; then as undisturbed", 6, read_only),
    Kind("clock jumps by up to a year", "as undisturbed", 10, clock_jumps),
    Kind(
        "trainer killed (kill -9), on S3",
        "metrics and weights equal the undisturbed run",
        6,
        lambda case: killed(case, True),
        cost_s=5,
    ),
    Kind(
        "frozen, taken over, thawed, on S3",
        "it changes no object, and what was on its way to the server counts for nothing",
        6,
        lambda case: frozen(case, True),
        cost_s=5,
    ),
    Kind("three starts at once, on S3", "one goes on, each step once", 4, lambda case: at_once(case, True), cost_s=5),
    Kind("S3 server killed under a run", "a clean stop or none; then as undisturbed", 3, outage, cost_s=10),
    Kind(
        "S3 away for a minute",
        "a clean stop or none; then as undisturbed",
        1,
        lambda case: outage(case, 60.0),
        limit_s=180,
        cost_s=75,
    ),
]

__all__ = ["KINDS"]
