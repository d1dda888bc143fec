"""Geo-context prototypes: regions, assignment, and the same prototypes for any split of the step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.geo_context import GeoContext, assign, region_of
from model.losses.reduce import SingleProcess
from model.objective_plan import count_parameters
from model.pretrain import Student
from model.teacher import make_teacher
from tests.synthetic_batch import STATISTICS, make_batch, split
from tests.thread_ranks import run_ranks
from tests.unit.test_pretrain import MODEL, OBJECTIVE

GEO = replace(OBJECTIVE, geo_context=True, geo_regions=32, geo_prototypes=5, geo_momentum=0.5, ita_embeddings=None)


@settings(max_examples=60, deadline=None)
@given(st.floats(-180, 180), st.floats(-90, 90), st.integers(1, 5000))
def test_every_place_has_a_region(lon: float, lat: float, regions: int) -> None:
    region = int(region_of(torch.tensor([[lon, lat]], dtype=torch.float64), regions))
    assert 0 <= region < regions
    other = int(region_of(torch.tensor([[lon + 360, lat]], dtype=torch.float64), regions))
    assert other == region or abs(lon * 45 / 180 - round(lon * 45 / 180)) < 1e-9  # rounding at an edge


def test_neighbours_share_a_region_and_continents_do_not() -> None:
    places = torch.tensor([[13.40, 52.50], [13.41, 52.51], [-58.4, -34.6]], dtype=torch.float64)
    a, b, c = region_of(places, 4096).tolist()
    assert a == b != c


def test_prototypes_move_to_the_mean_of_what_is_assigned() -> None:
    context = GeoContext(4).double()
    context.own_prototypes(2, 1)
    fused = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    valid = torch.rand(2, 3, 3) > 0.3
    region = torch.tensor([1, 1])
    before = context.prototypes_RPF.clone()
    sums = assign(torch.where(valid[..., None], fused, float("nan")), valid, region, before[region])
    context.learn([sums], 0.9, SingleProcess())
    expected = 0.9 * before[1, 0].double() + 0.1 * fused[valid].mean(0)  # one prototype takes every token
    torch.testing.assert_close(context.prototypes_RPF[1, 0].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(context.prototypes_RPF[0], before[0])  # nobody was there


@pytest.mark.parametrize(("ranks", "micro"), [(2, 2)])
def test_any_split_gives_the_same_losses_and_prototypes(ranks: int, micro: int) -> None:
    batches = []
    for seed in (0, 1):
        batch = make_batch(4, seed=seed)
        batch.lonlat_B2 = torch.tensor([[10.0, 50.0], [100.0, 20.0]], dtype=torch.float64).repeat(2, 1)
        batches.append(batch)

    torch.manual_seed(0)
    origin = Student(MODEL, GEO, STATISTICS).double()

    def train(parts_of, reduce) -> tuple[float, torch.Tensor]:
        student, teacher = copy.deepcopy(origin), make_teacher(origin)
        for batch in batches:
            parts = parts_of(batch)
            targets = teacher.center([teacher.teacher_forward(p) for p in parts], 0, reduce)
            losses = [student(p, t)[0] for p, t in zip(parts, targets)]
            sum(losses).backward()
            student.finish_step(reduce)
        assert student.context is not None
        assert student.context.project.weight.grad is not None
        assert float(student.context.project.weight.grad.abs().sum()) > 0
        assert teacher.context is not None
        return float(sum(x.detach() for x in losses)) / len(losses), teacher.context.prototypes_RPF

    loss, prototypes = train(lambda batch: [batch], SingleProcess())
    got = run_ranks(ranks, lambda rank, reduce: train(lambda batch: split(split(batch, ranks)[rank], micro), reduce))
    assert sum(g[0] for g in got) / ranks == pytest.approx(loss, rel=1e-9)
    for _, other in got:
        torch.testing.assert_close(other, prototypes, rtol=1e-9, atol=1e-12)


def test_the_prototypes_are_the_teacher_s_state_and_no_parameter() -> None:
    student = Student(MODEL, GEO, STATISTICS)
    teacher = make_teacher(student)
    assert "context.prototypes_RPF" in teacher.state_dict()
    assert "context.prototypes_RPF" not in student.state_dict()
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in teacher.named_parameters()]
    assert student.context is not None
    assert count_parameters(MODEL, GEO)["geo_context"] == sum(p.numel() for p in student.context.parameters())
