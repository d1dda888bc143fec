"""`data_prep audit` and `data_prep catalog` as commands: tables, exit codes, JSON last lines; and what an audit of shards finds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cluster.errors import UsageError
from data_prep.audit import audit, figures
from data_prep.commands import audit as audit_command
from data_prep.commands import catalog as catalog_command
from data_prep.config import BuildConfig, GridConfig, OutputConfig, QualityConfig, SourceConfig
from data_prep.geo import Grid
from data_prep.sources import open_catalog, read_site
from data_prep.sources.items import AssetFields
from tests.scenes import GRID, item, s1_pixels, s2_item, s2_pixels, write_cube, write_items, write_tiff

BIG = Grid(GRID.crs, GRID.transform, 40, 40)


def run(module, *argv):
    from cluster.cli import Parser

    parser = Parser(prog="data_prep")
    module.add_arguments(parser)
    return module.main(parser.parse_args([str(a) for a in argv]))


def scene(folder, name, low, **fields):
    grid = fields.pop("grid", BIG)
    pixels = s2_pixels(0, 1, grid.height, low=low, high=low + 3000)[0]
    return s2_item(folder, name, pixels, grid, **fields)


def test_audit_names_each_contradiction_and_exits_1(tmp_path, capsys):
    items = [
        scene(tmp_path, "clean", 50, baseline="03.01"),
        scene(tmp_path, "removed", 1050, baseline="05.09"),
        scene(tmp_path, "left_in", 1050, baseline="03.01"),
        scene(tmp_path, "never_there", 50, baseline="05.09"),
        scene(tmp_path, "bright", 2500, baseline="05.09"),
    ]
    url = write_items(tmp_path / "items", items)
    assert run(audit_command, url, "--json", "--out", tmp_path / "rows.jsonl") == 1
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert {entry["asset"] for entry in found["contradictions"]} == {"left_in/s2", "never_there/s2"}
    assert found["assets"] == 5
    assert sum("FLAG" in line for line in lines) == 4  # two table rows, two explanations
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["asset"]: row["applied"] for row in rows} == {
        "clean/s2": "0", "removed/s2": "-1000", "left_in/s2": "0", "never_there/s2": "-1000", "bright/s2": "-1000",
    }  # fmt: skip


def test_a_clean_catalog_exits_0_and_an_unusable_asset_1(tmp_path, capsys):
    folder = write_items(tmp_path / "items", [scene(tmp_path, "clean", 50)])
    assert run(audit_command, folder) == 0
    (tmp_path / "clean_s2.tif").write_bytes(b"broken")
    assert run(audit_command, folder, "--json") == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["contradictions"] == []
    assert found["faults"][0]["asset"] == "clean/s2"


def test_metadata_that_contradicts_itself_is_flagged(tmp_path):
    url = write_items(tmp_path / "items", [scene(tmp_path, "twice", 1050, baseline="05.09", offset=0.0)])
    (row,) = audit(url)
    assert "raster:bands offset says 0, baseline 05.09 says -1000" in row.contradictions[0]
    assert any("+1000 offset is in the pixels" in why for why in row.contradictions)


def test_backscatter_unit_mixed_calibration_and_all_nodata(tmp_path):
    linear = 10 ** (s1_pixels(0, 1, 40) / 10)
    assets = {}
    for name, pixels, unit, calibration in (
        ("wrong", linear, "dB", "sigma0 GRD"), ("right", linear, "linear", "gamma0 RTC"),
    ):  # fmt: skip
        href = write_tiff(tmp_path / f"{name}.tif", pixels[0].astype(np.float32), BIG)
        day = "01" if name == "wrong" else "02"
        assets[name] = AssetFields(
            "s1",
            href,
            bands=("VV", "VH"),
            grid=BIG,
            unit=unit,
            calibration=calibration,
            datetime=f"2021-06-{day}T05:00:00Z",
        )
    rows = {row.asset: row for row in audit(write_items(tmp_path / "items", [item("site", assets)]))}
    assert any("declared dB, but the numbers are linear" in why for why in rows["site/wrong"].contradictions)
    assert all(any("mixes" in why for why in row.contradictions) for row in rows.values())
    empty = s2_item(tmp_path, "empty", np.zeros((10, 40, 40), np.uint16), BIG)
    (row,) = audit(write_items(tmp_path / "empty", [empty]))
    assert row.fault == "holds no valid pixel"


def test_alignment_is_told(tmp_path):
    shifted = Grid(BIG.crs, (10.0, 0.0, 500003.0, 0.0, -10.0, 5299996.0), 40, 40)
    href = write_cube(
        tmp_path / "s1.zarr",
        s1_pixels(0, 2, 40),
        shifted,
        ("VV", "VH"),
        ["2021-06-01T05:00:00Z", "2021-06-02T05:00:00Z"],
    )
    entry = scene(tmp_path, "site", 50)
    entry["assets"]["s1"] = item("x", {"s1": AssetFields("s1", href, "application/vnd+zarr", ("VV", "VH"), shifted)})[
        "assets"
    ]["s1"]
    rows = {row.modality: row for row in audit(write_items(tmp_path / "items", [entry]))}
    assert rows["s2"].alignment == "copy"
    assert rows["s1"].alignment.startswith("shift -0.30,")


def test_dates_out_of_order_are_noted(tmp_path):
    stamps = ["2021-06-09T05:00:00Z", "2021-06-02T05:00:00Z"]
    href = write_cube(tmp_path / "s1.zarr", s1_pixels(0, 2, 40), BIG, ("VV", "VH"), stamps)
    entry = item(
        "site", {"s1": AssetFields("s1", href, "application/vnd+zarr", ("VV", "VH"), BIG)}, times=sorted(stamps)
    )
    (row,) = audit(write_items(tmp_path / "items", [entry]))
    assert "not in order" in row.notes[0]
    assert row.verdict == "ok"


CORRECT = QualityConfig(on_contradiction="correct")


def build(url, out, quality=QualityConfig(), **grid):  # noqa: B008
    from data_prep.build import build as make

    config = BuildConfig(
        source=SourceConfig(catalog=(url,)), output=OutputConfig(url=str(out)), grid=GridConfig(**grid), quality=quality, workers=1,
    )  # fmt: skip
    return make(config, 0, 1, False)


def test_shards_hold_bit_for_bit_what_was_read_and_their_audit_repeats_the_flags(tmp_path):
    cube = write_cube(tmp_path / "s1.zarr", s1_pixels(3, 3, 40), BIG, ("VV", "VH"),
                      [f"2021-06-0{d}T05:00:00Z" for d in (3, 1, 2)], orbits=["ascending", "descending", "ascending"])  # fmt: skip
    both = scene(tmp_path, "both", 50)
    both["assets"]["s1"] = item("x", {"s1": AssetFields("s1", cube, "application/vnd+zarr", ("VV", "VH"), BIG)})[
        "assets"
    ]["s1"]
    url = write_items(tmp_path / "items", [both, scene(tmp_path, "left_in", 1050, baseline="03.01")])
    build(url, tmp_path / "shards", CORRECT)
    from data_prep.shards import ShardSet

    shards = ShardSet.open(str(tmp_path / "shards"))
    records = {record.key: record for record in open_catalog(url)}
    assert shards.num_samples == 2
    for number in range(2):
        stored = shards.read_sample(number)
        fresh = read_site(records[stored.key], GridConfig(), CORRECT)
        assert set(stored.series) == set(fresh.series)
        assert (stored.crs, stored.footprint, stored.cell) == (fresh.crs, fresh.footprint, fresh.cell)
        for name, series in fresh.series.items():
            kept = stored.series[name]
            assert kept.pixels_TCHW.tobytes() == series.pixels_TCHW.tobytes()
            assert (kept.mask_THW == series.mask_THW).all()
            assert (kept.datetimes, kept.transform) == (series.datetimes, series.transform)
            assert [o for o in kept.orbits if o] == [o for o in series.orbits if o]
            assert kept.decisions == series.decisions
    found = figures(audit(str(tmp_path / "shards")))
    assert {entry["asset"] for entry in found["contradictions"]} == {"left_in/s2"}


def test_catalog_command_and_its_errors(tmp_path, capsys):
    folder = write_items(tmp_path / "items", [scene(tmp_path, "a", 50), scene(tmp_path, "b", 50)])
    assert run(catalog_command, folder, tmp_path / "c.parquet", "--layout", "stac", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sites"] == 2
    with pytest.raises(UsageError, match="does not exist"):
        run(catalog_command, tmp_path / "nowhere", tmp_path / "d.parquet", "--layout", "terramind")
    with pytest.raises(SystemExit) as stop:
        run(catalog_command, folder, tmp_path / "d.parquet", "--layout", "nonsense")
    assert stop.value.code == 2
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == ["c.parquet"]
