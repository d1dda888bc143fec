"""The tensor format, what counts as a checkpoint, and what damage is recognised."""

from __future__ import annotations

import functools
import json
import os
import uuid
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cluster import storage
from cluster.errors import Fenced, RunFailure, UsageError
from cluster.lease import Lease
from pipeline.checkpoint import plan, save, store, tensors
from pipeline.checkpoint.load import consolidated, open_files
from pipeline.checkpoint.save import Saver
from pipeline.checkpoint.tensors import DTYPES, TensorFile, file_digest, write_tensors
from pipeline.config import CheckpointConfig


def test_stock_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    held = {f"t/{name}": (torch.arange(6) % 2).reshape(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    held["empty"] = torch.zeros(0)
    facts = write_tensors(str(tmp_path / "f.safetensors"), held)
    assert {name: facts[name] for name in ("bytes", "sha256")} == {
        "bytes": (tmp_path / "f.safetensors").stat().st_size,
        "sha256": file_digest(str(tmp_path / "f.safetensors")),
    }
    for name, tensor in load_file(tmp_path / "f.safetensors").items():
        assert torch.equal(tensor, held[name])
        assert torch.equal(TensorFile(str(tmp_path / "f.safetensors")).read(name), held[name])


def write(
    url: str,
    step: int,
    cuts: list[int],
    token: str = "t",
    put: store.Write = storage.write_atomic,
    base: float | None = None,
) -> torch.Tensor:
    """A one-parameter checkpoint `w` [4, 5], cut at `cuts`, one file per piece. base: its first element; None: the step."""
    w = torch.arange(20.0) + (step if base is None else base)
    edges = sorted({0, 20, *cuts})
    pieces, files = [], {}
    for i, (a, b) in enumerate(pairwise(edges)):
        name = store.file_name(i, token)
        kinds = {f"{kind}/w@{a}": w[a:b] + k for k, kind in enumerate(("student", "exp_avg", "exp_avg_sq", "teacher"))}
        files[name] = write_tensors(f"{store.step_url(url, step)}/{name}", kinds)
        pieces.append([a, b - a, name])
    manifest: dict[str, Any] = {
        "format": store.FORMAT, "step": step, "samples": step, "adam_step": step, "config": {}, "files": files,
        "parameters": {"w": {"shape": [4, 5], "pieces": pieces}},
    }  # fmt: skip
    store.commit(url, step, manifest, put)
    return w


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 19), max_size=6), st.integers(0, 19), st.integers(1, 20))
def test_any_range_from_any_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, size: int
) -> None:
    url = str(tmp_path_factory.mktemp("c"))
    w = write(url, 1, cuts)
    size = min(size, 20 - start)
    with open_files(store.open_checkpoint(store.committed(url)[0])) as files:
        assert torch.equal(files.read("student", "w", start, size), w[start : start + size])
        assert torch.equal(files.read("teacher", "w", start, size), w[start : start + size] + 3)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 19), max_size=6),
    st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20)), min_size=1, max_size=3),
    st.sampled_from([4, 12, 1 << 20]),
    st.sampled_from([0, 40, 1 << 20]),
)
def test_any_parts_are_read_by_ranges_and_alone(
    cuts: list[int], ranges: list[tuple[int, int]], check_bytes: int, gap: int
) -> None:
    """From an object store only what is asked for is fetched: the rest of the file on this machine is empty."""
    url = f"memory://{uuid.uuid4().hex}/checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHECK_BYTES", check_bytes)
        patch.setattr(plan, "GAP_BYTES", gap)
        w = write(url, 1, cuts)
        checkpoint = store.open_checkpoint(store.committed(url)[0])
        needs = [("w", start, min(size, 20 - start)) for start, size in ranges]
        with open_files(checkpoint, plan.reads({"w": checkpoint.spans("w")}, needs)) as files:
            for _, start, size in needs:
                for k, kind in enumerate(("student", "exp_avg", "exp_avg_sq", "teacher")):
                    assert torch.equal(files.read(kind, "w", start, size), w[start : start + size] + k)


