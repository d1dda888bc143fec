"""`probe.outside` on two ranks equals one, also where one rank makes more forward passes than the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import published
from tests.integration.watch_job import watch_row
from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration


def test_two_ranks_watch_what_one_does(tmp_path: Path) -> None:
    published.class_folders(tmp_path / "named", np.random.default_rng(0))
    argument = {
        "overrides": [
            "probe.every=1", f"probe.outside={{eurosat_rgb: {tmp_path / 'named'}}}", "probe.samples=5", "probe.tasks=[knn]"
        ]
    }  # fmt: skip
    key = watch_row(argument)["keys"][2]
    larger = published.rgb(np.random.default_rng(1), 48)
    published.picture(
        tmp_path / "named" / key, larger, "JPEG"
    )  # a pass of its own, so the first rank makes three, the other one
    one = watch_row(argument)
    results = run_ranks("tests.integration.watch_job:watch_row", 2, argument, tmp_path / "job")
    assert results[0] == results[1]
    assert results[0]["keys"] == one["keys"]
    np.testing.assert_allclose(results[0]["fused"], one["fused"], atol=1e-5)
    assert results[0]["figures"] == one["figures"]
