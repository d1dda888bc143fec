"""A wrong unit, a shuffled order or a wrong count of bands is refused by name; what is declared comes out as the model stores it."""

import numpy as np
import pytest

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from pipeline.evaluate.bands import Bands, to_model
from pipeline.evaluate.radiometry import TEN_METRE_FIRST, check_set, check_unit, order_fault
from tests.data_folder import real_data

S2 = MODALITIES["s2"].bands
VEGETATION = np.array([300, 550, 350, 900, 2300, 2900, 3100, 3200, 1700, 900.0])
SOIL = np.array([900, 1250, 1700, 2000, 2200, 2350, 2450, 2600, 3200, 2700.0])
WATER = np.array([500, 420, 280, 210, 150, 140, 120, 110, 60, 40.0])


def scene(pixels: int = 3000, seed: int = 0) -> np.ndarray:
    """[P, 10] mixtures of three spectra in the order of the sensor, with noise."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet([1.2, 1.2, 0.4], pixels)
    light = rng.normal(1, 0.1, (pixels, 1)).clip(0.5)
    return (share @ np.stack([VEGETATION, SOIL, WATER])) * light * rng.normal(1, 0.02, (pixels, 10))


def declared(**change: object) -> Bands:
    return Bands(**{"sensor": "s2", "order": S2, "unit": "reflectance x 10000", "gsd_m": 10.0} | change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unit": "DN"}, "undeclared"),
        ({"order": S2[:-1]}, "has no B12"),
        ({"order": (*S2, "B12")}, "twice"),
        ({"sensor": "s3"}, "unknown sensor"),
        ({"sensor": "hr", "order": ("R", "G", "B"), "unit": "reflectance x 10000"}, "shown"),
    ],
)
def test_what_is_not_declared_whole_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        declared(**change)


def test_bands_are_picked_by_name_and_brought_to_stored_numbers() -> None:
    order = ("B12", "B01", *reversed(S2[:-1]))
    raw = np.arange(11, dtype=np.float32)[None, :, None, None] / 100 + np.zeros((1, 11, 2, 2), np.float32)
    assert not to_model(declared(order=order, unit="reflectance"), raw, "here")[
        1
    ].any()  # band B12 is exactly 0: nodata
    raw += 0.01
    x, ok = to_model(declared(order=order, unit="reflectance", offset=0.1), raw, "here")
    assert x[0, :, 0, 0].tolist() == [round((order.index(b) / 100 + 0.11) * 10_000) for b in S2]
    assert ok.all()
    with pytest.raises(UsageError, match="10 bands, declared are 11"):
        to_model(declared(order=order), raw[:, 1:], "here")


def test_picture_from_planet_reflectance_and_refused_float_picture() -> None:
    planet = Bands("hr", ("B", "G", "R", "N"), "reflectance x 10000", 3.0, shown=(0, 3000))
    raw = np.array([300, 1500, 3000, 0], np.int16)[None, :, None, None]
    x, ok = to_model(planet, raw, "here")
    assert x[0, :, 0, 0].tolist() == [255, 128, 26]
    assert ok.all()
    with pytest.raises(UsageError, match="float32 numbers where 0-255"):
        to_model(Bands("hr", ("R", "G", "B"), "uint8", 0.3), np.zeros((1, 3, 2, 2), np.float32), "here")


@pytest.mark.parametrize(
    ("bands", "numbers", "says"),
    [
        (declared(), scene() / 10_000, "reflectance 0-1"),
        (declared(unit="reflectance"), scene(), "reflectance x 10000"),
        (declared(), (scene() / 40).astype(np.uint8), "8-bit"),
        (Bands("s1", ("VV", "VH"), "dB", 10.0), np.full((900, 2), 0.05), "linear"),
        (Bands("s1", ("VV", "VH"), "linear", 10.0), np.full((900, 2), -12.0), "dB"),
        (Bands("hr", ("R", "G", "B"), "uint8", 1.0), np.ones((900, 3), np.uint8), "none is above 1"),
    ],
)
def test_a_wrong_unit_is_refused(bands: Bands, numbers: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_unit(bands, numbers, "set")


def test_right_units_pass() -> None:
    check_unit(declared(), scene(), "set")
    check_unit(declared(unit="reflectance"), scene() / 10_000, "set")
    check_unit(Bands("s1", ("VV", "VH"), "dB", 10.0), np.full((900, 2), -12.0), "set")


def test_the_declared_order_passes_and_others_are_refused() -> None:
    x = scene()
    assert order_fault(x) == ""
    assert "B08, B05" in order_fault(x[:, [S2.index(b) for b in TEN_METRE_FIRST]])
    told_wrongly = x[
        :, [TEN_METRE_FIRST.index(b) for b in S2]
    ]  # a file in the sensor's order under a row that says 10 m first
    assert order_fault(told_wrongly)
    assert "reverse" in order_fault(x[:, ::-1])
    rng = np.random.default_rng(1)
    refused = [bool(order_fault(x[:, rng.permutation(10)])) for _ in range(50)]
    assert np.mean(refused) > 0.85


def test_vv_and_vh_exchanged_and_an_offset_left_in() -> None:
    radar = np.random.default_rng(0).normal([-9, -16], 1.5, (2000, 2))
    bands = Bands("s1", ("VV", "VH"), "dB", 10.0)
    assert check_set(bands, [radar], "set") == []
    with pytest.raises(UsageError, match="exchanged"):
        check_set(bands, [radar[:, ::-1]], "set")
    assert check_set(declared(), [scene()], "set") == []
    (note,) = check_set(declared(), [scene() + 1000], "set")
    assert "offset" in note
    (note,) = check_set(declared(), [scene(100)], "set")
    assert "too few" in note


def test_real_scenes_pass_and_shuffled_ones_do_not() -> None:
    folder = real_data("unlabelled") / "s2_l2a_500.npz"
    stored = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    x = np.load(folder)["x"][::10, :, ::4, ::4][:, [stored.index(b) for b in S2]]
    pixels = np.moveaxis(x, 1, -1).reshape(len(x), -1, 10).astype(float)
    assert order_fault(pixels.reshape(-1, 10)) == ""
    rng = np.random.default_rng(0)
    shuffled = [bool(order_fault(pixels.reshape(-1, 10)[:, rng.permutation(10)])) for _ in range(40)]
    assert np.mean(shuffled) > 0.9
