"""A small part of the fault campaign (`make faults`): one injection of each kind, without the real trainer."""

from __future__ import annotations

import pytest

from tests.faults import data, runs, services
from tests.faults.campaign import Case, Kind, Result, run, table
from tests.faults.shared import shared

pytestmark = pytest.mark.integration


@pytest.mark.timeout(900)
def test_one_injection_of_every_kind_is_clean() -> None:
    kinds = [*runs.KINDS, *data.KINDS, *services.KINDS]
    with shared() as common:
        rows = run(kinds, common, seed=1, share=0.0)
    assert all(row.is_clean for row in rows), f"{table(rows)}\n{[row.broken for row in rows]}"
    assert len(rows) >= 25


def test_the_campaign_notices_what_it_is_for() -> None:
    """A loss, a wrong value, an unexpected error and a hang are each counted."""

    def hangs(case: Case) -> Result:
        while True:
            pass

    def breaks(case: Case) -> Result:
        raise ValueError("unexpected")

    kinds = [
        Kind("a", "", 2, lambda case: Result(lost=1)), Kind("b", "", 1, lambda case: Result(doubled=1, wrong=2)),
        Kind("c", "", 1, breaks), Kind("d", "", 1, hangs, limit_s=1), Kind("e", "", 3, lambda case: Result(seen="x | y")),
    ]  # fmt: skip
    rows = run(kinds, None, seed=0, say=lambda text: None)
    assert [(row.lost, row.doubled, row.wrong, row.errors, row.hangs) for row in rows] == [
        (2, 0, 0, 0, 0), (0, 1, 2, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0),
    ]  # fmt: skip
    assert [row.is_clean for row in rows] == [False] * 4 + [True]
    assert table(rows).splitlines()[-1].startswith("| **5 kinds** |  | **8** | **2** | **1** |")
    assert "x \\| y" in table(rows)
