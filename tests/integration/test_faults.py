"""A small part of the fault campaign (`make faults`): one injection of each kind, without the real trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import data, runs, services
from tests.faults.campaign import Case, Kind, Record, Result, figures, run, table
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


def test_a_campaign_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """What is on record is not injected again, unless by another seed; a line that was torn is, and harms no other."""
    done: list[str] = []

    def counts(case: Case) -> Result:
        done.append(f"{case.rng.random()}")
        if len(done) == 3:
            raise KeyboardInterrupt
        return Result(seen="fine")

    kinds = [Kind("a", "", 2, counts), Kind("b", "", 2, counts)]
    record = Record(tmp_path / "out" / "record.jsonl", 0)
    with pytest.raises(KeyboardInterrupt):
        run(kinds, None, 0, record=record, say=lambda text: None)
    text = record.path.read_text()
    record.path.write_text(text[:-20])  # killed while it wrote the second line
    rows = run(kinds, None, 0, record=record, say=lambda text: None)
    assert [row.injections for row in rows] == [2, 2]
    assert done[1] == done[3]  # the same random numbers
    assert len(done) == 6
    assert run(kinds, None, 0, record=record, say=lambda text: None)[1].injections == 2
    assert len(done) == 6
    total = figures(rows)["total"]
    assert (total["kinds"], total["injections"], total["wrong"]) == (2, 4, 0)
    run(kinds, None, 1, record=Record(record.path, 1), say=lambda text: None)
    assert len(done) == 10
