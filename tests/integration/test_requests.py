"""How many requests start, save and resume make, as a function of the ranks: on a storage that counts, for worlds up to 1,024.

Every rank of the world runs its own part, one after another in this process; what goes between ranks (the job's key-value store,
broadcasts) is no request to the storage.
"""

from __future__ import annotations

import uuid
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from cluster import storage
from pipeline.checkpoint import save, store
from pipeline.checkpoint.load import open_files, wanted_parts
from pipeline.checkpoint.save import Saver
from pipeline.config import CheckpointConfig, DataConfig
from pipeline.parallel.pieces import Group, owned
from pipeline.reader import shared
from pipeline.reader import table as tables
from tests.counting import CountingFileSystem as Counting
from tests.sites import make_site, write_shard_set

pytestmark = pytest.mark.integration

WORLDS = (8, 64, 512, 1024)
EP = 8
GROUPS = [
    Group((("w", (64, 67)), ("v", (33, 64))), experts=False),
    Group((("experts", (8, 16, 40)),), experts=True),
]


class Engine:
    """What a save and a load see of an engine, for any rank of any world: values are the elements' numbers."""

    def __init__(self, rank: int, world: int) -> None:
        shapes = {name: shape for group in GROUPS for name, shape in group.parameters}
        self.student = self.module = torch.nn.Module()
        self.student.register_buffer("age", torch.arange(3))
        self.layout, self.teacher, self.state = SimpleNamespace(ep=EP, zero_stage=2), self, self
        self.adam_step = 3
        self.pieces = [
            SimpleNamespace(
                name=name, shape=shapes[name], start=start, size=size, owned=(0, size), of=lambda flat: flat,
                master=SimpleNamespace(tensor=torch.arange(start, start + size, dtype=torch.float32)),
            )
            for name, start, size in owned(GROUPS, 2, world, EP, rank)
        ]  # fmt: skip

    def of(self, piece: Any) -> torch.Tensor:
        return piece.master.tensor + 0.25

    def moment(self, piece: Any, key: str) -> torch.Tensor:
        return piece.master.tensor + (0.5 if key == "exp_avg" else 0.75)


def save_all(url: str, world: int, step: int, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    kv = dist.HashStore()
    monkeypatch.setattr(save, "_own_store", lambda world: kv)
    monkeypatch.setattr(save, "_shared_token", lambda world: "token")
    config = CheckpointConfig(asynchronous=False, keep_last=2, keep_every=0)
    Counting.take()
    savers = {}
    for rank in range(world):
        Counting.rank = rank
        savers[rank] = Saver(url, config, rank, world, lambda: None)
    for rank in (*range(1, world), 0):  # the first one commits, so it comes last
        Counting.rank = rank
        savers[rank].save(cast(Any, Engine(rank, world)), step, 8, {})
    return Counting.take()


def load_all(url: str, world: int) -> Counter[tuple[int, str]]:
    Counting.rank = 0
    checkpoint = store.open_checkpoint(store.committed(url)[0])
    store.check_sizes(checkpoint)
    for rank in range(world):
        Counting.rank = rank
        engine = Engine(rank, world)
        with open_files(checkpoint, wanted_parts(checkpoint, engine.pieces, rank == 0)) as files:
            for piece in engine.pieces:
                for kind, add in (("student", 0.0), ("exp_avg", 0.5), ("exp_avg_sq", 0.75), ("teacher", 0.25)):
                    got = files.read(kind, piece.name, piece.start, piece.size)
                    assert torch.equal(got, piece.master.tensor + add)
            if rank == 0:
                assert files.buffers("student")["age"].tolist() == [0, 1, 2]
    return Counting.take()


def by_rank(found: Counter[tuple[int, str]], world: int) -> list[int]:
    """Requests of each rank, listings apart."""
    return [sum(n for (who, kind), n in found.items() if who == rank and kind != "list") for rank in range(world)]


def test_requests_are_linear_in_the_ranks_and_constant_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts: dict[str, set[int]] = {"save": set(), "resume": set()}
    for world in WORLDS:
        url = f"count://{uuid.uuid4().hex}/checkpoints"
        for step in (1, 2):  # so that the third removes one
            save_all(url, 8, step, monkeypatch)
        saved = save_all(url, world, 3, monkeypatch)
        resumed = load_all(url, world)
        assert len(store.committed(url)) == 2
        Counting.take()
        for what, found in (("save", saved), ("resume", resumed)):
            each = by_rank(found, world)
            assert max(each[1:]) <= (1 if what == "save" else 4), (what, world, each)
            firsts[what].add(each[0])
            lists = Counter(kind for who, kind in found.elements() if kind == "list")
            assert lists["list"] <= 8, (what, world, lists)
    assert all(len(found) == 1 for found in firsts.values()), firsts
    assert max(max(found) for found in firsts.values()) <= 16, firsts


@pytest.mark.parametrize(("before", "after"), [(1024, 512), (512, 8), (8, 1024)])
def test_a_resume_onto_another_world_is_linear_too(before: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"count://{uuid.uuid4().hex}/checkpoints"
    save_all(url, before, 1, monkeypatch)
    each = by_rank(load_all(url, after), after)
    assert sum(each) <= 4 * len(GROUPS) * (before + after) + 16
    assert max(each[1:]) <= 8 * len(GROUPS) * max(before // after, 1)


def test_a_start_asks_for_the_index_once_per_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    url = f"count://{uuid.uuid4().hex}/set"
    write_shard_set(url, [make_site(f"site_{i}", i, dates=1, side_px=8, hr_px=8) for i in range(4)], per_shard=2)
    monkeypatch.setattr(shared, "SHARED_FROM", 1)
    Counting.take()
    world = 64
    for rank in range(world):
        Counting.rank = rank
        tables.load(DataConfig(url=url, cache_dir=str(tmp_path / str(rank // 8))), ("hr", "s2"))
    each = by_rank(Counting.take(), world)
    assert each == [2 if rank % 8 == 0 else 1 for rank in range(world)]  # the manifest; the columns


def test_what_killed_starts_uploaded_is_removed_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding: partial checkpoints whose step never recurs stayed for ever."""
    url = f"count://{uuid.uuid4().hex}/checkpoints"
    save_all(url, 8, 10, monkeypatch)
    for rank in range(3):  # killed in its save of step 13
        storage.write_atomic(f"{url}/step-00000013/{store.file_name(rank, 'dead')}", b"half")
    save_all(url, 8, 20, monkeypatch)
    assert storage.list_names(f"{url}/step-00000013") == []
    storage.write_atomic(
        f"{url}/step-00000012/rank-00007.late.safetensors", b"half"
    )  # one that was cut off, still uploading
    storage.write_atomic(f"{url}/step-00000030/rank-00001.token.safetensors", b"half")  # a peer that is ahead
    store.clear_leftovers(url, before=20)
    assert storage.list_names(url) == ["LATEST", "step-00000010", "step-00000020", "step-00000030"]
    assert [storage.name(found) for found in store.committed(url)] == ["step-00000020", "step-00000010"]
