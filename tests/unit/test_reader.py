"""The reader on real shard sets: exact under any layout, honest about faults, bounded in memory."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import RunFailure, UsageError
from data_prep.config import CodecsConfig
from model.batch import Batch
from model.config import ModelConfig
from pipeline.config import DataConfig, ViewConfig
from pipeline.reader.buffers import tensors
from pipeline.reader.order import Stream
from pipeline.reader.reader import Reader
from pipeline.reader.whole import WholeSites, whole_site_view
from tests.sites import make_site, write_shard_set

COUNT = 22
MODEL = ModelConfig()


def settings_of(folder, **changes) -> DataConfig:
    """Small views over a set; `changes` override."""
    views = {"views_global": ViewConfig(32, 8, 3, 2), "views_local": ViewConfig(16, 4, 2, 1)}
    return DataConfig(**{"url": str(folder), "block_samples": 3, "interleave": 2, "threads": 0, **views, **changes})


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """22 sites in shards of 4; some lack a modality."""
    lacking = {3: ("hr", "s2"), 7: ("s1",), 11: ("s2", "s1")}
    sites = [
        make_site(
            f"site_{i}", i, lacking.get(i, ("hr", "s2", "s1")), dates=5, side_px=12, hr_px=48, place=(200.0 * i, 0)
        )
        for i in range(COUNT)
    ]
    folder = tmp_path_factory.mktemp("shards")
    write_shard_set(str(folder), sites, codecs=CodecsConfig(s1="npy", mask="npy", tile_px=32))
    return folder


def row_hash(batch: Batch, i: int) -> str:
    """Hash of everything in row i of a batch."""
    digest = hashlib.sha256(batch.keys[i].encode())
    for tensor in tensors(batch):
        digest.update(tensor[i].numpy().tobytes())
    return digest.hexdigest()


def delivered(reader: Reader, batches: int | None = None) -> list[list[tuple[int, str, str]]]:
    """Per batch: (position, key, hash) of the rows that are not blank."""
    out = []
    while batches is None or len(out) < batches:
        batch = next(reader, None)
        if batch is None:
            break
        out.append([(int(batch.position_B[i]), key, row_hash(batch, i)) for i, key in enumerate(batch.keys) if key])
    return out


def over_ranks(data: DataConfig, world: int, batch: int, state=None, batches=None, epochs: int | None = 1):
    """Rows of all ranks, global batch by global batch, and the state afterwards."""
    per_rank, states = [], []
    for rank in range(world):
        with Reader(data, MODEL, seed=7, batch_per_rank=batch, rank=rank, world=world, epochs=epochs) as reader:
            if state is not None:
                reader.load_state_dict(state)
            per_rank.append(delivered(reader, batches))
            states.append(json.dumps(reader.state_dict()))
    assert len({len(found) for found in per_rank}) == 1  # every rank: the same number of batches
    assert len(set(states)) == 1
    return [row for step in zip(*per_rank) for part in step for row in part], json.loads(states[0])


@pytest.fixture(scope="module")
def reference(shards):
    rows, _ = over_ranks(settings_of(shards), 1, 5)
    return rows


def test_one_epoch_is_every_sample_once(reference):
    assert [position for position, _, _ in reference] == list(range(COUNT))
    assert sorted(key for _, key, _ in reference) == sorted(f"site_{i}" for i in range(COUNT))


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_world_and_any_threads_deliver_the_same(shards, reference, world, threads):
    rows, _ = over_ranks(settings_of(shards, threads=threads, prefetch_batches=3), world, 2)
    assert rows == reference


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 3), st.sampled_from([0, 2])), min_size=1, max_size=4
    )
)
def test_stop_anywhere_and_resume_on_another_world(shards, reference, legs):
    """Through the JSON of `state_dict`: the union is exactly once, in order, with identical pixels."""
    state, rows = None, []
    for world, batches, threads in legs:
        found, state = over_ranks(settings_of(shards, threads=threads), world, 1, state, batches)
        state = json.loads(json.dumps(state))
        assert len(json.dumps(state)) < 400
        rows += found
    rest, _ = over_ranks(settings_of(shards), 2, 3, state)
    assert rows + rest == reference


def test_endless_reading_straddles_epochs_and_drops_nothing(shards, reference):
    rows, state = over_ranks(settings_of(shards), 2, 4, batches=7, epochs=None)
    assert len(rows) == 56
    assert rows[:COUNT] == reference
    assert sorted(key for _, key, _ in rows[COUNT : 2 * COUNT]) == sorted(key for _, key, _ in reference)
    again = {key: digest for _, key, digest in rows[COUNT : 2 * COUNT]}
    assert all(again[key] != digest for _, key, digest in reference)  # a new epoch draws new views
    assert (state["samples"], state["epoch"], state["position"]) == (56, 2, 12)


def test_missing_modalities_are_absent_not_zeros(shards):
    with Reader(settings_of(shards), MODEL, seed=0, batch_per_rank=COUNT, epochs=1) as reader:
        batch = next(reader)
        for key, absent in (("site_3", "s1"), ("site_7", "hr"), ("site_11", "hr")):
            i = batch.keys.index(key)
            for view in (batch.u, batch.v, *batch.local):
                assert not view.modalities[absent].valid_BTHW[i].any()
                assert (view.modalities[absent].doy_BT[i] == 0).all()
        present = batch.u.modalities["s2"]
        assert present.valid_BTHW[batch.keys.index("site_3")].any()
        for view in (batch.u, batch.v):
            s1 = view.modalities["s1"]
            assert torch.isfinite(s1.x_BTCHW.movedim(2, -1)[s1.valid_BTHW].float()).all()
            assert (view.modalities["s2"].x_BTCHW.movedim(2, -1)[view.modalities["s2"].valid_BTHW].int() > 0).all()


def test_buffers_are_reused_and_bounded(shards):
    data = settings_of(shards, threads=2, prefetch_batches=2)
    with Reader(data, MODEL, seed=0, batch_per_rank=2, hold=3) as reader:
        kept, places = [], set()
        for _ in range(12):
            batch = next(reader)
            places.add(batch.u.modalities["hr"].x_BTCHW.data_ptr())
            kept.append((batch, [row_hash(batch, i) for i in range(2)]))
            for held, hashes in kept[-3:]:  # the last `hold` batches are still what they were
                assert [row_hash(held, i) for i in range(2)] == hashes
        assert len(places) <= 5
        views = (batch.u, batch.v, *batch.local)
        one = sum(t.nbytes for view in views for m in view.modalities.values() for t in tensors(m))
        assert reader.buffer_bytes == len(places) * (one + sum(view.classes_BHW.nbytes for view in views))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 1}, "train.seed"),
        ({"block_samples": 4}, "block_samples"),
        ({"require": ("hr",)}, "filters"),
    ],
)
def test_a_state_of_other_data_is_refused(shards, change, names):
    data = settings_of(shards)
    with Reader(data, MODEL, seed=0, batch_per_rank=2) as reader:
        state = reader.state_dict()
    seed = change.pop("seed", 0)
    with (
        Reader(dataclasses.replace(data, **change), MODEL, seed=seed, batch_per_rank=2) as reader,
        pytest.raises(UsageError, match=names),
    ):
        reader.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"require": ("hr", "s1")}, set(range(COUNT)) - {3, 7, 11}),
        ({"date_range": ("2030-01-01", "2031-01-01")}, None),
        ({"date_range": ("2021-03-01", "2021-03-10")}, set(range(COUNT))),
        ({"bbox": (14.9, 46.0, 15.0001, 48.0)}, {0}),
        ({"bbox": (170.0, 46.0, -170.0, 48.0)}, None),
        ({"bbox": (14.0, 46.0, -170.0, 48.0)}, set(range(COUNT))),
        ({"split": "val"}, None),
    ],
)
def test_filters(shards, change, keys):
    data = settings_of(shards, **change)
    if keys is None:
        with pytest.raises(UsageError, match=next(iter(change))):
            Reader(data, MODEL, seed=0, batch_per_rank=2)
        return
    rows, _ = over_ranks(data, 2, 2)
    assert {key for _, key, _ in rows} == {f"site_{i}" for i in keys}


def test_sets_are_joined_or_mixed(shards, tmp_path):
    write_shard_set(str(tmp_path), [make_site(f"other_{i}", 100 + i, side_px=12, hr_px=48) for i in range(6)])
    data = settings_of(shards, url=(str(shards), str(tmp_path)))
    rows, _ = over_ranks(data, 2, 2)
    assert len({key for _, key, _ in rows}) == len(rows) == COUNT + 6
    mixed = dataclasses.replace(data, weights=(0.25, 0.75))
    first, state = over_ranks(mixed, 1, 10, batches=3, epochs=None)
    then, end = over_ranks(mixed, 2, 5, state, batches=2, epochs=None)
    whole, _ = over_ranks(mixed, 1, 25, batches=2, epochs=None)
    assert first + then == whole
    others = sum(key.startswith("other") for _, key, _ in whole)
    assert end["drawn"] == [50 - others, others]
    stream = Stream([[22], [6]], (0.25, 0.75), 7, 3, 2)
    assert stream.drawn(1000) == [250, 750]


def damaged(shards: Path, folder: Path, key: str) -> Path:
    """A copy of the set with one byte of one sample's hr changed."""
    shutil.copytree(shards, folder)
    for tar in folder.glob("*.tar"):
        data = bytearray(tar.read_bytes())
        at = data.find(f"{key}.hr.b2nd".encode())
        if at >= 0:
            data[at + 512 + 300] ^= 0xFF
            tar.write_bytes(data)
            return folder
    raise AssertionError(key)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_sample_is_quarantined_within_the_budget(shards, reference, tmp_path, threads):
    folder = damaged(shards, tmp_path / "set", "site_5")
    data = settings_of(folder, error_budget=0.1, threads=threads)
    with Reader(data, MODEL, seed=7, batch_per_rank=5, epochs=1) as reader:
        rows = [row for part in delivered(reader) for row in part]
        assert list(reader.faults.quarantined) == ["site_5"]
        assert "checksum" in reader.faults.quarantined["site_5"]
        assert reader.metrics()["data/quarantined"] == 1
    assert [row[:2] for row in rows] == [row[:2] for row in reference]  # it keeps its place, and nobody else is moved
    assert {a[1] for a, b in zip(rows, reference) if a != b} == {"site_5"}
    assert sum(a != b for a, b in zip(rows, reference)) == 1


