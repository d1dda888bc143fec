"""How units are handed out: together where they end at once, alone where they take a while."""

from __future__ import annotations

import argparse

import pytest

from cluster.errors import UsageError
from data_prep.executors import MOST_TOGETHER, Executor, _Pace, _units, add_arguments, executor_of


def test_units_that_end_at_once_travel_together():
    pace = _Pace()
    assert pace.together() == 1
    for _ in range(40):
        pace.add(pace.together(), 1e-5 * pace.together())
    assert pace.together() == MOST_TOGETHER
    for _ in range(10):
        pace.add(1, 60.0)  # now they take a minute
    assert pace.together() == 1


def test_a_message_of_units_answers_in_order():
    answers, seconds = _units(lambda job, report: report(job) or 2 * job, [3, 1, 2])
    assert answers == [6, 2, 4]
    assert seconds >= 0


def test_options_that_do_not_go_together_are_refused():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    jobs = executor_of(parser.parse_args(["--executor", "dask", "--scheduler", "slurm", "--jobs", "7"]), 2)
    assert (
        jobs
        == executor_of(parser.parse_args(["--executor", "slurm", "--jobs", "7"]), 2)
        == Executor("dask", 7, "slurm")
    )
    for options, words in (
        (["--scheduler", "tcp://a:1"], "--executor dask"),
        (["--executor", "dask", "--jobs", "3"], "--executor slurm"),
        (["--executor", "slurm", "--scheduler", "tcp://a:1"], "--executor dask"),
    ):
        with pytest.raises(UsageError, match=words):
            executor_of(parser.parse_args(options), 2)
