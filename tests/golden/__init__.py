"""Golden losses: what the whole objective gave, step by step, kept as files with where they come from.

`make golden` (`python -m tests.golden`) writes them anew; `tests/unit/test_golden.py` holds the code to them. One process, one
micro-batch, float64: sums in another order move a loss by about 1e-12 there, so that files made on one CPU hold on another.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.config import from_dict, to_dict
from model.config import ModelConfig, MoEConfig, ObjectiveConfig
from model.losses.reduce import SingleProcess
from model.pretrain import Student
from model.teacher import make_teacher
from tests.synthetic_batch import STATISTICS, make_batch

FOLDER = Path(__file__).parent
RTOL = 1e-7
"""Relative; a loss weight changed by 1 % moves the loss by far more (tested), another CPU by far less."""
SEED, SITES, STEPS, LR, TEACHER_SHARE = 0, 4, 4, 1e-3, 0.05
CLASSES = ["water", "crop", "grass", "built"]
EMBEDDINGS = "pipeline/runs/text_embeddings.safetensors"  # the checkout's: replaced by its full path where it is read
MOE = MoEConfig(experts=4, blocks=2, balance_weight=0.5, z_weight=0.1)
PAPER = ObjectiveConfig(
    prototypes=32, head_hidden=16, head_bottleneck=8, pixel_pairs=12, object_clusters=3, queries=4, ita_embeddings=EMBEDDINGS
)  # fmt: skip
ALL = replace(
    PAPER, cross_weight=0.7, site_weight=0.5, restore_weight=2.0, masked_weight=1.5, labels_weight=0.3, koleo_weight=0.2,
    local_mgcl=True, hide_tokens=0.3, hide_dates=0.4, hide_sensors=0.2, modality_dropout=0.3, masked_visible=0.5,
    predictor_hidden=16, centering_momentum=0.9, ema_half_life=0.1,
)  # fmt: skip
CASES: dict[str, tuple[ModelConfig, ObjectiveConfig]] = {
    "paper_experts": (ModelConfig(size="debug", drop_path=0.2, moe=MOE), PAPER),
    "all_terms_experts": (ModelConfig(size="debug", drop_path=0.2, moe=MOE), ALL),
    "all_terms_dense": (ModelConfig(size="debug", drop_path=0.2, moe=MoEConfig(experts=0)), ALL),
}


def run(model: ModelConfig, objective: ObjectiveConfig, steps: int = STEPS) -> list[dict[str, float]]:
    """Trains from scratch; per step the loss, its terms and the gradient's norm before the update."""
    if objective.ita_embeddings == EMBEDDINGS:
        objective = replace(objective, ita_embeddings=str(FOLDER.parents[1] / EMBEDDINGS))
    torch.manual_seed(SEED)
    student = Student(model, objective, STATISTICS, CLASSES).double()
    teacher = make_teacher(student)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    lines = []
    for step in range(steps):
        batch = make_batch(SITES, seed=step)
        samples = step * SITES
        targets = teacher.center([teacher.teacher_forward(batch)], samples, SingleProcess(), STEPS * SITES)
        loss, metrics = student(batch, targets[0])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        student.finish_step(SingleProcess())
        with torch.no_grad():
            for average, value in zip(teacher.parameters(), _twins(teacher, student)):
                average.lerp_(value, TEACHER_SHARE)
        terms = {name: float(value) for name, value in metrics.items() if name.split("/")[0] == "loss"}
        lines.append({"step": step + 1, **terms, "loss": float(loss.detach()), "grad_norm": float(norm)})
    return lines


def _twins(teacher: Student, student: Student) -> list[torch.Tensor]:
    """The student's parameters under the teacher's names: a teacher has no heads for what only students predict."""
    own = dict(student.named_parameters())
    return [own[name] for name, _ in teacher.named_parameters()]


def read(name: str) -> dict[str, Any]:
    """A golden file. Raises FileNotFoundError."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def write(name: str) -> None:
    """Makes one golden file anew."""
    model, objective = CASES[name]
    content = {
        "made_by": "make golden",
        "layout": f"one process, one micro-batch of {SITES} sites, float64, AdamW {LR}, teacher average {TEACHER_SHARE} per step",
        "seed": SEED, "rtol": RTOL,
        "versions": {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0], "machine": platform.machine()},
        "model": to_dict(model), "objective": to_dict(objective), "steps": run(model, objective),
    }  # fmt: skip
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def settings_of(content: dict[str, Any]) -> tuple[ModelConfig, ObjectiveConfig]:
    """The settings a golden file was made with."""
    return from_dict(ModelConfig, content["model"]), from_dict(ObjectiveConfig, content["objective"])
