"""The plan of who holds what, over all ranks of worlds that no machine here has, and what a resume onto another one reads."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import load
from data_prep.schema import MODALITIES
from model.pretrain import Student
from pipeline.checkpoint import plan
from pipeline.config import PretrainConfig
from pipeline.optimizer import groups_of
from pipeline.parallel.pieces import Group, owned, spans, state_bytes, tiling_faults
from tests.data_folder import REPOSITORY

STEPS = [(1024, 8, 2), (512, 8, 1), (8, 8, 2), (1024, 8, 1), (1024, 1, 3), (64, 2, 0)]  # world, ep, ZeRO stage


@functools.cache
def skysense(ep: int) -> list[Group]:
    """The groups of the shipped size skysense_v2 (two billion parameters, on `meta`)."""
    config = load(PretrainConfig, f"{REPOSITORY}/pipeline/runs/skysense_v2.yaml", [])
    statistics = {n: {"mean": [0.0] * len(m.bands), "std": [1.0] * len(m.bands)} for n, m in MODALITIES.items()}
    with torch.device("meta"):
        student = Student(config.model, config.objective, statistics, [])
    return groups_of(student, config.optimizer, ep)


@functools.cache
def saved(step: tuple[int, int, int]) -> dict[str, list[tuple[int, int, str]]]:
    world, ep, stage = step
    return {
        name: [(start, size, f"rank-{rank:05d}") for start, size, rank in pieces]
        for name, pieces in spans(skysense(ep), stage, world, ep).items()
    }


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_pieces_of_all_ranks_hold_every_element_once(step: tuple[int, int, int]) -> None:
    world, ep, stage = step
    groups = skysense(ep)
    found = spans(groups, stage, world, ep)
    assert tiling_faults(groups, found) == []
    assert any(group.experts for group in groups) == (ep > 1)
    held = {rank for pieces in found.values() for _, _, rank in pieces}
    assert held == set(range(world)) or world == 1024
    total = sum(math.prod(shape) for group in groups for _, shape in group.parameters)
    most = max(state_bytes(groups, stage, world, ep, rank) for rank in range(0, world, max(world // 16, 1)))
    assert most <= 16 * (total / world * 1.01 + 2 * sum(len(group.parameters) for group in groups))
    assert {name for name, _ in found.items()} == {name for group in groups for name, _ in group.parameters}


def test_an_expert_has_one_home() -> None:
    """Every expert's elements lie with ranks of its slice: rank % ep."""
    groups = skysense(8)
    for group in groups:
        for name, shape in group.parameters if group.experts else ():
            per_expert = math.prod(shape[1:])
            for start, size, rank in spans([group], 2, 1024, 8)[name]:
                assert {start // per_expert, (start + size - 1) // per_expert} == {rank % 8 * shape[0] // 8}


@pytest.mark.parametrize("chain", list(itertools.pairwise(STEPS)), ids=str)
def test_a_resume_reads_exactly_what_a_rank_needs(chain: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    before, (world, ep, stage) = chain
    held, groups = saved(before), skysense(ep)
    touched = 0
    for rank in range(0, world, max(world // 64, 1)):
        needs = owned(groups, stage, world, ep, rank)
        found = plan.reads(held, needs)
        touched += len(found)
        got = sorted((name, first + a, b - a) for parts in found.values() for name, first, a, b in parts)
        joined: list[tuple[str, int, int]] = []
        for name, start, size in got:
            if joined and joined[-1][0] == name and sum(joined[-1][1:]) == start:
                joined[-1] = (name, joined[-1][1], joined[-1][2] + size)
            else:
                joined.append((name, start, size))
        assert joined == sorted(needs)
    # flat ranges overlap few flat ranges: the files that all ranks open are linear in both worlds
    if before[2] in (1, 2) and stage in (1, 2):
        ranks = len(range(0, world, max(world // 64, 1)))
        assert touched / ranks <= len(groups) * (before[0] / world + 2)


@given(
    st.lists(st.tuples(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=4), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_any_groups_tile_on_any_layout(
    given_groups: list[tuple[list[tuple[int, int]], bool]], stage: int, replicas: int, ep: int
) -> None:
    groups = [
        Group(tuple((f"{g}.{i}", (4 * a, b)) for i, (a, b) in enumerate(shapes)), experts and ep > 1)
        for g, (shapes, experts) in enumerate(given_groups)
    ]
    found = spans(groups, stage, replicas * ep, ep)
    assert tiling_faults(groups, found) == []
    name = groups[0].parameters[0][0]
    assert tiling_faults(groups, {**found, name: found[name][1:]}) != []


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12), st.integers(0, 30))
def test_runs_cover_what_is_wanted_and_little_more(wanted: list[tuple[int, int]], gap: int) -> None:
    ranges = [(a, a + n) for a, n in wanted]
    found = plan.runs(ranges, gap)
    covered = {x for a, b in found for x in range(a, b)}
    needed = {x for a, b in ranges for x in range(a, b)}
    assert needed <= covered
    assert all(b + gap < c for (_, b), (c, _) in itertools.pairwise(found))
    assert all({a, b - 1} <= needed for a, b in found)
