"""Contact sheets and statistics: right colours, holes that cannot pass for pixels, figures that agree with the pixels."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest

from data_prep.commands.stats import recount
from data_prep.schema import CLEAR, NODATA, band_indices
from data_prep.shards import ShardSet
from data_prep.show import NODATA_RGB, chosen_dates, colours, sheet
from data_prep.statistics import code_values, stored_codes
from tests.sites import make_site, write_shard_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sites = [
        make_site("a", 0),
        make_site("b", 1, ("s2",), dates=5),
        make_site("c", 2, ("hr",), labels=False),
        make_site("d", 3, ("s1",)),
    ]
    return ShardSet.open(write_shard_set(str(tmp_path_factory.mktemp("set")), sites, ["train", "train", "val", "val"]))


def test_true_colour_is_red_green_blue_in_that_order():
    series = make_site("a").series["s2"]
    series.mask_THW[...] = CLEAR
    series.pixels_TCHW[...] = 1
    for channel, band in enumerate(("B04", "B03", "B02")):
        series.pixels_TCHW[:, band_indices("s2", (band,))[0]] = 1
        series.pixels_TCHW[0, band_indices("s2", (band,))[0]] = 3000
        shown = colours(series, "s2", 0)
        assert shown[0, 0].tolist() == [1.0 if c <= channel else 0.0 for c in range(3)]


def test_nodata_has_a_colour_of_its_own():
    for name, series in make_site("a").series.items():
        series.mask_THW[0, :2] = NODATA
        shown = colours(series, name, 0)
        np.testing.assert_allclose(
            shown[:2].reshape(-1, 3), [NODATA_RGB] * shown[:2].shape[0] * shown.shape[1], atol=1e-6
        )
        assert not np.isnan(shown).any()


def test_dates_are_evenly_spread():
    series = make_site("a", dates=9).series["s2"]
    assert chosen_dates(series, 3) == [0, 4, 8]
    assert chosen_dates(series, 20) == list(range(9))


def test_sheet_has_a_row_per_sample(shards):
    image = matplotlib.image.imread(io.BytesIO(sheet(shards, samples=2, s2_dates=2)))
    taller = matplotlib.image.imread(io.BytesIO(sheet(shards, samples=9, s2_dates=2)))
    assert taller.shape[0] > 1.8 * image.shape[0]
    assert sheet(shards, samples=2) == sheet(shards, samples=2)


def test_recount_is_the_manifest(shards):
    assert recount(shards, None) == shards.manifest["statistics"]
    assert recount(shards, "val")["s1"]["count"][0] < shards.manifest["statistics"]["s1"]["count"][0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16"])
def test_codes_and_values_are_inverse(dtype):
    rng = np.random.default_rng(0)
    array = rng.normal(100, 50, 1000).clip(0, 255).astype(dtype)
    values = code_values(dtype, 256 if np.dtype(dtype).itemsize == 1 else 65536)
    np.testing.assert_array_equal(values[stored_codes(array)], array.astype(np.float64))
