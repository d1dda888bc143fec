"""Build, verify, repair on small random sites: idempotent, deterministic, every fault counted and named."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading

import numpy as np
import pytest

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import build as building
from data_prep import merge
from data_prep.build import build, over_budget
from data_prep.config import BuildConfig, OutputConfig, ShardsConfig, SplitConfig
from data_prep.repair import repair
from data_prep.schema import NODATA
from data_prep.shards import ShardSet
from data_prep.sources.records import SourceFault
from data_prep.statistics import Histograms, statistics_json
from data_prep.tar import TarWriter
from data_prep.verify import verify
from tests.sites import make_record, make_site

SITES = {
    f"k_{i}": make_site(f"k_{i}", i, dates=2, hr_px=16, side_px=4, place=(500.0 * i, 0), cell=f"c{i}")
    for i in range(12)
}


class World:
    """A catalog and a reader that a test can spoil."""

    def __init__(self) -> None:
        self.records = [make_record(site) for site in SITES.values()]
        self.broken: dict[str, Exception] = {}
        self.read: list[str] = []

    def read_site(self, record, grid, **options):
        self.read.append(record.key)
        if record.key in self.broken:
            raise self.broken[record.key]
        return make_site(
            record.key, int(record.key[2:]), dates=2, hr_px=16, side_px=4, place=(500.0 * int(record.key[2:]), 0), cell=record.cell
        )  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(building, "read_catalogs", lambda config: (world.records, []))
    monkeypatch.setattr(building, "read_site", world.read_site)
    return world


def config(folder, **changes) -> BuildConfig:
    fractions = SplitConfig({"train": 0.6, "val": 0.2, "probe": 0.2})
    return BuildConfig(
        output=OutputConfig(str(folder)), split=fractions, shards=ShardsConfig(max_samples=3), workers=1, **changes
    )


def tree(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "plan.json"
    }


def test_tasks_make_the_same_bytes_as_one(world, tmp_path):
    whole = build(config(tmp_path / "one"))
    assert whole.manifest is not None
    outcomes = [build(config(tmp_path / "three"), task, 3) for task in (2, 0, 1)]
    assert [o.manifest is None for o in outcomes] == [True, True, False]
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert verify(str(tmp_path / "one"), decode=True) == []


def test_a_rerun_makes_only_what_is_missing(world, tmp_path):
    first = build(config(tmp_path))
    before = tree(tmp_path)
    world.read.clear()
    again = build(config(tmp_path))
    assert (world.read, again.built) == ([], 0)
    assert again.manifest == first.manifest
    name = first.manifest["shards"][1]["name"]
    (tmp_path / name).write_bytes(b"cut")
    (tmp_path / f"{name}.abcd0123.tmp").write_bytes(b"left by a killed builder")
    build(config(tmp_path))
    assert len(world.read) == first.manifest["shards"][1]["samples"]
    assert tree(tmp_path) == before


def test_sweeping_leaves_what_another_merge_is_writing(tmp_path):
    """Two array tasks that finish together both merge; one must not take the other's half-written index away."""
    (tmp_path / "_build").mkdir()
    for name in ("index.parquet.0123abcd.tmp", "manifest.json.0123abcd.tmp", "train-000000.tar.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"")
    building.sweep(str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == [
        "index.parquet.0123abcd.tmp",
        "manifest.json.0123abcd.tmp",
    ]


def test_faulty_sites_drop_out_of_their_shard_only(world, tmp_path):
    build(config(tmp_path / "good"))
    world.broken = {"k_3": SourceFault("k_3/s2", "corrupt tile"), "k_5": OSError(5, "source vanished")}
    bad = config(tmp_path / "bad", error_budget=0.1)
    outcome = build(bad)
    assert over_budget(outcome, bad)
    faults = {
        fault["site"]: fault for fault in map(json.loads, (tmp_path / "bad" / "faults.jsonl").read_text().splitlines())
    }
    assert {key: (f["asset"], f["why"]) for key, f in faults.items()} == {
        "k_3": ("k_3/s2", "corrupt tile"), "k_5": ("k_5/hr", "OSError: [Errno 5] source vanished"),
    }  # fmt: skip
    touched = {fault["shard"] for fault in faults.values()}
    for shard in outcome.manifest["shards"]:
        same = (tmp_path / "good" / shard["name"]).read_bytes() == (tmp_path / "bad" / shard["name"]).read_bytes()
        assert same == (shard["name"] not in touched)
    assert verify(str(tmp_path / "bad"), decode=True) == []
    assert ShardSet.open(str(tmp_path / "bad")).num_samples == 10
    world.broken = {}
    assert build(bad, retry_faults=True).faults == []
    assert tree(tmp_path / "bad") == tree(tmp_path / "good")


def test_an_all_nodata_modality_is_absent_and_an_all_nodata_site_a_fault(world, tmp_path, monkeypatch):
    def read(record, grid, **options):
        site = world.read_site(record, grid)
        for name in ("s1",) if record.key == "k_0" else site.series if record.key == "k_1" else ():
            site.series[name].mask_THW[...] = NODATA
        return site

    monkeypatch.setattr(building, "read_site", read)
    outcome = build(config(tmp_path))
    assert [(f["site"], f["why"]) for f in outcome.faults] == [("k_1", "has no modality with a valid pixel")]
    rows = {row["key"]: row for row in ShardSet.open(str(tmp_path)).index.to_pylist()}
    assert rows["k_0"]["modalities"] == ["hr", "s2"]


def test_repeated_dates_are_dropped(world, tmp_path, monkeypatch):
    def read(record, grid, **options):
        site = world.read_site(record, grid)
        s2 = site.series["s2"]
        s2.pixels_TCHW, s2.mask_THW = (np.repeat(a, 2, axis=0) for a in (s2.pixels_TCHW, s2.mask_THW))
        for name in ("datetimes", "product_ids", "orbits", "decisions"):
            setattr(s2, name, [v for v in getattr(s2, name) for _ in range(2)])
        return site

    build(config(tmp_path / "plain"))
    monkeypatch.setattr(building, "read_site", read)
    build(config(tmp_path / "doubled"))
    assert tree(tmp_path / "plain") == tree(tmp_path / "doubled")


def test_stops_at_max_faults(world, tmp_path):
    world.broken = {key: SourceFault(key, "gone") for key in SITES}
    with pytest.raises(RunFailure, match="faulty sites, past error_budget"):
        build(config(tmp_path / "a", max_faults=4))
    assert len(world.read) < 12
    with pytest.raises(RunFailure, match=r"no usable sample in 12 sites.*faults.jsonl"):
        build(config(tmp_path / "b"))
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_another_plan_on_the_same_output_is_refused(world, tmp_path):
    build(config(tmp_path))
    before = tree(tmp_path)
    world.records = world.records[:-1]
    with pytest.raises(UsageError, match="holds a build of another catalog or config"):
        build(config(tmp_path))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_exactly_one_claimant_wins(scheme, tmp_path):
    url = f"{scheme}{tmp_path}/claim.json"
    won: list[int] = []
    start = threading.Barrier(8)

    def claim(number: int) -> None:
        start.wait()
        if storage.create(url, str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8 if not scheme else 1)]
    if scheme:
        start = threading.Barrier(1)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(url) == str(won[0]).encode()
    assert not storage.create(url, b"late")


def test_full_disk_leaves_finished_shards_and_no_scraps(world, tmp_path, monkeypatch):
    write = TarWriter._write
    total = 0

    def limited(self, data):
        nonlocal total
        total += len(data)
        if total > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(TarWriter, "_write", limited)
    with pytest.raises(RunFailure, match="no space left; finished shards are kept"):
        build(config(tmp_path / "x"))
    assert not list((tmp_path / "x").rglob("*.tmp"))
    monkeypatch.setattr(TarWriter, "_write", write)
    build(config(tmp_path / "x"))
    build(config(tmp_path / "y"))
    assert tree(tmp_path / "x") == tree(tmp_path / "y")


def test_a_disk_that_keeps_something_else_is_noticed(world, tmp_path, monkeypatch):
    fsync = os.fsync

    def spoil(descriptor):
        fsync(descriptor)
        if ".tar." in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.pwrite(descriptor, b"?", 700)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", spoil)
        with pytest.raises(RunFailure, match="reads back differently from what was written"):
            build(config(tmp_path))
    assert not list(tmp_path.glob("*.tar*"))
    assert build(config(tmp_path)).manifest is not None


def test_labels_that_disagree_are_named(world, tmp_path, monkeypatch):
    other = {"scene": ["other", "names"]}

    def read(record, grid, **options):
        site = world.read_site(record, grid)
        site.classes = site.classes | (other if record.key == "k_0" else {})
        return site

    with monkeypatch.context() as patch:
        patch.setattr(building, "read_site", read)
        try:
            message = str(build(config(tmp_path / "a")).faults[0])  # noticed within a shard,
        except RunFailure as failure:
            message = str(failure)  # or while merging
    assert "has other class names" in message
    world.records[0] = dataclasses.replace(world.records[0], classes=other)
    with pytest.raises(UsageError, match="label 'scene' has other class names at k_1 than at k_0"):
        build(config(tmp_path / "b"))


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


SPOILED = {
    "a byte of a tar": lambda f: flip(f / "train-000000.tar", 5000),
    "a tar cut short": lambda f: (f / "train-000000.tar").write_bytes((f / "train-000000.tar").read_bytes()[:-700]),
    "a tar gone": lambda f: (f / "train-000001.tar").unlink(),
    "a tar too many": lambda f: (f / "train-000009.tar").write_bytes((f / "train-000000.tar").read_bytes()),
    "index byte": lambda f: flip(f / "index.parquet", 200),
    "index gone": lambda f: (f / "index.parquet").unlink(),
    "manifest gone": lambda f: (f / "manifest.json").unlink(),
    "manifest damaged": lambda f: (f / "manifest.json").write_bytes(b"{]"),
    "manifest count": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"samples": 12', '"samples": 13')
    ),
}
MENDED = {"index byte", "index gone", "manifest gone", "manifest damaged", "manifest count", "a tar too many"}


