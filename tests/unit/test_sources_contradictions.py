"""What pixels say against metadata, date by date: mixed baselines, undeclared scales and fills, and what the policy does about it."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.config import GridConfig, QualityConfig
from data_prep.geo import Grid
from data_prep.harmonise import Claim, Evidence, backscatter, corrected, decide
from data_prep.schema import NODATA
from data_prep.sources import SourceFault, open_catalog, read_site
from data_prep.sources.items import AssetFields
from tests.scenes import GRID, S2_BANDS, item, s2_item, s2_pixels, write_cube, write_items

NATIVE = GridConfig()
BIG = Grid(GRID.crs, GRID.transform, 40, 40)
POLICY = {name: QualityConfig(on_contradiction=name) for name in ("drop", "fail", "correct")}  # type: ignore[arg-type]


def series_record(folder, pixels, **attributes):
    stamps = [f"2021-{month + 1:02d}-05T10:00:00Z" for month in range(len(pixels))]
    href = write_cube(folder / "s2.zarr", pixels, BIG, S2_BANDS, stamps, **attributes)
    entry = item("site", {"s2": AssetFields("s2", href, "application/vnd+zarr", S2_BANDS, BIG)}, times=stamps)
    (record,) = open_catalog(write_items(folder / "items", [entry]))
    return record


def image_record(folder, pixels, **fields):
    (record,) = open_catalog(write_items(folder / "items", [s2_item(folder, "site", pixels, BIG, **fields)]))
    return record


def mixed(order=(0, 0, 0, 1, 1, 1)):
    """Dates with the offset (1) and without, of the same ground."""
    truth = s2_pixels(0, 1, 40, low=30)[0]
    return truth, np.stack([truth + 1000 * with_it for with_it in order]).astype(np.uint16)


@pytest.mark.parametrize("order", [(0, 0, 0, 1, 1, 1), (1, 0, 1, 0, 1, 0), (1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)])
def test_a_series_that_mixes_baselines_undeclared_is_judged_date_by_date(tmp_path, order):
    truth, pixels = mixed(order)
    series = read_site(series_record(tmp_path, pixels), NATIVE).series["s2"]
    assert (series.pixels_TCHW == np.clip(truth, 1, None)).all()
    assert [decision["offset_applied"] for decision in series.decisions] == [-1000 * with_it for with_it in order]


def test_a_date_that_cannot_tell_goes_with_the_others_where_they_agree(tmp_path):
    _, pixels = mixed((1, 1, 1))
    pixels[2] = 5000  # cloud all over
    agreed = read_site(series_record(tmp_path / "a", pixels), NATIVE)
    assert [d["offset_applied"] for d in agreed.series["s2"].decisions] == [-1000, -1000, -1000]
    pixels[1] -= 1000
    split = read_site(series_record(tmp_path / "b", pixels), NATIVE)
    assert len(split.series["s2"].datetimes) == 2
    assert "the other dates disagree" in split.losses[0]["why"]


@pytest.mark.parametrize("declared", [{}, {"scale": 1.0}])
def test_reflectance_as_a_share_of_one(tmp_path, declared):
    truth = s2_pixels(1, 1, 40, low=30)[0]
    share = (truth / 10_000).astype(np.float32)
    fields = {"scale": None, "nodata": None, "baseline": "", **declared}
    series = read_site(image_record(tmp_path, share, **fields), NATIVE).series["s2"]
    assert (series.pixels_TCHW[0] == truth).all()
    assert not series.decisions[0]["flags"]


def test_a_declared_scale_that_makes_no_reflectance_is_a_contradiction(tmp_path):
    truth = s2_pixels(1, 1, 40, low=30)[0]
    share = (truth / 10_000).astype(np.float32)
    record = image_record(tmp_path, share, scale=1e-4, nodata=None)
    with pytest.raises(SourceFault, match=r"declared scale 0\.0001 makes no reflectance of numbers that reach 0\.39"):
        read_site(record, NATIVE)
    series = read_site(record, NATIVE, POLICY["correct"]).series["s2"]
    assert (series.pixels_TCHW[0] == truth).all()
    assert series.decisions[0]["corrected"]
    assert series.decisions[0]["flags"]
    counts = image_record(tmp_path / "n", truth, scale=1.0)  # digital numbers said to be shares of one
    with pytest.raises(SourceFault, match="declared scale 1 makes no reflectance"):
        read_site(counts, NATIVE)


def test_fill_values_nobody_declared_are_no_reflectance(tmp_path):
    truth = s2_pixels(2, 1, 40, low=30)[0].astype(np.int16)
    filled = truth.copy()
    filled[:, :3] = -9999
    filled[0, 5, 5] = -40  # slightly negative reflectance is measured
    series = read_site(image_record(tmp_path, filled, nodata=None), NATIVE).series["s2"]
    assert (series.mask_THW[0, :3] == NODATA).all()
    assert (series.mask_THW[0, 3:] != NODATA).all()
    assert (series.pixels_TCHW[0, :, :3] == 0).all()
    assert series.pixels_TCHW[0, 0, 5, 5] == 1
    share = (truth / 10_000).astype(np.float32)
    share[:, :3] = -9999
    series = read_site(image_record(tmp_path / "f", share, scale=None, nodata=None), NATIVE).series["s2"]
    assert (series.mask_THW[0, :3] == NODATA).all()
    assert (series.pixels_TCHW[0, :, 3:] == truth[:, 3:]).all()


def test_an_8_bit_picture_is_no_reflectance(tmp_path):
    with pytest.raises(SourceFault, match="8-bit"):
        read_site(image_record(tmp_path, np.full((10, 40, 40), 90, np.uint8), nodata=None), NATIVE)


def test_contradictions_are_dropped_corrected_or_fail_and_never_silently_used(tmp_path):
    truth, pixels = mixed((0, 1, 0))
    record = series_record(tmp_path, pixels, baselines=["03.00"] * 3)
    dropped = read_site(record, NATIVE, POLICY["drop"])
    assert dropped.series["s2"].datetimes == ["2021-01-05T10:00:00Z", "2021-03-05T10:00:00Z"]
    assert [(loss["modality"], loss["datetime"]) for loss in dropped.losses] == [("s2", "2021-02-05T10:00:00Z")]
    assert "offset is in the pixels" in dropped.losses[0]["why"]
    with pytest.raises(SourceFault, match="on_contradiction=fail"):
        read_site(record, NATIVE, POLICY["fail"])
    right = read_site(record, NATIVE, POLICY["correct"]).series["s2"]
    assert (right.pixels_TCHW == np.clip(truth, 1, None)).all()
    assert [decision.get("corrected", False) for decision in right.decisions] == [False, True, False]
    assert [bool(decision["flags"]) for decision in right.decisions] == [False, True, False]
    few = QualityConfig(min_dates=3)
    with pytest.raises(SourceFault, match="contradiction"):
        read_site(record, NATIVE, few)


def test_what_pixels_cannot_decide_is_not_corrected():
    said_twice = Claim(0.0, "x", conflict="BOA_ADD_OFFSET says 0, baseline says -1000")
    assert corrected(said_twice, Evidence("unclear", 1600, "B12")) is None
    right = corrected(said_twice, Evidence("present", 1020, "B12", 5000))
    assert (right.offset_applied, right.corrected, len(right.flags)) == (-1000, True, 2)
    assert decide(Claim(0.0, "x"), Evidence("unclear", top=300.0)).flags == ()


def test_border_noise_hangs_together_with_the_edge_and_calm_water_does_not():
    db = np.full((2, 20, 20), -14.0, np.float32)
    db[:, :, :3] = np.nan  # outside the swath
    db[:, :, 3:5] = -38.0  # what is left of it
    db[:, 10:13, 10:13] = -36.0  # a calm lake
    _, valid = backscatter(db, "dB", None)
    assert not valid[:, :5].any()
    assert valid[:, 5:].all()
    whole = np.full((2, 8, 8), -38.0, np.float32)
    assert backscatter(whole, "dB", None)[1].all()