def test_past_the_budget_the_run_stops_with_the_list(shards, tmp_path):
    folder = damaged(shards, tmp_path / "set", "site_5")
    with (
        Reader(settings_of(folder, threads=2), MODEL, seed=7, batch_per_rank=5, epochs=1) as reader,
        pytest.raises(RunFailure) as failure,
    ):
        delivered(reader)
    for word in ("site_5.hr", "checksum", ".tar", "error_budget", "verify"):
        assert word in str(failure.value)


def test_a_missing_shard_and_a_short_one_are_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "set")
    first, second, *_ = sorted((tmp_path / "set").glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:20_000])
    with Reader(settings_of(tmp_path / "set", error_budget=1.0), MODEL, seed=7, batch_per_rank=5, epochs=1) as reader:
        delivered(reader)
        why = " ".join(reader.faults.quarantined.values())
    assert f"{first} does not exist" in why
    assert f"{second} ends before byte" in why


def test_no_set_and_no_url_are_usage_errors(tmp_path):
    for url in ("", str(tmp_path)):
        with pytest.raises(UsageError, match=r"data_prep build"):
            Reader(settings_of(url), MODEL, seed=0, batch_per_rank=1)


def test_whole_sites_are_the_same_every_time(shards):
    view = ViewConfig(48, 12, 5, 5)
    sites = WholeSites(str(shards), "train", ("hr", "s2", "s1"), view)
    first = sites.batch([4, 2])
    single = whole_site_view(str(shards), [2], ("hr", "s2", "s1"), view)
    assert first.keys == [sites.table.keys[4], sites.table.keys[2]]
    assert torch.equal(first.u.modalities["s2"].x_BTCHW[1], single.modalities["s2"].x_BTCHW[0])
    assert torch.equal(first.u.classes_BHW[1], single.classes_BHW[0])
    assert first.u.modalities["s2"].valid_BTHW[:, :, 0, 0].any()
    sites.close()
    with Reader(
        settings_of(shards, views_global=view), MODEL, seed=3, batch_per_rank=COUNT, epochs=1, views="whole"
    ) as reader:
        batch = next(reader)
        i = batch.keys.index(first.keys[1])
        assert torch.equal(batch.u.modalities["hr"].x_BTCHW[i], first.u.modalities["hr"].x_BTCHW[1])
