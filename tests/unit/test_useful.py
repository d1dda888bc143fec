"""MFU counts useful FLOPs: what is not there is not work."""

from __future__ import annotations

import pytest

from model.config import ModelConfig
from model.counts import fusion_flops, image_flops
from model.skysense import SkySense
from model.useful import useful_share
from pipeline.config import ViewConfig
from tests.model_views import random_view

CFG = ModelConfig(size="debug")


def test_everything_valid_is_all_of_the_work_and_half_of_the_dates_less_by_their_part() -> None:
    model = SkySense(CFG).eval()
    view = random_view(2, hr=64, series=16, s2_dates=2, s1_dates=1)
    assert float(useful_share(CFG, [view], [model(view)])) == pytest.approx(1.0)
    view.modalities["s2"].valid_BTHW[:, 1] = False
    work = {n: sum(image_flops(CFG, n, side).values()) for n, side in (("hr", 64), ("s2", 16), ("s1", 16))}
    fusion = fusion_flops(CFG, ViewConfig(64, 16, 2, 1))
    whole = work["hr"] + 2 * work["s2"] + work["s1"] + fusion
    hr, series, places = 4, 16, 16
    left = fusion * (hr + 2 * series + places) / (hr + 3 * series + places)
    expected = (work["hr"] + work["s2"] + work["s1"] + left) / whole
    assert float(useful_share(CFG, [view], [model(view)])) == pytest.approx(expected, rel=1e-5)