@pytest.mark.parametrize("local", [True, False])
def test_a_damaged_part_is_named_and_damage_elsewhere_is_not_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr(tensors, "CHECK_BYTES", 16)  # four elements
    monkeypatch.setattr(plan, "GAP_BYTES", 0)
    url = str(tmp_path / "c") if local else f"memory://{uuid.uuid4().hex}/c"
    w = write(url, 1, [])
    checkpoint = store.open_checkpoint(store.committed(url)[0])
    place = f"{checkpoint.url}/rank-00000.t.safetensors"
    data = bytearray(storage.read_bytes(place))
    data[-1] ^= 1  # in the last block of the last tensor, teacher/w
    storage.write_atomic(place, bytes(data))

    def load(start: int, size: int) -> torch.Tensor:
        with open_files(checkpoint, plan.reads({"w": checkpoint.spans("w")}, [("w", start, size)])) as files:
            return files.read("teacher", "w", start, size)

    assert torch.equal(load(3, 13), w[3:16] + 3)
    with pytest.raises(RunFailure, match=r"rank-00000\.t\.safetensors is damaged: teacher/w@0 does not match"):
        load(3, 14)
    data[20] ^= 1
    storage.write_atomic(place, bytes(data))
    with pytest.raises(RunFailure, match=r"rank-00000\.t\.safetensors is damaged: its header"):
        load(0, 1)


def test_consolidated_from_a_run_directory(tmp_path: Path) -> None:
    w = write(str(tmp_path / "checkpoints"), 3, [7])
    weights, checkpoint = consolidated(str(tmp_path))
    assert checkpoint.step == 3
    assert torch.equal(weights["w"], (w + 3).reshape(4, 5))


def test_newest_first_and_leftovers_are_no_checkpoints(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (100, 5, 20):
        write(url, step, [])
    for name in ("step-00000200", ".writing-step-00000300-x"):  # the second: of a version that renamed folders
        (tmp_path / name).mkdir()
        (tmp_path / name / store.file_name(0, "dead")).write_bytes(b"half")
    assert [store.open_checkpoint(u).step for u in store.committed(url)] == [100, 20, 5]
    assert (tmp_path / "LATEST").read_text() == "step-00000020\n"
    store.clear_leftovers(url)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", *(f"step-{n:08d}" for n in (5, 20, 100))]


def test_retention(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write(str(tmp_path), step, [])
    store.retain(str(tmp_path), 2, 30)
    assert [store.open_checkpoint(u).step for u in store.committed(str(tmp_path))] == [70, 60, 30]


def test_rewriting_a_step_replaces_it(tmp_path: Path) -> None:
    write(str(tmp_path), 10, [3, 9])
    write(str(tmp_path), 10, [], token="u")
    assert sorted(p.name for p in (tmp_path / "step-00000010").iterdir()) == [
        "manifest.json",
        "rank-00000.u.safetensors",
    ]


def load_whole(url: str) -> None:
    checkpoint = store.open_checkpoint(url)
    store.check_sizes(checkpoint)
    with open_files(checkpoint):
        pass


def test_a_manifest_without_a_digest_of_an_older_version_is_read(tmp_path: Path) -> None:
    write(str(tmp_path), 10, [])
    path = tmp_path / "step-00000010" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["digest"]
    path.write_text(json.dumps(tree))
    assert store.open_checkpoint(str(path.parent)).step == 10


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "gap", "overlap", "step", "no manifest"])
def test_damage_is_recognised(tmp_path: Path, damage: str) -> None:
    write(str(tmp_path), 10, [6])
    folder = tmp_path / "step-00000010"
    file, manifest = folder / "rank-00001.t.safetensors", folder / "manifest.json"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif damage == "gap":
        tree = json.loads(manifest.read_text())
        tree["parameters"]["w"]["pieces"].pop()
        del tree["digest"]  # as a writer of nonsense would have it
        manifest.write_text(json.dumps(tree))
    elif damage == "overlap":
        tree = json.loads(manifest.read_text())
        tree["parameters"]["w"]["pieces"][0][1] += 1
        tree["parameters"]["w"]["pieces"][1][1] -= 1
        del tree["digest"]
        manifest.write_text(json.dumps(tree))
    elif damage == "step":  # one digit, that no tensor depends on
        manifest.write_text(manifest.read_text().replace('"samples": 10', '"samples": 11'))
    else:
        manifest.unlink()
    with pytest.raises(RunFailure) as caught:
        load_whole(str(folder))
    assert "step-00000010" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no committed checkpoint"):
        store.resolve(str(tmp_path))


