"""The plan of a build as files: made once, read by slice; parts rolled up by slice change nothing that is seen of a set."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from cluster import storage
from cluster.errors import RunFailure, UsageError
from data_prep import build as building
from data_prep import parts, planfile
from data_prep.build import build, find_plan, finish
from data_prep.config import SourceConfig
from data_prep.repair import repair
from data_prep.sources.records import SourceFault
from data_prep.verify import verify
from tests.unit.test_build import SITES, World, config, flip


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Twelve sites, a catalog that counts how often it is read, and slices of three shards."""
    world = World()
    world.listed = 0

    def read_catalogs(config):
        world.listed += 1
        return world.records, []

    monkeypatch.setattr(building, "read_catalogs", read_catalogs)
    monkeypatch.setattr(building, "read_site", world.read_site)
    monkeypatch.setattr(planfile, "SLICES", 1)
    monkeypatch.setattr(planfile, "MOST_SHARDS", 3)
    (tmp_path / "catalog.parquet").write_bytes(b"stands for one")
    return world


def own(folder, name: str = "set", **changes):
    """A config whose catalog file exists, so that its inputs have a digest; one site per shard."""
    base = config(folder / name, **changes)
    shards = dataclasses.replace(base.shards, max_samples=1)
    return dataclasses.replace(base, source=SourceConfig((f"{folder}/catalog.parquet",)), shards=shards)


