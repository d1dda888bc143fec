"""Student and teacher as a run starts: every rank draws what it keeps and nothing else.

The networks are built on `meta`, where expert parallelism takes this rank's slice of every layer of experts; only then does the
student get memory, filled with the numbers that the whole network has at these places (`model.initial`). The teacher stays on
`meta`: it starts as the student, and the engine gives it its weights (`pipeline.ema`).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from model.initial import draw_all, on_meta
from model.pretrain import Student
from model.teacher import Teacher, make_teacher
from pipeline.config import PretrainConfig
from pipeline.parallel.expert_parallel import apply_expert_parallel
from pipeline.parallel.layout import Layout
from pipeline.parallel.zero import logical


def first_networks(
    config: PretrainConfig, layout: Layout, statistics: Mapping[str, Any], classes: list[str] | None, device: torch.device
) -> tuple[Student, Teacher]:  # fmt: skip
    """(student on `device` in compute precision, teacher on `meta`) of this rank, the same function on every layout of the seed."""
    student = blank(config, statistics, classes)
    teacher = make_teacher(student)
    for network in (student, teacher):
        apply_expert_parallel(network, layout)
    draw_all(student, config.train.seed, device, compute_dtype(layout), logical)
    return student, teacher


def blank(config: PretrainConfig, statistics: Mapping[str, Any], classes: list[str] | None) -> Student:
    """The whole student with its parameters on `meta`."""
    with on_meta():
        return Student(config.model, config.objective, statistics, classes)


def return_freed() -> None:
    """Hands memory that is free inside this process back to the system; elsewhere than on glibc nothing.

    DeepSpeed copies the weights into flat buffers: what they were in before is many pieces, which glibc would keep.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def compute_dtype(layout: Layout) -> torch.dtype:
    return torch.bfloat16 if layout.precision == "bf16" else torch.float32
