"""Which images a site gets: overpasses, clouds, orbits, spread over time, spares; dumps read once, slices that are whole."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import zlib
from collections.abc import Set

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import shapely.geometry

from data_prep import build as building
from data_prep.catalog import write_items
from data_prep.config import (
    BuildConfig,
    GridConfig,
    OutputConfig,
    PrepareConfig,
    SensorConfig,
    ShardsConfig,
    SitesConfig,
    SplitConfig,
)
from data_prep.grow import append
from data_prep.prepare import search
from data_prep.prepare.choose import choose
from data_prep.prepare.items import table_of_items
from data_prep.prepare.layout import lay_sites
from data_prep.prepare.run import SliceJob, claim, finish, prepare_slice, read_dumps, unfinished
from data_prep.prepare.slices import SliceItems, read_places, read_prepared, site_of
from data_prep.prepare.spares import read_with_spares
from data_prep.schema import Series, SiteArrays
from data_prep.sources.records import SiteRecord, SourceFault
from data_prep.verify import verify
from tests.sites import make_site

SITE = shapely.box(10.0, 47.0, 10.01, 47.01)
WIDE = (9.0, 46.0, 11.0, 48.0)
SENSOR = SensorConfig("x", start="2023-01-01", end="2023-12-31", dates=4, spares=2)


def item(
    name: str, day: int, cloud: float | None = 10.0, box: tuple[float, ...] = WIDE, hour: float = 10.0, **properties
) -> dict:
    """An item of day `day` of 2023."""
    when = dt.datetime(2023, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=day, hours=hour)
    said = {
        "datetime": when.isoformat().replace("+00:00", "Z"),
        "sat:relative_orbit": 22,
        "platform": "a",
        **properties,
    }
    if cloud is not None:
        said["eo:cloud_cover"] = cloud
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "s2", "geometry": shapely.geometry.mapping(shapely.box(*box)),
        "bbox": list(box), "links": [], "properties": said, "assets": {"B02": {"href": f"/a/{name}.tif", "type": "image/tiff"}},
    }  # fmt: skip


def chosen(
    items: list[dict], sensor: SensorConfig = SENSOR, is_series: bool = True, site=SITE
) -> tuple[list, list, str]:
    """(ids of the chosen dates, ids of the spares, why not) of one site."""
    table = search._once(table_of_items(items))
    found = choose(np.array([site]), np.array([(site.bounds[0] + site.bounds[2]) / 2]), table, sensor, is_series)
    names = table["f_id"].to_pylist()
    read = lambda images: [tuple(names[i] for i in image) for image in images]  # noqa: E731
    return read(found.images[0]), read(found.spares[0]), found.why[0]


def test_dates_are_spread_over_the_year_and_clear_within_each_period():
    items = [item(f"d{day:03d}", day, cloud=float(day % 50)) for day in range(0, 365, 5)]
    images, spares, why = chosen(items)
    days = [int(name[1:]) for (name,) in images]
    assert days == sorted(days)
    assert [day * 4 // 365 for day in days] == [0, 1, 2, 3]
    assert all(day % 50 == 0 for day in days)
    assert len(spares) == 2
    assert {(name,) for (name,) in spares}.isdisjoint(images)
    assert why == ""


def test_best_of_period():
    items = [item(f"d{day}", day, cloud=float(60 - day % 30)) for day in range(0, 90, 3)]
    images, _, _ = chosen(items, dataclasses.replace(SENSOR, period_days=30.0, dates=3))
    assert images == [("d27",), ("d57",), ("d87",)]


def test_one_overpass_is_one_date():
    west, east = (9.0, 46.0, 10.005, 48.0), (10.004, 46.0, 11.0, 48.0)
    whole = [
        item("t1", 5, box=WIDE, **{"s2:processing_baseline": "04.00"}),
        item("t2", 5, box=WIDE, **{"s2:processing_baseline": "05.10"}),
    ]
    assert chosen(whole)[0] == [("t2",)]  # twins: the latest processing
    assert chosen([*whole, item("half", 5, box=west)])[0] == [("t2",)]
    halves = [item("w", 8, box=west), item("e", 8, box=east, hour=10.001)]
    assert chosen(halves)[0] == [("w", "e")]  # none covers the site: both, one date
    assert chosen(halves[:1])[0] == []  # half a site is none
    other = [item("a", 9), item("b", 9, hour=10.5, **{"sat:relative_orbit": 65})]
    assert chosen(other)[0] == [("a",), ("b",)]


def test_the_solar_day_counts_not_the_utc_day():
    far = shapely.box(178.0, -17.0, 178.01, -16.99)  # solar noon is at midnight UTC
    box = (177.0, -18.0, 179.0, -16.0)
    west, east = (box[0], box[1], 178.005, box[3]), (178.004, box[1], box[2], box[3])
    pair = [item("late", 9, box=west, hour=23.999), item("early", 10, box=east, hour=0.001)]
    assert chosen(pair, site=far)[0] == [("late", "early")]


def test_clouds_orbits_and_numbers():
    items = [
        item("clear", 3, 5.0),
        item("cloudy", 50, 95.0),
        item("unsaid", 100, None),
        item("other", 200, 5.0, **{"sat:relative_orbit": 7}),
    ]
    assert chosen(items, dataclasses.replace(SENSOR, max_cloud=60.0))[0] == [("clear",), ("unsaid",), ("other",)]
    assert chosen(items, dataclasses.replace(SENSOR, orbits=(7,)))[0] == [("other",)]
    assert ("other",) not in chosen(items, dataclasses.replace(SENSOR, one_orbit=True))[0]
    assert chosen(items, dataclasses.replace(SENSOR, min_dates=4, max_cloud=60.0))[2] == "3 dates, min_dates=4"


def test_hr_takes_what_covers_most_then_the_newest():
    sliver, old, new = item("sliver", 300, box=(10.0095, 46.0, 11.0, 48.0)), item("old", 10), item("new", 200)
    assert chosen([sliver, old, new], dataclasses.replace(SENSOR, min_cover=0.01), is_series=False)[:2] == (
        [("new",)],
        [("old",), ("sliver",)],
    )


@pytest.fixture
def config(tmp_path):
    """Some forty sites in slices of ten, and a dump that sees them (and others)."""
    items = [item(f"d{day:03d}", day, float(day % 40)) for day in range(0, 360, 10)]
    items += [item(f"away{day}", day, box=(50.0, 0.0, 51.0, 1.0)) for day in range(5)]
    items += [item(f"wrong{day}", day - 400) for day in range(5)]
    write_items(items, f"{tmp_path}/dump.parquet")
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    config = BuildConfig(
        sites=SitesConfig(f"{tmp_path}/sites.parquet", bbox=(10.0, 47.0, 10.05, 47.03), sites_per_slice=10), grid=GridConfig(side_m=640),
        prepare=PrepareConfig(f"{tmp_path}/plan", {"s2": dataclasses.replace(SENSOR, source=f"{tmp_path}/dump.parquet", collections=("s2",))}),
    )  # fmt: skip
    lay_sites(config)
    return config


def run_all(config: BuildConfig) -> dict:
    number, mark = claim(config)
    read_dumps(config)
    for i in unfinished(config, number):
        prepare_slice(SliceJob(i, config), lambda _: None)
    return finish(config, number, mark)


def test_a_dump_is_read_once_and_slices_hold_what_they_need(config, tmp_path, monkeypatch):
    done = run_all(config)
    assert sum(entry["sites"] for entry in done["slices"]) == sum(
        read_places(config.prepare.url, i).num_rows for i in range(len(done["slices"]))
    )
    assert {entry["sensors"]["s2"]["found"] for entry in done["slices"]} == {36}  # neither away nor of another year
    items = SliceItems(config.prepare.url, 0, ["s2"])
    record, spares = site_of(read_places(config.prepare.url, 0).to_pylist()[0], items, ["s2"])
    assert len(record.assets) == 4
    assert [len(image) for image in spares["s2"]] == [1, 1]
    assert record.datetimes == tuple(sorted(record.datetimes))
    assert {asset.modality for asset in record.assets} == {"s2"}
    monkeypatch.setattr(search, "_tables", lambda *_: pytest.fail("read again"))
    (tmp_path / "plan" / "000001.json").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "plan").glob("0*.parquet")}
    assert run_all(config) == done
    assert {p.name: p.read_bytes() for p in (tmp_path / "plan").glob("0*.parquet")} == before


def test_a_static_catalog_chooses_as_a_dump_does(config, tmp_path):
    dump = run_all(config)
    sensors = {"s2": dataclasses.replace(config.prepare.sensors["s2"], source=f"{tmp_path}/items.json")}
    other = dataclasses.replace(config, prepare=PrepareConfig(f"{tmp_path}/plan2", sensors))
    catalog = run_all(other)
    assert [e["sha256"]["sites"] for e in dump["slices"]] == [e["sha256"]["sites"] for e in catalog["slices"]]
    records = [
        site_of(read_places(c.prepare.url, 1).to_pylist()[0], SliceItems(c.prepare.url, 1, ["s2"]), ["s2"])[0]
        for c in (config, other)
    ]
    assert records[0] == records[1]


def test_another_plan_is_refused(config):
    from cluster.errors import UsageError

    run_all(config)
    sensors = {"s2": dataclasses.replace(config.prepare.sensors["s2"], dates=3)}
    with pytest.raises(UsageError, match="other sites or settings"):
        claim(dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, sensors=sensors)))


def read_as(own: SiteRecord, without: Set[str] = frozenset(), losses: tuple[str, ...] = ()) -> SiteArrays:
    """What reading a record gives: one date per asset, bar those in `without`; its assets are told by their hrefs."""
    kept = [asset for asset in own.assets if asset.datetime not in without and asset.id not in losses]
    count = len(kept)
    series = Series(
        np.zeros((count, 10, 1, 1), np.uint16), np.ones((count, 1, 1), np.uint8), [asset.datetime for asset in kept],
        (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 10.0, [asset.href for asset in kept],
    )  # fmt: skip
    lost = [{"modality": "s2", "datetime": "", "asset": name, "why": "corrupt"} for name in losses]
    return SiteArrays(own.key, own.crs, own.bbox_wgs84, own.footprint, {"s2": series}, own.cell, losses=lost)


def test_spares_replace_what_is_broken_until_none_is_left(config):
    run_all(config)
    record, spares = site_of(
        read_places(config.prepare.url, 0).to_pylist()[0], SliceItems(config.prepare.url, 0, ["s2"]), ["s2"]
    )
    broken = {record.assets[1].id}

    def read(own):
        for asset in own.assets:
            if asset.id in broken:
                raise SourceFault(asset.id, "corrupt")
        return read_as(own)

    spare = spares["s2"][0][0]
    first = read_with_spares(record, spares, read).series["s2"]
    assert first.product_ids == [spare.href if a.id in broken else a.href for a in record.assets]
    broken |= {spares["s2"][0][0].id, record.assets[0].id}
    with pytest.raises(SourceFault, match="corrupt"):
        read_with_spares(record, spares, read)
    broken = {record.assets[0].id}

    def lossy(own):
        return read_as(own, losses=tuple(a.id for a in own.assets if a.id in broken))

    mended = read_with_spares(record, spares, lossy)
    assert mended.series["s2"].product_ids == [spare.href, *(a.href for a in record.assets[1:])]
    assert mended.losses == []
    assert len(read_with_spares(record, {}, lossy).losses) == 1  # without a spare the loss stays, and is named


def test_a_date_without_a_valid_pixel_is_replaced(config):
    run_all(config)
    record, spares = site_of(
        read_places(config.prepare.url, 0).to_pylist()[0], SliceItems(config.prepare.url, 0, ["s2"]), ["s2"]
    )
    empty = {record.assets[2].datetime, spares["s2"][0][0].datetime}

    def read(own):
        return read_as(own, without=empty)

    dates = read_with_spares(record, spares, read).series["s2"].datetimes
    assert dates == [spares["s2"][1][0].datetime if a is record.assets[2] else a.datetime for a in record.assets]
    assert len(read_with_spares(record, {}, read).series["s2"].datetimes) == 3


def test_a_set_grows_by_the_prepared_plan_of_a_wider_area(config, tmp_path, monkeypatch):
    """Old shards and splits stay; what both plans hold is not built twice; a second run, or a killed one, ends in the same bytes."""

    def read(record, grid, **_):
        return make_site(
            record.key, zlib.crc32(record.key.encode()), ("s2",), dates=2, side_px=4, cell=record.cell, labels=False
        )

    monkeypatch.setattr(building, "read_site", read)
    config = dataclasses.replace(
        config, shards=ShardsConfig(max_samples=4), workers=1, output=OutputConfig(f"{tmp_path}/set"),
        split=SplitConfig({"train": 0.6, "val": 0.2, "probe": 0.2}),
    )  # fmt: skip
    lay_sites(dataclasses.replace(config, sites=dataclasses.replace(config.sites, url=f"{tmp_path}/near.parquet")))
    near = dataclasses.replace(
        config, sites=dataclasses.replace(config.sites, url=f"{tmp_path}/near.parquet"), prepare=dataclasses.replace(config.prepare, url=f"{tmp_path}/near")
    )  # fmt: skip
    wide = dataclasses.replace(
        config, sites=dataclasses.replace(config.sites, url=f"{tmp_path}/wide.parquet", bbox=(10.0, 47.0, 10.12, 47.06)),
        prepare=dataclasses.replace(config.prepare, url=f"{tmp_path}/wide"),
    )  # fmt: skip
    lay_sites(wide)
    run_all(near)
    run_all(wide)
    building.build(near)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.tar")}
    real, made = building.build_shard, []

    def dies(job, report, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.shard.name)
        return real(job, report, **options)

    monkeypatch.setattr(building, "build_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        append(wide)
    monkeypatch.setattr(building, "build_shard", real)
    grown = append(wide)
    after = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.tar")}
    assert before.items() < after.items()
    said = grown.plan.report["appended"][0]["sites"]
    assert said["held"] == sum(entry["sites"] for entry in read_prepared(near.prepare.url)["slices"])
    assert verify(f"{tmp_path}/set", decode=True) == []

    def places(url):
        table = pq.read_table(f"{url}/index.parquet", columns=["key", "split"])
        return dict(zip(table["key"].to_pylist(), table["split"].to_pylist()))

    building.build(dataclasses.replace(wide, output=OutputConfig(f"{tmp_path}/once")))
    assert places(tmp_path / "set") == places(tmp_path / "once")
    assert len(set(places(tmp_path / "set").values())) > 1
    assert append(wide).built == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.tar")} == after
