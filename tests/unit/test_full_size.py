"""The full-size step without a byte of it: on torch's meta device every shape is made, nothing is stored, and whatever would have to ask
the device for a number (`.item()`, `nonzero`, a copy to the host) raises."""

from __future__ import annotations

import pytest
import torch

from cluster.config import load
from model.losses.reduce import SingleProcess
from model.pretrain import Student
from model.teacher import make_teacher
from pipeline.config import PretrainConfig
from tests.synthetic_batch import STATISTICS, batch_of

# experts by one grouped product, as on an accelerator in bfloat16: their number of rows is the device's affair
OVERRIDES = ["model.moe.grouped=true", "objective.ita_embeddings=null"]


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_full_size_step_asks_the_device_nothing(checkpointing: str) -> None:
    overrides = [*OVERRIDES, f"model.activation_checkpointing={checkpointing}"]
    config = load(PretrainConfig, "pipeline/runs/skysense_v2.yaml", overrides)
    with torch.device("meta"):
        student = Student(config.model, config.objective, STATISTICS).train().bfloat16()
    teacher = make_teacher(student)
    assert sum(p.numel() for p in student.parameters()) > 2.3e9
    batch = batch_of(config, 1).to("meta")
    [target] = teacher.center([teacher.teacher_forward(batch)], 0, SingleProcess())
    loss, _ = student(batch, target, diagnose=False)
    loss.backward()
    assert loss.is_meta
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name


def test_asking_is_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.ones(3, device="meta").sum())