def test_memory_and_object_stores_commit_by_manifest() -> None:
    url = "memory://bucket/run/checkpoints"
    w = write(url, 4, [11])
    assert torch.equal(consolidated("memory://bucket/run", "student")[0]["w"], w.reshape(4, 5))
    store.remove(store.committed(url)[0])
    assert store.committed(url) == []


class Killed(BaseException):
    """The process ends here."""


class Doors:
    """The changes that a commit makes to the storage; dies before or after one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, deadline: int) -> None:
        self._deadline, self._calls, self._begun = deadline, 0, False
        for name in ("remove_all", "remove"):
            patch.setattr(storage, name, functools.partial(self._through, getattr(storage, name)))

    def put(self, url: str, data: bytes) -> None:
        self._begun = True
        self._through(storage.write_atomic, url, data)

    def _through(self, change: Any, *args: Any) -> None:
        self._count()
        change(*args)
        self._count()

    def _count(self) -> None:
        if self._begun and self._calls == self._deadline:
            raise Killed
        self._calls += self._begun


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_a_crash_anywhere_in_a_commit_loses_no_checkpoint(tmp_path: Path, local: bool, replaces: bool) -> None:
    """Before and after every change that a commit makes to the storage: what stood there stands, or the new one does."""
    new = torch.arange(20.0) + 100
    for deadline in range(20):
        url = str(tmp_path / str(deadline)) if local else f"memory://{uuid.uuid4().hex}/checkpoints"
        old = write(url, 10 if replaces else 5, [3, 9], "old")
        with pytest.MonkeyPatch.context() as patch:
            try:
                write(url, 10, [7], "new", Doors(patch, deadline).put, 100.0)
                ended = True
            except Killed:
                ended = False
        for _ in range(2):  # as the next start finds it, and after it has cleared up
            weights, checkpoint = consolidated(store.committed(url)[0], "student")
            store.check_sizes(checkpoint)
            assert any(torch.equal(weights["w"].flatten(), whole) for whole in (old, new))
            store.clear_leftovers(url)
        assert len(storage.list_names(checkpoint.url)) == 1 + len(checkpoint.manifest["files"])
        if ended:
            assert torch.equal(weights["w"].flatten(), new)
            assert deadline >= 4
            return
    raise AssertionError("the commit never ended")


@pytest.mark.parametrize("replaces", [True, False])
def test_an_overtaken_start_cannot_bring_its_commit_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """It is frozen right before the rename that commits; its successor starts, and it goes on."""
    url, rename = str(tmp_path / "checkpoints"), os.replace
    first = Lease.acquire(str(tmp_path))
    old = write(url, 10 if replaces else 5, [3], "a", first.write)

    def frozen(source: str, target: str) -> None:
        if target.endswith(store.MANIFEST):
            monkeypatch.setattr(os, "replace", rename)
            second = Lease.acquire(str(tmp_path))
            store.clear_leftovers(url, write=second.write)
        rename(source, target)

    monkeypatch.setattr(os, "replace", frozen)
    with pytest.raises(Fenced, match="a later start"):
        write(url, 10, [], "b", first.write, 100.0)
    [found] = store.committed(url)
    assert torch.equal(consolidated(found, "student")[0]["w"].flatten(), old)
    assert not list(Path(url).rglob("*.b.*"))


def no_engine() -> Any:
    """What a save asks of an engine, of a model without parameters to own."""
    module = torch.nn.Linear(1, 1)
    return SimpleNamespace(
        state=SimpleNamespace(pieces=[], adam_step=1), layout=SimpleNamespace(ep=1, zero_stage=2), student=module,
        teacher=SimpleNamespace(module=module),
    )  # fmt: skip


@pytest.mark.parametrize("overtaken", [True, False])
def test_an_overtaken_start_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overtaken: bool
) -> None:
    """It is frozen while it writes its file, and goes on: where a later start has come, the file goes. A look at the lease that fails
    for another reason proves no later start, and takes nothing away."""
    url, lease = f"{tmp_path}/checkpoints", Lease.acquire(str(tmp_path))
    saver = Saver(url, CheckpointConfig(), 0, 1, lambda: None, lease=lease)

    def frozen(place: str, held: dict[str, torch.Tensor]) -> dict[str, Any]:
        facts = write_tensors(place, held)
        if overtaken:
            Lease.acquire(str(tmp_path))
        else:
            monkeypatch.setattr(saver, "_check", away)
        return facts

    def away() -> None:
        raise OSError("the storage does not answer")

    monkeypatch.setattr(save, "write_tensors", frozen)
    saver.save(no_engine(), 5, 40, {})
    with pytest.raises(Fenced if overtaken else RunFailure, match="a later start" if overtaken else "does not answer"):
        saver.wait()
    assert store.committed(url) == []
    assert [path.suffix for path in Path(url).rglob("*") if path.is_file()] == ([] if overtaken else [".safetensors"])


def test_an_overtaken_start_sweeps_nothing_of_its_successors(tmp_path: Path) -> None:
    """It was frozen before it cleared up at its start, or after its commit: what its successor is writing looks left over to it."""
    url = str(tmp_path / "checkpoints")
    first = Lease.acquire(str(tmp_path))
    write(url, 5, [3], "a", first.write)
    write(url, 6, [3], "a", first.write)
    Lease.acquire(str(tmp_path))
    under_way = Path(store.step_url(url, 4), "rank-00000.b.safetensors")
    under_way.parent.mkdir()
    under_way.write_bytes(b"a save under way")
    for sweep in (
        lambda: store.clear_leftovers(url, check=first.check),
        lambda: store.clear_leftovers(url, before=6, check=first.check),
        lambda: store.retain(url, 1, 0, first.check),
    ):
        with pytest.raises(Fenced):
            sweep()
    assert under_way.exists()
    assert len(store.committed(url)) == 2


def test_a_listing_that_lags_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not show the manifest of the newest one yet."""
    write(str(tmp_path), 5, [3])
    listed = [name for name in storage.list_tree(str(tmp_path)) if not name.endswith(store.MANIFEST)]
    monkeypatch.setattr(storage, "list_tree", lambda url: listed)
    store.clear_leftovers(str(tmp_path))
    assert len(store.committed(str(tmp_path))) == 1


def test_a_fenced_writer_commits_nothing(tmp_path: Path) -> None:
    """A start of the run that a later one has taken over from may write files, but no checkpoint appears."""

    def fenced() -> None:
        raise RunFailure("a later start of this run writes here now")

    saver = Saver(str(tmp_path), CheckpointConfig(), 0, 1, fenced)
    saver.save(no_engine(), 5, 40, {})
    with pytest.raises(RunFailure, match="a later start"):
        saver.wait()
    assert store.committed(str(tmp_path)) == []
    assert not (tmp_path / "LATEST").exists()
    Saver(str(tmp_path), CheckpointConfig(), 0, 1, lambda: None)  # the next start clears up
    assert list(tmp_path.iterdir()) == []
