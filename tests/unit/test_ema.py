"""The teacher's average is fp32 whatever it computes in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.ema import Teacher
from pipeline.parallel.zero import Master

CPU = torch.device("cpu")


def state_of(student: nn.Module) -> Any:
    def scatter(name: str) -> Any:
        return lambda twin, whole: twin[name].copy_(whole.view_as(twin[name]))

    masters = [Master(parameter, None, scatter(name)) for name, parameter in student.named_parameters()]
    return SimpleNamespace(masters=masters)


def test_a_bf16_teacher_still_moves_at_momentum_0_9995() -> None:
    student = nn.Linear(4, 3)
    teacher = Teacher(nn.Linear(4, 3), student, state_of(student), torch.bfloat16, CPU)
    start = teacher.module.weight.clone()
    naive = start.clone()
    expected = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(0.01 * student.weight.sign())
    for _ in range(2000):
        teacher.update(0.9995)
        naive.lerp_(student.weight.detach().bfloat16(), 1 - 0.9995)
        expected.lerp_(student.weight.detach(), 1.0 - 0.9995)
    average = teacher.averages[id(teacher.state.masters[0])]
    assert torch.equal(average, expected)
    assert torch.equal(teacher.module.weight, expected.bfloat16())
    moved = (teacher.module.weight.float() - start.float()).abs()
    assert (moved > 0.004).all()  # 1 - 0.9995^2000 = 63 % of the way, less rounding to bf16
    assert (naive.float() - start.float()).abs().max() < 0.6 * moved.min()  # an average kept in bf16 hardly does


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_starts_as_the_student_and_never_trains(where: str) -> None:
    student = nn.Linear(4, 3)
    teacher = Teacher(nn.Linear(4, 3, device=where), student, state_of(student), torch.float32, CPU)
    assert torch.equal(teacher.module.weight, student.weight)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not teacher.module.training
