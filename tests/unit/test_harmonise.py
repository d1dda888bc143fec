"""Radiometry rules: declared offset, pixel evidence, clipping, nodata, backscatter scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_prep.harmonise import (
    Claim,
    Decision,
    Evidence,
    backscatter,
    backscatter_unit,
    baseline_number,
    claim_of,
    dark_floors,
    decide,
    judge,
    reflectance,
)
from data_prep.sources.records import Asset, SourceFault


def asset(**fields: object) -> Asset:
    return Asset("item/s2", "s2", "x.tif", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"), [("05.09", 5.09), ("N0400", 4.0), ("0213", 2.13), ("N9999", 99.99), ("", None), ("new", None)]
)
def test_baselines_are_read_in_every_spelling(text, number):
    assert baseline_number(text) == (None if number == 99.99 else number)


@pytest.mark.parametrize(
    ("baseline", "offset"), [("03.01", 0), ("04.00", -1000), ("05.10", -1000), ("", None), ("N9999", None)]
)
def test_baseline_decides_not_the_date(baseline, offset):
    assert claim_of(asset(baseline=baseline, datetime="2018-01-01T00:00:00Z")).offset_dn == offset


def test_explicit_offset_beside_the_pixels_wins_and_a_conflict_is_kept():
    said = claim_of(asset(baseline="05.00", scale=1e-4, offset=0.0))
    assert said.offset_dn == 0
    assert "05.00" in said.conflict
    assert decide(said, Evidence("unclear")).flags == (said.conflict,)
    assert claim_of(asset(baseline="05.00", scale=1e-4, offset=-0.1)).conflict == ""
    assert claim_of(asset(baseline="05.00"), offset_dn=-1000).offset_dn == -1000
    removed = claim_of(asset(baseline="05.00", offset_removed=True))
    assert (removed.offset_dn, removed.conflict) == (0, "")


@pytest.mark.parametrize(
    ("floors", "verdict"),
    [
        ({"B02": 1085, "B11": 1241}, "present"),  # terramind 433D L2A
        ({"B02": 1217, "B11": 159}, "absent"),  # 609U: bright in the visible, dark in the short-wave infrared
        ({"B02": 330}, "absent"),
        ({"B10": 1040, "B02": 3753}, "present"),  # L1C
        ({"B10": 54, "B02": 951}, "absent"),
        ({"B02": 1791, "B12": 1597}, "unclear"),  # bright savanna with the offset in: pixels cannot tell
        ({"B02": 850}, "unclear"),
        ({}, "unclear"),
    ],
)
def test_the_minimum_over_bands_is_judged(floors, verdict):
    assert judge(floors, 50_000).verdict == verdict


def test_few_pixels_never_prove_an_offset_but_may_disprove_it():
    assert judge({"B02": 1050}, 100).verdict == "unclear"
    assert judge({"B02": 50}, 100).verdict == "absent"


def test_contradictions_are_flagged_and_metadata_still_decides():
    left_in = decide(Claim(0, "declared"), Evidence("present", 1085, "B04", 50_000))
    assert left_in.offset_applied == 0
    assert "1085 in B04" in left_in.flags[0]
    never_there = decide(Claim(-1000, "baseline 05.00"), Evidence("absent", 330, "B02", 50_000))
    assert never_there.offset_applied == -1000
    assert "no offset" in never_there.flags[0]
    for claim in (Claim(0, "x"), Claim(-1000, "x")):
        assert decide(claim, Evidence("unclear", 1600, "B12")).flags == ()
    assert decide(Claim(-1000, "x"), Evidence("present", 1011, "B10")).flags == ()


@pytest.mark.parametrize(("verdict", "applied"), [("present", -1000), ("absent", 0), ("unclear", 0)])
def test_without_metadata_the_pixels_decide(verdict, applied):
    assert decide(Claim(None, "nothing declared"), Evidence(verdict, 1000, "B02")).offset_applied == applied


@given(hnp.arrays(np.uint16, (3, 4, 5)), st.sampled_from([0.0, -1000.0]))
def test_reflectance_keeps_nodata_and_clips_the_rest_at_1(raw, offset):
    values, valid = reflectance(raw, Decision(offset, 1.0, ""), None)
    assert (valid == (raw != 0).all(axis=0)).all()
    assert ((values == 0) == ~valid).all()
    expected = np.clip(raw.astype(int) + int(offset), 1, 65535)
    assert (values[:, valid] == expected[:, valid]).all()


def test_reflectance_takes_declared_nodata_nan_signed_and_scaled_numbers():
    signed = np.array([[[-5, 10, -9999]]], dtype=np.int16)
    values, valid = reflectance(signed, Decision(0, 1.0, ""), -9999)
    assert values.tolist() == [[[1, 10, 0]]]
    assert valid.tolist() == [[True, True, False]]
    share = np.array([[[0.25, np.nan, 0.00001]]], dtype=np.float32)
    values, valid = reflectance(share, Decision(0, 10_000.0, ""), None)
    assert values.tolist() == [[[2500, 0, 1]]]


def test_dark_floor_is_exact_and_ignores_zeros():
    dn = np.concatenate([np.zeros(5000, int), np.arange(1000, 3000)])
    floors, pixels = dark_floors({"B02": np.bincount(dn, minlength=65536)})
    assert pixels == 2000
    assert floors["B02"] == 1001  # the second darkest of 2,000: 0.1 %


def test_backscatter_scale_is_recognised_and_wrong_labels_flagged():
    db = np.random.default_rng(0).normal(-14, 3, 1000)
    assert backscatter_unit(db, "", "a") == ("dB", ())
    assert backscatter_unit(10 ** (db / 10), "", "a") == ("linear", ())
    unit, flags = backscatter_unit(10 ** (db / 10), "dB", "a")
    assert (unit, len(flags)) == ("linear", 1)
    with pytest.raises(SourceFault, match="calibrate"):
        backscatter_unit(np.full(100, 250.0), "", "a")


def test_linear_zero_negative_and_nan_are_invalid_not_tiny():
    raw = np.array([[[0.1, 0.0, -0.2, np.nan, 1e-12]], [[0.01, 0.1, 0.1, 0.1, 0.1]]], dtype=np.float32)
    values, valid = backscatter(raw, "linear", None)
    assert valid.tolist() == [[True, False, False, False, False]]
    np.testing.assert_allclose(values[:, 0, 0], [-10, -20], rtol=1e-6)
    assert np.isnan(values[:, 0, 1:]).all()


def test_db_fill_values_are_invalid():
    raw = np.array([[[-12.0, 0.0, -9999.0, 3.0]], [[-18.0, 0.0, -9999.0, 0.0]]], dtype=np.float32)
    values, valid = backscatter(raw, "dB", -9999.0)
    assert valid.tolist() == [[True, False, False, True]]
    assert values[0, 0, 0] == -12
