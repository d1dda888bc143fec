"""The plan: a pure function of catalog and config; splits that do not leak; nothing built twice."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from data_prep.commands.build import array_share
from data_prep.config import SPLITS, BuildConfig, GridConfig, ShardsConfig, SourceConfig, SplitConfig
from data_prep.plan import estimate_bytes, make_plan
from data_prep.sources.records import SiteRecord, SourceFault
from data_prep.split import assign, draw, near_pairs, separation
from tests.sites import make_record, make_site


def records_of(places: list[tuple[float, float]], cell: str = "") -> list[SiteRecord]:
    return [
        make_record(make_site(f"k_{i}", i, ("s2",), 1, place=p, cell=cell or f"cell{i % 5}"))
        for i, p in enumerate(places)
    ]


LINE = records_of([(400.0 * i, 0.0) for i in range(40)])


@settings(max_examples=25)
@given(order=st.permutations(range(40)), workers=st.integers(0, 9))
def test_plan_depends_on_catalog_and_config_alone(order, workers):
    config = BuildConfig(shards=ShardsConfig(max_samples=3))
    other = BuildConfig(shards=ShardsConfig(max_samples=3), workers=workers, error_budget=0.5)
    assert make_plan([LINE[i] for i in order], other) == make_plan(LINE, config)


def test_another_config_or_site_is_another_plan():
    base = make_plan(LINE, BuildConfig())
    assert make_plan(LINE, BuildConfig(grid=GridConfig(max_dates=2))).fingerprint != base.fingerprint
    assert make_plan(LINE[:-1], BuildConfig()).fingerprint != base.fingerprint
    moved = [
        dataclasses.replace(
            r, assets=tuple(dataclasses.replace(a, href="/else/" + a.href.rsplit("/", 1)[1]) for a in r.assets)
        )
        for r in LINE
    ]
    assert make_plan(moved, BuildConfig()).fingerprint == base.fingerprint


def test_every_site_is_planned_once_and_bounds_hold():
    size = estimate_bytes(LINE[0], GridConfig())
    plan = make_plan(LINE, BuildConfig(shards=ShardsConfig(max_bytes=size * 2 + 1)))
    keys = [record.key for shard in plan.shards for record in shard.records]
    assert sorted(keys) == sorted(record.key for record in LINE)
    assert max(len(shard.records) for shard in plan.shards) == 2
    assert [s.name for s in plan.shards] == sorted(
        (s.name for s in plan.shards), key=lambda n: (SPLITS.index(n.split("-")[0]), n)
    )


def test_estimate_is_the_size_of_the_arrays():
    site = make_site("a", dates=3)
    raw = sum(s.pixels_TCHW.nbytes + s.mask_THW.nbytes for s in site.series.values())
    record = make_record(site)
    grid = GridConfig(hr_gsd_m=site.series["hr"].gsd_m)
    assert estimate_bytes(record, grid) - 4096 == raw


def test_repeats_are_dropped_and_counted():
    copy = dataclasses.replace(LINE[0], key="another_name")
    plan = make_plan([*LINE, LINE[3], copy], BuildConfig())
    assert plan.report["sites"] == {"listed": 42, "not_chosen": 0, "duplicates": 2, "planned": 40}
    assert plan.fingerprint == make_plan(LINE, BuildConfig()).fingerprint


def test_a_key_of_two_sites_is_a_fault():
    clash = dataclasses.replace(LINE[7], key=LINE[0].key)
    plan = make_plan([*LINE[:5], clash], BuildConfig())
    assert plan.num_sites == 5
    assert [(f["site"], f["asset"]) for f in plan.faults] == [("k_0", "k_7/s2")]


def test_choice_of_modalities_and_box():
    both = [make_record(make_site("a", 0, ("hr", "s2"))), make_record(make_site("b", 1, ("hr",), place=(5000, 0)))]
    plan = make_plan(both, BuildConfig(source=SourceConfig(modalities=("s2",))))
    assert [r.modalities for s in plan.shards for r in s.records] == [("s2",)]
    west = both[0].bbox_wgs84
    plan = make_plan(both, BuildConfig(source=SourceConfig(bbox=(west[0] - 0.01, west[1], west[2] + 0.01, west[3]))))
    assert plan.num_sites == 1
    with pytest.raises(UsageError, match=r"no site to build.*cannot be placed.*first: x: broken"):
        make_plan(both, BuildConfig(source=SourceConfig(modalities=("s1",))), [SourceFault("x", "broken")])


@settings(max_examples=30)
@given(
    places=st.lists(st.tuples(st.floats(0, 6000), st.floats(0, 6000)), min_size=2, max_size=25),
    buffer_m=st.sampled_from([0.0, 50.0, 700.0]), seed=st.integers(0, 5),
)  # fmt: skip
def test_no_two_splits_come_near(places, buffer_m, seed):
    records = records_of(places, "x")
    config = SplitConfig({"train": 0.5, "val": 0.25, "probe": 0.25}, buffer_m, cell_m=1000, seed=seed, min_cells=0)
    result = assign(records, config)
    kept = [(r, s) for r, s in zip(records, result.splits) if s]
    for i, (one, split) in enumerate(kept):
        for other, its in kept[:i]:
            if split != its:
                distance, share = separation(one, other)
                assert distance >= buffer_m
                assert share <= 0.02
    assert result.report["pairs_within_buffer_after"] == 0


def test_buffer_costs_training_sites_not_evaluation_sites():
    records = records_of([(0, 0), (300, 0), (600, 0)])
    pairs, overlapping = near_pairs(records, ["train", "probe", "train"], 200)
    assert (pairs, overlapping) == ([(0, 1), (1, 2)], 0)
    assert near_pairs(records, ["train", "probe", "train"], 100)[0] == []
    twice = records_of([(0, 0), (80, 0)])
    assert near_pairs(twice, ["train", "val"], 0) == ([(0, 1)], 1)


def test_distance_is_in_metres():
    one, other = records_of([(0, 0), (1000, 0)])
    assert separation(one, other)[0] == pytest.approx(840, rel=5e-3)


def test_neighbours_across_the_antimeridian_are_seen():
    def at(lon: float, key: str) -> SiteRecord:
        return SiteRecord(
            key, "c", "EPSG:4326", (lon, 0.0, lon + 0.01, 0.01), (lon, 0.0, lon + 0.01, 0.01), LINE[0].assets
        )

    pairs, _ = near_pairs([at(179.985, "a"), at(-179.995, "b")], ["train", "probe"], 2000)
    assert pairs == [(0, 1)]


def test_a_cell_keeps_its_split_when_the_set_grows():
    config = SplitConfig()
    drawn = [draw(f"cell{i}", config) for i in range(4000)]
    assert drawn[:2000] == [draw(f"cell{i}", config) for i in range(2000)]
    for split, share in config.fractions.items():
        assert drawn.count(split) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    assert draw("cell0", SplitConfig({"val": 1.0})) == "val"


def test_a_handful_of_places_is_all_train():
    records = [make_record(make_site(f"s{i}", i, ("s2",), place=(20_000.0 * i, 0))) for i in range(12)]
    config = SplitConfig({"train": 0.5, "probe": 0.5}, cell_m=10_000.0, min_cells=12)
    assert set(assign(records[:11], config).splits) == {"train"}
    assert set(assign(records, config).splits) == {"train", "probe"}


def test_array_share():
    assert array_share(None, None, {}) == (0, 1)
    assert array_share(2, 3, {"SLURM_ARRAY_TASK_ID": "9"}) == (2, 3)
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "5",
    }
    assert array_share(None, None, array) == (3, 5)
    for task, tasks in ((1, None), (None, 2), (3, 3), (-1, 2)):
        with pytest.raises(UsageError):
            array_share(task, tasks, {})