def seen(folder) -> dict[str, bytes]:
    """What readers see of a set."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_rolled_up_parts_give_the_same_set(world, tmp_path, monkeypatch):
    build(own(tmp_path, "rolled"))
    names = storage.list_names(f"{tmp_path}/rolled/_build")
    assert "plan.json" in names
    assert any(name.startswith("slice-") for name in names)
    rolled = [
        part["shard"]
        for n in range(9)
        if (entry := parts.read_slice(f"{tmp_path}/rolled", n))
        for part in entry["parts"]
    ]
    assert not any(f"{shard[:-4]}.json" in names for shard in rolled)
    monkeypatch.setattr(planfile, "MOST_SHARDS", 1)
    build(own(tmp_path, "single"))
    assert not any(name.startswith("slice-") for name in storage.list_names(f"{tmp_path}/single/_build"))
    assert seen(tmp_path / "rolled") == seen(tmp_path / "single")
    assert verify(f"{tmp_path}/rolled", decode=True) == []


def test_losses_are_listed_from_whichever_parts(world, tmp_path, monkeypatch):
    """Dates that sites lack, in the order of the set; a mended set no longer has the file."""

    def read_site(record, grid, **options):
        site = world.read_site(record, grid)
        if record.key in ("k_3", "k_7"):
            site.losses = [{"modality": "s2", "datetime": "", "asset": f"{record.key}/s2", "why": "corrupt"}]
        return site

    monkeypatch.setattr(building, "read_site", read_site)
    build(own(tmp_path, "rolled"))
    monkeypatch.setattr(planfile, "MOST_SHARDS", 1)
    manifest = build(own(tmp_path, "single")).manifest
    assert seen(tmp_path / "rolled") == seen(tmp_path / "single")
    assert manifest["losses"] == {"dates": 2, "sites": 2}
    listed = [json.loads(line)["site"] for line in seen(tmp_path / "rolled")["losses.jsonl"].splitlines()]
    assert sorted(listed) == ["k_3", "k_7"]
    assert repair(str(tmp_path / "rolled"), lambda line: None) == []
    assert seen(tmp_path / "rolled") == seen(tmp_path / "single")


def test_row_groups_do_not_show_how_parts_were_bundled(world, tmp_path, monkeypatch):
    from data_prep import merge

    monkeypatch.setattr(merge, "ROW_GROUP", 4)
    build(own(tmp_path, "rolled"))
    monkeypatch.setattr(planfile, "MOST_SHARDS", 1)
    build(own(tmp_path, "single"))
    assert seen(tmp_path / "rolled") == seen(tmp_path / "single")


def test_the_plan_is_made_once_for_all_tasks(world, tmp_path):
    for task in (2, 0, 1):
        build(own(tmp_path), task, 3)
    assert world.listed == 1
    build(own(tmp_path))
    assert world.listed == 1
    (tmp_path / "catalog.parquet").write_bytes(b"touched, same content in it")
    build(own(tmp_path))
    assert world.listed == 2  # planned again, found the same
    world.records = world.records[:-1]
    (tmp_path / "catalog.parquet").write_bytes(b"another")
    before = seen(tmp_path / "set"), sorted(storage.list_names(f"{tmp_path}/set/_build/plan"))
    with pytest.raises(UsageError, match="another catalog or config"):
        build(own(tmp_path))
    assert (seen(tmp_path / "set"), sorted(storage.list_names(f"{tmp_path}/set/_build/plan"))) == before


def test_tasks_that_start_together_wait_for_one_planner(world, tmp_path):
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(find_plan(own(tmp_path), shared=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.listed == 1
    assert all(plan == found[0] for plan in found)
    assert "planning.json" not in storage.list_names(f"{tmp_path}/set/_build")


def test_a_planner_that_died_is_replaced(world, tmp_path, monkeypatch):
    monkeypatch.setattr(planfile, "LEASE_S", 0.05)
    storage.create(f"{tmp_path}/set/_build/planning.json", b"of a task that was killed")
    assert find_plan(own(tmp_path), shared=True).num_sites == 12


def test_a_tar_that_was_cut_is_made_again(world, tmp_path):
    build(own(tmp_path))
    before = seen(tmp_path / "set")
    world.read.clear()
    (tmp_path / "set" / "train-000001.tar").write_bytes(b"cut")
    build(own(tmp_path))
    assert 1 <= len(world.read) <= 3  # its slice, no more
    assert seen(tmp_path / "set") == before


@pytest.mark.parametrize("what", ["tar", "slice index", "slice stats", "slice json"])
def test_repair_of_a_rolled_up_slice(world, tmp_path, what):
    build(own(tmp_path))
    folder = tmp_path / "set"
    before = seen(folder)
    if what == "tar":
        flip(folder / "train-000001.tar", 3000)
    elif what == "slice json":
        (folder / "_build" / "slice-000000.json").write_bytes(b"{]")
    else:
        flip(folder / "_build" / f"slice-000000.{what.split()[1]}.parquet", 100)
    lost = repair(str(folder), lambda line: None)
    assert lost == (["train-000001.tar"] if what == "tar" else [])
    assert verify(str(folder), decode=True) == []
    build(own(tmp_path))
    assert seen(folder) == before


def test_faulty_sites_are_tried_again_in_their_slice(world, tmp_path):
    build(own(tmp_path, "good"))
    world.broken = {"k_3": SourceFault("k_3/s2", "corrupt tile")}
    build(own(tmp_path, "bad", error_budget=1.0))
    world.broken = {}
    assert build(own(tmp_path, "bad", error_budget=1.0), retry_faults=True).faults == []
    assert seen(tmp_path / "good") == seen(tmp_path / "bad")


def test_a_set_can_be_closed_without_a_task_that_fails(world, tmp_path):
    build(own(tmp_path, "whole"))
    build(own(tmp_path), 0, 2)
    plan = find_plan(own(tmp_path))
    with pytest.raises(RunFailure, match="merge --allow-missing"):
        finish(own(tmp_path), plan)
    manifest = finish(own(tmp_path), plan, allow_missing=True)
    missing = [name for number in range(1, len(plan.slices), 2) for name in plan.slices[number].names]
    assert sorted(manifest["missing"]) == sorted(missing)
    assert verify(f"{tmp_path}/set", decode=True) == []
    build(own(tmp_path), 1, 2)
    assert seen(tmp_path / "set") == seen(tmp_path / "whole")


def test_every_site_is_in_one_slice(world, tmp_path):
    own_config = own(tmp_path)
    plan = find_plan(own_config)
    keys = [
        r.key
        for n, piece in enumerate(plan.slices)
        for i in range(len(piece.sites))
        for r in plan.ref(own_config.output.url, n, i).load(own_config).records
    ]
    assert sorted(keys) == sorted(SITES)
    assert plan.names == [part["name"] for part in build(own_config).manifest["shards"]]
    assert json.loads(storage.read_bytes(f"{tmp_path}/set/_build/plan.json"))["shards"] == plan.names