@pytest.mark.parametrize("what", SPOILED)
def test_verify_names_it_repair_mends_it_build_completes_it(world, tmp_path, what):
    build(config(tmp_path))
    before = tree(tmp_path)
    SPOILED[what](tmp_path)
    faults = verify(str(tmp_path))
    assert faults
    named = "train" if "tar" in what else what.split()[0]
    assert any(named in fault.file for fault in faults), faults
    lost = repair(str(tmp_path), lambda line: None)
    assert bool(lost) == (what not in MENDED)
    assert verify(str(tmp_path), decode=True) == []
    build(config(tmp_path))
    after = tree(tmp_path)
    assert {name: data for name, data in after.items() if "quarantine" not in name} == before


@pytest.mark.parametrize("keep_manifest", [True, False])
def test_everything_but_the_tars_can_be_made_again(world, tmp_path, keep_manifest):
    build(config(tmp_path))
    before = tree(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix != ".tar" and not (keep_manifest and path.name == "manifest.json"):
            path.unlink()
    assert repair(str(tmp_path), lambda line: None) == []
    assert verify(str(tmp_path), decode=True) == []
    after = tree(tmp_path)
    assert after["index.parquet"] == before["index.parquet"]
    new, old = (json.loads(t["manifest.json"]) for t in (after, before))
    assert new["statistics"] == old["statistics"]
    assert new["shards"] == old["shards"]
    if keep_manifest:
        assert new == old
        build(config(tmp_path))


def test_statistics_are_of_the_training_split_alone(world, tmp_path):
    """What the network is normalised by must not have seen the places it is judged on."""
    outcome = build(config(tmp_path / "set"))
    shards = ShardSet.open(str(tmp_path / "set"))
    rows = shards.index.select(["key", "split"]).to_pylist()
    assert {row["split"] for row in rows} > {"train"}
    train, every = Histograms(), Histograms()
    for number, row in enumerate(rows):
        site = shards.read_sample(number)
        every.add(site)
        if row["split"] == "train":
            train.add(site)
    assert outcome.manifest["statistics"] == json.loads(json.dumps(statistics_json(train.finish())))
    assert outcome.manifest["statistics"] != json.loads(json.dumps(statistics_json(every.finish())))


def test_statistics_merge_in_any_order():
    parts = []
    for site in list(SITES.values())[:5]:
        histograms = Histograms()
        histograms.add(site)
        parts.append(histograms)
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 1, 3)):
        merged = Histograms()
        for i in order:
            merged.merge(Histograms.from_bytes(parts[i].to_bytes()))
        if order[0] == 0:
            expected = merged.to_bytes()
        assert merged.to_bytes() == expected


def test_unfinished_parts_are_not_merged(world, tmp_path):
    outcome = build(config(tmp_path), 0, 2)
    with pytest.raises(RunFailure, match="shards are unfinished"):
        merge.merge_parts(str(tmp_path), outcome.plan.names, config(tmp_path), outcome.plan.fingerprint)
    assert not (tmp_path / "manifest.json").exists()
