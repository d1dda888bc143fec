"""Sets that grow and shrink: old shards and splits stay, what is removed stays out, a kill at any moment costs nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import build as building
from data_prep import grow, parts, planfile
from data_prep import remove as removing
from data_prep.build import build
from data_prep.config import ShardsConfig, SourceConfig, SplitConfig
from data_prep.grow import append, drop_unfinished
from data_prep.remove import Wanted, remove
from data_prep.removed import read_removed
from data_prep.repair import repair
from data_prep.shards import ShardSet
from data_prep.split import draw
from data_prep.verify import verify
from tests.sites import make_record
from tests.unit.test_build import SITES, World, config

GONE = frozenset(["k_2", "k_7"])


class Killed(BaseException):
    """A process that ends here and now."""


def make_world(patch: pytest.MonkeyPatch) -> World:
    world = World()
    for module in (building, grow):
        patch.setattr(module, "read_catalogs", lambda config: (world.records, []))
    patch.setattr(building, "read_site", world.read_site)
    patch.setattr(planfile, "SLICES", 1)
    patch.setattr(planfile, "MOST_SHARDS", 3)
    return world


@pytest.fixture
def world(monkeypatch):
    """Twelve sites in twelve cells; `world.records` is what the catalog lists, shards of two sites, slices of three shards."""
    return make_world(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sets that several tests begin or end with, built once: `all` twelve sites, the first `nine`, `grown` from nine to twelve, and
    `less`: all without GONE."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        world = make_world(patch)
        everything = list(world.records)
        for name, records in (("all", everything), ("nine", everything[:9])):
            (folder / name).mkdir()
            world.records = records
            build(own(folder / name))
        world.records = everything
        append(own(copied(folder / "nine", folder / "grown"), "more"))
        remove(f"{copied(folder / 'all', folder / 'less')}/set", Wanted(GONE))
    return folder


def copied(source, target):
    """A set in another place, as if it had been built there."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    plan = target / "set" / "_build" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(f"{source}/".encode(), f"{target}/".encode()))
    return target


def own(folder, catalog: str = "old", skip: str = "", **changes):
    """A config whose catalog file exists, so that its inputs have a digest."""
    (folder / f"{catalog}.parquet").write_bytes(catalog.encode())
    split = changes.pop("split", SplitConfig({"train": 0.6, "val": 0.2, "probe": 0.2}, min_cells=1))
    base = dataclasses.replace(config(folder / "set", **changes), split=split)
    source = SourceConfig((f"{folder}/{catalog}.parquet",), skip=skip)
    return dataclasses.replace(base, source=source, shards=ShardsConfig(max_samples=2))


