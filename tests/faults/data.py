"""Faults of what is read: shards, index, manifest, checkpoints, and the way to the object store. A sample either arrives as it was
written or is named as unreadable; a checkpoint is loaded as it was saved or refused by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cluster import storage
from cluster.errors import RunFailure, UsageError
from cluster.lease import Lease
from model.config import ModelConfig
from pipeline.checkpoint import store
from pipeline.checkpoint.load import consolidated
from pipeline.checkpoint.tensors import write_tensors
from pipeline.reader.faults import RetryPolicy
from pipeline.reader.reader import Reader
from tests.fault_proxy import FaultProxy
from tests.faults.campaign import Case, Kind, Result
from tests.faults.runs import ended, fork
from tests.unit.test_reader import delivered, settings_of

IN_ORDER = {"block_samples": 1}  # many small requests, so that many can be harmed
HASTY = RetryPolicy(retries=10, base_s=0.001, cap_s=0.01, timeout_s=2.0)
Harm = Callable[[Case, Path], None]


def rows(url: str, policy: RetryPolicy | None = None, **changes: object) -> tuple[dict[str, str], dict[str, str], int]:
    """(key → hash of every sample delivered, key → reason of the unreadable ones, samples delivered twice)."""
    data = settings_of(url, error_budget=1.0, **changes)
    with Reader(data, ModelConfig(), seed=7, batch_per_rank=4, epochs=1, policy=policy) as reader:
        found = [(key, digest) for batch in delivered(reader) for _, key, digest in batch]
        bad = dict(reader.faults.quarantined)
    good = {key: digest for key, digest in found if key not in bad}
    return good, bad, len(found) - len({key for key, _ in found})


def read_harmed(case: Case, harm: Harm) -> Result:
    """Copies the set, harms it, reads one epoch and compares with the set as it was."""
    url = case.folder / "set"
    shutil.copytree(case.shared.shards, url)
    harm(case, url)
    truth = case.shared.truth
    try:
        good, bad, doubled = rows(str(url))
    except (RunFailure, UsageError, OSError) as error:  # refused as a whole, by name
        return Result(seen=str(error))
    lost = len(set(truth) - set(good) - set(bad))
    wrong = sum(truth.get(key) != digest for key, digest in good.items())
    seen = next((f"{key}: {why}" for key, why in bad.items()), "nothing: what was harmed is not read")
    return Result(lost, doubled, wrong, seen)


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def flip(case: Case, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(case.rng.randint(1, 4)):
        data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    path.write_bytes(data)


def cut(case: Case, path: Path) -> None:
    os.truncate(path, case.rng.randrange(path.stat().st_size))


def swap(case: Case, folder: Path) -> None:
    a, b = case.rng.sample(tars(folder), 2)
    aside = folder / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def duplicate(case: Case, folder: Path) -> None:
    a, b = case.rng.sample(tars(folder), 2)
    shutil.copyfile(a, b)


def one(harm: Callable[[Case, Path], None]) -> Harm:
    return lambda case, folder: harm(case, case.rng.choice(tars(folder)))


def at(name: str, harm: Callable[[Case, Path], None]) -> Harm:
    return lambda case, folder: harm(case, folder / name)


def gone(case: Case, path: Path) -> None:
    path.unlink()


def replaced_under_a_reader(case: Case) -> Result:
    """Another set under the same name while a reader goes through the first."""
    url, truth = case.folder / "set", case.shared.truth
    shutil.copytree(case.shared.shards, url)
    data = settings_of(str(url), error_budget=1.0)
    found: list[tuple[str, str]] = []
    try:
        with Reader(data, ModelConfig(), seed=7, batch_per_rank=2, epochs=1) as reader:
            found += [(key, digest) for batch in delivered(reader, case.rng.randint(1, 3)) for _, key, digest in batch]
            for tar in tars(url):
                tar.unlink()
            for path in Path(case.shared.other).iterdir():
                if path.is_file():
                    shutil.copyfile(path, url / path.name)
            found += [(key, digest) for batch in delivered(reader) for _, key, digest in batch]
            bad = dict(reader.faults.quarantined)
    except (RunFailure, UsageError, OSError) as error:
        return Result(wrong=sum(truth.get(key) != digest for key, digest in found), seen=str(error))
    good = {key: digest for key, digest in found if key not in bad}
    seen = next((f"{key}: {why}" for key, why in bad.items()), "nothing: what was open went on being read")
    return Result(
        len(set(truth) - set(good) - set(bad)), 0, sum(truth.get(key) != digest for key, digest in good.items()), seen
    )


def on_the_way(case: Case, fault: str) -> Result:
    """A real S3 server behind a proxy that breaks a third of the answers, at random."""
    broken = {n for n in range(400) if case.rng.random() < 0.34}
    with FaultProxy(case.shared.s3.endpoint, lambda n: fault if n in broken and n - 1 not in broken else "ok") as proxy:
        try:
            with case.shared.endpoint(proxy.endpoint):
                good, bad, doubled = rows(case.shared.s3_shards, HASTY, range_mb=1, read_ahead_mb=4, **IN_ORDER)
        except (RunFailure, UsageError) as error:
            if fault != "wrong":  # a byte changed on the way to the index: refused by name
                raise
            return Result(seen=str(error))
        hit = proxy.done[fault]
    truth = case.shared.truth_in_order
    lost, wrong = len(set(truth) - set(good)), sum(truth.get(key) != digest for key, digest in good.items())
    return Result(
        lost + len(bad), doubled, wrong, f"nothing ({hit} faults retried and counted under data/faults)" if hit else ""
    )


FACTS = {
    "format": store.FORMAT, "step": 5, "samples": 40, "adam_step": 5, "device_hours": 0.25,
    "reader": {"schema": 1, "samples": 40, "epoch": 2, "position": 4, "seed": 7},
}  # fmt: skip
"""What a checkpoint's manifest says that no tensor depends on: where the run goes on."""


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"backbone.a": (4, 8), "backbone.b": (40,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_checkpoint(url: str, step: int = 5, write: store.Write = storage.write_atomic) -> dict[str, torch.Tensor]:
    """A committed checkpoint of two parameters in two files, their values by its step; returns its teacher's weights."""
    whole = weights_of(step)
    shapes = {name: tuple(value.shape) for name, value in whole.items()}
    work = store.step_url(url, step)
    storage.make_folder(work)
    parameters: dict[str, dict[str, object]] = {
        name: {"shape": list(shape), "pieces": []} for name, shape in shapes.items()
    }
    files = {}
    for rank in range(2):
        file = f"rank-{rank:05d}.safetensors"
        tensors = {}
        for name, value in whole.items():
            half = value.numel() // 2
            tensors[f"teacher/{name}@{rank * half}"] = value.flatten()[rank * half : (rank + 1) * half].clone()
            parameters[name]["pieces"].append([rank * half, half, file])  # type: ignore[attr-defined]
        files[file] = write_tensors(storage.join(work, file), tensors)
    store.commit(url, step, {**FACTS, "step": step, "parameters": parameters, "files": files}, write)
    return whole


def killed_in_a_save(case: Case, s3: bool = False, lags: bool = False) -> Result:
    """Saves one after another, killed at random moments; each start clears up first and goes on after the newest."""
    url, told = (case.shared.s3_prefix() if s3 else str(case.folder / "run")), case.folder / "told"
    checkpoints = storage.join(url, "checkpoints")

    def save() -> int:
        if lags:
            lag_behind(case, checkpoints)
        lease = Lease.acquire(url)
        store.clear_leftovers(checkpoints, write=lease.write, check=lease.check)
        found = store.committed(checkpoints)
        newest = store.open_checkpoint(found[0]).step if found else 0
        for step in range(newest + 1, newest + 1000):
            make_checkpoint(checkpoints, step, lease.write)
            with open(told, "a") as file:
                file.write(f"{step}\n")
            store.retain(checkpoints, 2, 0, lease.check)
            store.clear_leftovers(checkpoints, before=step, check=lease.check)
        return 1

    lost = wrong = newest = 0
    for number in range(4):
        said, child = told.stat().st_size if told.exists() else 0, fork(save)
        while number % 2 == 0 and not (
            told.exists() and told.stat().st_size > said
        ):  # else wherever it is, also at its start
            time.sleep(0.005)
        time.sleep(0.05 + case.rng.random() * (1.5 if s3 else 0.15))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        promised = int(told.read_text().split()[-1]) if told.exists() else 0
        found = store.committed(checkpoints)
        newest = store.open_checkpoint(found[0]).step if found else 0
        lost += max(promised - newest, 0)
        if found:
            weights, _ = consolidated(found[0])
            wrong += sum(not torch.equal(weights[name], value) for name, value in weights_of(newest).items())
    return Result(lost, 0, wrong, f"nothing; goes on from step {newest}")


def lag_behind(case: Case, checkpoints: str) -> None:
    """From now on listings of this process are up to half a second old."""
    real, held = storage.list_tree, [(time.monotonic(), storage.list_tree(checkpoints))]

    def look() -> None:
        while True:
            with contextlib.suppress(Exception):
                held.append((time.monotonic(), real(checkpoints)))
            time.sleep(0.02)

    def stale(url: str) -> list[str]:
        return case.rng.choice([names for at, names in held[-200:] if at > time.monotonic() - 0.5] or [real(url)])

    threading.Thread(target=look, daemon=True).start()
    storage.list_tree = stale


def load_harmed(case: Case, harm: Harm) -> Result:
    url = str(case.folder / "checkpoints")
    whole = make_checkpoint(url)
    harm(case, Path(url, "step-00000005"))
    try:
        weights, checkpoint = consolidated(url)
    except (RunFailure, UsageError) as error:
        return Result(seen=str(error))
    wrong = sum(not torch.equal(weights[name], value) for name, value in whole.items())
    return Result(
        wrong=wrong + sum(checkpoint.manifest.get(name) != value for name, value in FACTS.items()),
        seen="nothing: loaded as saved",
    )


def file_of(harm: Callable[[Case, Path], None]) -> Harm:
    return lambda case, folder: harm(case, case.rng.choice(sorted(folder.glob("*.safetensors"))))


def swap_files(case: Case, folder: Path) -> None:
    a, b = sorted(folder.glob("*.safetensors"))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def reading(name: str, count: int, harm: Harm) -> Kind:
    holds = "every sample as written, or named as unreadable, or the set refused"
    return Kind(name, holds, count, lambda case: read_harmed(case, harm))


def loading(name: str, count: int, harm: Harm) -> Kind:
    return Kind(name, "loaded as saved, or refused by name", count, lambda case: load_harmed(case, harm))


KINDS = [
    Kind("killed in a save or commit", "what was committed stands, and is loaded as saved", 10, killed_in_a_save),
    Kind("killed in a save or commit, on S3", "what was committed stands, and is loaded as saved", 4, lambda case: killed_in_a_save(case, True), cost_s=6),
    Kind("S3 lists late, while saves are killed", "what was committed stands, and is loaded as saved", 4, lambda case: killed_in_a_save(case, True, True), cost_s=6),
    reading("bits of a shard flipped", 20, one(flip)),
    reading("a shard cut short", 12, one(cut)),
    reading("a shard missing", 8, one(gone)),
    reading("two shards swapped", 8, swap),
    reading("a shard in place of another", 8, duplicate),
    reading("bits of the index flipped", 16, at("index.parquet", flip)),
    reading("the index cut short", 8, at("index.parquet", cut)),
    reading("bits of the manifest flipped", 16, at("manifest.json", flip)),
    reading("the manifest cut short", 8, at("manifest.json", cut)),
    reading("bits of the mapped index flipped", 12, at("columns.safetensors", flip)),
    reading("the mapped index cut short", 6, at("columns.safetensors", cut)),
    reading("index or manifest missing", 6, lambda case, folder: gone(case, folder / case.rng.choice(["index.parquet", "columns.safetensors", "manifest.json"]))),
    Kind("a set replaced under a reader", "no sample of the other set passes for one of ours", 8, replaced_under_a_reader),
    *[
        Kind(f"S3 answers {fault}", "every sample as written", 5, lambda case, fault=fault: on_the_way(case, fault), cost_s=3)
        for fault in ("429", "500", "503", "reset", "truncated", "cut_head", "wrong", "stall")
    ],
    loading("bits of a checkpoint's tensors flipped", 16, file_of(flip)),
    loading("a checkpoint's file cut short", 8, file_of(cut)),
    loading("a checkpoint's file missing", 4, file_of(gone)),
    loading("a checkpoint's files swapped", 2, swap_files),
    loading("bits of a checkpoint's manifest flipped", 20, at("manifest.json", flip)),
    loading("a checkpoint's manifest cut short", 8, at("manifest.json", cut)),
]  # fmt: skip
