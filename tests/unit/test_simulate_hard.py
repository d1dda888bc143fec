"""Hard scene types: the mean says the group, only arrangement, order of dates or roughness says the type."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import UsageError
from data_prep.simulate.arrangements import HARD, draw_hard
from data_prep.simulate.landcover import CELL_PX
from data_prep.simulate.scenes import SCENE_TYPES, draw_scene
from data_prep.simulate.spectra import (
    BARE,
    CLASSES,
    DOUBLE_CROP,
    EARLY_CROP,
    LATE_CROP,
    ROUGH,
    backscatter,
    greenness,
    reflectance,
)
from data_prep.simulate.write import simulate


@pytest.mark.parametrize("scene", range(len(HARD)))
def test_every_type_is_drawn_the_same_from_the_same_seed(scene):
    one, two, other = (draw_scene("hard", scene, 120, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.material_HW == two.material_HW).all()
    assert (one.gain_HW == two.gain_HW).all()
    assert (one.material_HW != other.material_HW).any()
    np.testing.assert_allclose(one.shares_hwM.sum(-1), 1, atol=1e-6)
    assert one.landcover_hw.max() < len(CLASSES)


def test_there_are_sixteen_and_the_old_eight():
    assert (len(SCENE_TYPES["hard"]), len(SCENE_TYPES["basic"])) == (16, 8)


def test_rough_soil_looks_like_soil_and_echoes_more():
    for day in (20, 180):
        assert (reflectance(day)[ROUGH] == reflectance(day)[BARE]).all()
        assert (backscatter(day)[ROUGH] > backscatter(day)[BARE] + 3).all()


def test_crop_calendars_differ_in_order_and_not_in_how_long_they_are_green():
    year = np.array([greenness(day) for day in range(1, 366)])[:, [EARLY_CROP, LATE_CROP, DOUBLE_CROP]]
    assert np.ptp(year.mean(0)) < 0.03
    assert np.abs(np.sort(year[:, 0]) - np.sort(year[:, 1])).max() < 0.05
    assert year[119, 0] > 0.9 > 0.2 > year[119, 1]
    assert year[234, 1] > 0.9 > 0.2 > year[234, 0]
    assert min(year[102, 2], year[217, 2]) > 0.8 > 0.2 > year[160, 2]


def test_rows_vanish_in_10_m_cells():
    for name in ("straight-rows", "curved-rows"):
        ground = draw_hard(name, 120, np.random.default_rng(3))
        fine = np.bincount(ground.material_HW.ravel(), minlength=14) / ground.material_HW.size
        pair = np.argsort(fine)[-2:]
        clean = ground.shares_hwM[..., pair].sum(-1) > 0.999
        share = ground.shares_hwM[..., pair[0]][clean]
        assert share.std() < 0.16  # black and white would be 0.5
        assert ground.material_HW.shape == (12 * CELL_PX, 12 * CELL_PX)


def test_unknown_types_are_refused(tmp_path):
    with pytest.raises(UsageError, match="basic or hard"):
        simulate(str(tmp_path / "x"), 2, scene_types="easy")