def seen(folder) -> dict[str, bytes]:
    """What readers see of a set."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def tars(folder) -> dict[str, bytes]:
    return {name: data for name, data in seen(folder).items() if name.endswith(".tar")}


def samples(folder) -> dict[str, tuple]:
    """Per key its split and the checksums of its members."""
    rows = pq.read_table(folder / "index.parquet", columns=["key", "split", "cell", "members"]).to_pylist()
    return {row["key"]: (row["split"], row["cell"], [(m["name"], m["sha256"]) for m in row["members"]]) for row in rows}


def grown(world, folder, tmp_path, first: int = 9):
    """A set of the first sites, to which the others are appended."""
    everything = list(world.records)
    world.records = everything[:first]
    build(own(folder))
    before = tars(folder / "set")
    world.records = everything
    outcome = append(own(folder, "more"))
    return before, outcome


def test_appending_leaves_old_shards_and_splits(world, tmp_path):
    (tmp_path / "once").mkdir()
    build(own(tmp_path / "once"))
    (tmp_path / "grown").mkdir()
    before, outcome = grown(world, tmp_path / "grown", tmp_path)
    folder = tmp_path / "grown" / "set"
    assert before.items() <= tars(folder).items()
    assert samples(folder) == samples(tmp_path / "once" / "set")
    assert verify(str(folder), decode=True) == []
    assert (
        outcome.plan.report["appended"][0]["sites"] | {"held": 9, "planned": 3}
        == outcome.plan.report["appended"][0]["sites"]
    )
    whole, once = (json.loads((f / "manifest.json").read_bytes()) for f in (folder, tmp_path / "once" / "set"))
    assert whole["statistics"] == once["statistics"]
    assert whole["counts"]["samples"] == 12
    assert whole["config_fingerprint"] == once["config_fingerprint"]


def test_rows_stand_by_split_and_the_set_is_mended_as_it_was(world, tmp_path):
    grown(world, tmp_path, tmp_path)
    folder = tmp_path / "set"
    splits = pq.read_table(folder / "index.parquet")["split"].to_pylist()
    assert splits == sorted(splits, key=["train", "val", "probe"].index)
    before = seen(folder)
    (folder / "index.parquet").write_bytes(b"")
    assert repair(str(folder), lambda line: None) == []
    assert seen(folder) == before
    for name in tars(folder):
        for suffix in parts.SUFFIXES:
            storage.remove(parts.part_url(str(folder), name, suffix))
    for number in range(9):
        parts.unroll(str(folder), number)
    (folder / "manifest.json").unlink()
    assert repair(str(folder), lambda line: None) == []
    assert samples(folder) == samples(folder)
    assert verify(str(folder), decode=True) == []


@pytest.mark.parametrize("done", [0, 1])
def test_an_addition_that_was_killed_continues(world, made, tmp_path, monkeypatch, done):
    copied(made / "nine", tmp_path)
    everything, count = world.records, 0
    real = building.build_shard

    def dies(job, report, **options):
        nonlocal count
        count += 1
        if count > done:
            raise Killed
        return real(job, report, **options)

    monkeypatch.setattr(building, "build_shard", dies)
    with pytest.raises(Killed):
        append(own(tmp_path, "more"))
    monkeypatch.setattr(building, "build_shard", real)
    assert verify(f"{tmp_path}/set", decode=True)[0].why == "is not listed in the manifest" if done else True
    world.records = everything[:-1]
    with pytest.raises(UsageError, match="another addition is not finished"):
        append(own(tmp_path, "other"))
    world.records = everything
    append(own(tmp_path, "more"))  # whose catalog has been touched since: planned again, and found the same
    assert seen(tmp_path / "set") == seen(made / "grown" / "set")
    world.records = everything[:9]
    build(own(tmp_path))  # the config it was begun with finds all of it
    world.records = everything
    append(own(tmp_path, "more"))
    assert seen(tmp_path / "set") == seen(made / "grown" / "set")


def test_tasks_share_an_addition(world, made, tmp_path):
    copied(made / "nine", tmp_path)
    for task in (1, 0):
        append(own(tmp_path, "more"), task, 2)
    assert seen(tmp_path / "set") == seen(made / "grown" / "set")


def test_an_addition_that_was_begun_can_be_dropped(world, made, tmp_path, monkeypatch):
    copied(made / "nine", tmp_path)
    before, plan = seen(tmp_path / "set"), planfile.read_plan(f"{tmp_path}/set")

    def dies(job, report, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(building, "build_shard", dies)
        with pytest.raises(Killed):
            append(own(tmp_path, "more"))
    assert len(planfile.read_plan(f"{tmp_path}/set").added) == 1
    assert drop_unfinished(f"{tmp_path}/set", dry_run=True)
    names = drop_unfinished(f"{tmp_path}/set")
    assert names
    assert seen(tmp_path / "set") == before
    assert planfile.read_plan(f"{tmp_path}/set").slices == plan.slices
    with pytest.raises(UsageError, match="no addition"):
        drop_unfinished(f"{tmp_path}/set")
    append(own(tmp_path, "more"))
    assert len(samples(tmp_path / "set")) == 12


def test_other_settings_are_refused(world, made, tmp_path):
    copied(made / "all", tmp_path)
    with pytest.raises(UsageError, match=r"other settings: grid\.max_dates differs"):
        append(own(tmp_path, "more", grid=dataclasses.replace(own(tmp_path).grid, max_dates=2)))
    with pytest.raises(UsageError, match="no set that can grow"):
        append(
            dataclasses.replace(own(tmp_path), output=dataclasses.replace(own(tmp_path).output, url=f"{tmp_path}/no"))
        )


def test_nothing_new_changes_nothing(world, made, tmp_path):
    copied(made / "all", tmp_path)
    before = seen(tmp_path / "set")
    outcome = append(own(tmp_path, "same_sites"))
    assert outcome.built == 0
    assert not outcome.plan.added
    assert seen(tmp_path / "set") == before


def test_an_addition_keeps_to_the_splits_that_stand(world, tmp_path):
    """A new site beside an evaluation site of the set is left out, whatever its own cell would draw; one of its cell joins it."""
    everything = list(world.records)
    world.records = everything[:9]
    settings = dataclasses.replace(own(tmp_path).split, buffer_m=600.0, min_cells=1)
    build(own(tmp_path, split=settings))
    held = {key: split for key, (split, _, _) in samples(tmp_path / "set").items()}
    beside = next(r for r in everything[:9] if held.get(r.key) in ("val", "probe"))
    train = next(f"other{i}" for i in range(99) if draw(f"other{i}", settings) == "train")
    for number in (21, 22):
        own_site = SITES[beside.key]
        x0, y0, x1, y1 = own_site.footprint
        shift = 40.0 * (number - 20)
        record = dataclasses.replace(
            make_record(own_site), key=f"k_{number}", cell=beside.cell if number == 21 else train,
            footprint=(x0, y0 - shift, x1, y1 - shift), bbox_wgs84=tuple(v - (i % 2) * shift / 111_200 for i, v in enumerate(own_site.bbox_wgs84)),
        )  # fmt: skip
        world.records.append(record)
    outcome = append(own(tmp_path, "more", split=settings))
    after = {key: split for key, (split, _, _) in samples(tmp_path / "set").items()}
    assert after == held | {"k_21": held[beside.key]}
    assert outcome.plan.report["appended"][0]["sites"]["planned"] == 1


@pytest.mark.parametrize("rolled", [True, False])
def test_removing_is_building_without(world, tmp_path, monkeypatch, rolled):
    monkeypatch.setattr(planfile, "MOST_SHARDS", 3 if rolled else 1)
    for name in ("removed", "without"):
        (tmp_path / name).mkdir()
    build(own(tmp_path / "removed"))
    before = tars(tmp_path / "removed" / "set")
    gone = ["k_2", "k_7"]
    held = ShardSet.open(f"{tmp_path}/removed/set").read_index(["key", "shard"]).to_pylist()
    shards = {row["shard"] for row in held if row["key"] in gone}
    found, _ = remove(f"{tmp_path}/removed/set", Wanted(frozenset(gone)))
    assert set(found) == shards
    (tmp_path / "skip.txt").write_text("# withdrawn\nk_2\nk_7  # both\n")
    build(own(tmp_path / "without", skip=f"{tmp_path}/skip.txt"))
    assert seen(tmp_path / "removed" / "set") == seen(tmp_path / "without" / "set")
    after = tars(tmp_path / "removed" / "set")
    assert {name for name in before if after.get(name) != before[name]} == shards
    assert verify(f"{tmp_path}/removed/set", decode=True) == []
    manifest = json.loads((tmp_path / "removed" / "set" / "manifest.json").read_bytes())
    assert manifest["skipped"] == 2
    build(own(tmp_path / "removed"), retry_faults=True)
    assert seen(tmp_path / "removed" / "set") == seen(tmp_path / "without" / "set")


def test_a_shard_of_which_all_goes(world, made, tmp_path):
    copied(made / "all", tmp_path)
    rows = ShardSet.open(f"{tmp_path}/set").read_index(["key", "shard"]).to_pylist()
    name = rows[0]["shard"]
    remove(f"{tmp_path}/set", Wanted(frozenset(r["key"] for r in rows if r["shard"] == name)))
    assert name not in tars(tmp_path / "set")
    assert verify(f"{tmp_path}/set", decode=True) == []
    with pytest.raises(RunFailure, match="nothing would be left"):
        remove(f"{tmp_path}/set", Wanted(frozenset(samples(tmp_path / "set"))))


def test_what_was_removed_stays_out_when_its_shard_is_made_again(world, made, tmp_path):
    copied(made / "all", tmp_path)
    found, _ = remove(f"{tmp_path}/set", Wanted(frozenset(["k_4"])))
    before = seen(tmp_path / "set")
    (tmp_path / "set" / next(iter(found))).write_bytes(b"cut")
    assert repair(f"{tmp_path}/set", lambda line: None) == [next(iter(found))]
    build(own(tmp_path))
    assert seen(tmp_path / "set") == before
    outcome = append(own(tmp_path, "more"))  # lists k_4 again
    assert outcome.built == 0
    assert "k_4" not in samples(tmp_path / "set")


def test_a_site_may_come_back_with_new_dates(world, made, tmp_path):
    copied(made / "all", tmp_path)
    remove(f"{tmp_path}/set", Wanted(frozenset(["k_4"]), again=True))
    world.records = [
        dataclasses.replace(r, product_ids=(*r.product_ids, "NEW")) if r.key == "k_4" else r for r in world.records
    ]
    world.read.clear()
    append(own(tmp_path, "more"))
    assert world.read == ["k_4"]
    assert len(samples(tmp_path / "set")) == 12
    assert verify(f"{tmp_path}/set", decode=True) == []


@pytest.mark.parametrize("moment", range(14))
def test_a_removal_killed_at_any_write_is_finished_by_the_next(made, tmp_path, monkeypatch, moment):
    """Every write and removal of an object is a moment to die at."""
    copied(made / "all", tmp_path)
    count, real = 0, {name: getattr(storage, name) for name in ("write_atomic", "remove")}
    for name, call in real.items():

        def dies(*arguments, call=call, **options):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return call(*arguments, **options)

        monkeypatch.setattr(storage, name, dies)
    try:
        remove(f"{tmp_path}/set", Wanted(GONE))
        died = False
    except Killed:
        died = True
    for name, call in real.items():
        monkeypatch.setattr(storage, name, call)
    assert died
    if moment == 0:
        assert verify(f"{tmp_path}/set", decode=True) == []
    remove(f"{tmp_path}/set", Wanted(GONE))
    assert seen(tmp_path / "set") == seen(made / "less" / "set")
    assert not any(name.startswith(removing.NEXT) for name in storage.list_names(f"{tmp_path}/set/_build"))


def test_who_is_to_go(world, made, tmp_path):
    copied(made / "all", tmp_path)
    shardset = ShardSet.open(f"{tmp_path}/set")
    row = next(r for r in shardset.read_index(["key", "shard", "bbox"]).to_pylist() if r["key"] == "k_5")
    import shapely

    middle = shapely.Point(
        (row["bbox"]["xmin"] + row["bbox"]["xmax"]) / 2, (row["bbox"]["ymin"] + row["bbox"]["ymax"]) / 2
    )
    assert removing.find(shardset, Wanted(ground=middle)) == {row["shard"]: {"k_5": "removed"}}
    assert sum(map(len, removing.find(shardset, Wanted(products=frozenset(["S2_001"]))).values())) == 12
    for wanted, words in (
        (Wanted(frozenset(["k_99"])), "no key 'k_99'"),
        (Wanted(products=frozenset("X")), "no product 'X'"),
    ):
        with pytest.raises(UsageError, match=words):
            remove(f"{tmp_path}/set", wanted)
    assert read_removed(f"{tmp_path}/set") == {}
