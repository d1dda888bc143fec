"""The whole objective: the same step split over ranks and micro-batches, absent modalities, parameters that take part."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, MoEConfig, ObjectiveConfig
from model.losses.reduce import SingleProcess
from model.objective_plan import count_parameters
from model.pretrain import Student
from model.teacher import make_teacher
from tests.synthetic_batch import STATISTICS, make_batch, split
from tests.thread_ranks import ThreadReduce, run_ranks

MODEL = ModelConfig(size="debug", drop_path=0.2, moe=MoEConfig(experts=4, blocks=2, balance_weight=0.5, z_weight=0.1))
OBJECTIVE = ObjectiveConfig(
    prototypes=32, head_hidden=16, head_bottleneck=8, pixel_pairs=12, object_clusters=3, queries=4,
    teacher_warmup=100, ita_embeddings=str(Path(__file__).parents[2] / "pipeline/runs/text_embeddings.safetensors"),
)  # fmt: skip

# every term at once
ALL = replace(
    OBJECTIVE, cross_weight=0.7, site_weight=0.5, restore_weight=2.0, masked_weight=1.5, labels_weight=0.3, koleo_weight=0.2,
    local_mgcl=True, hide_tokens=0.3, hide_dates=0.4, hide_sensors=0.2, modality_dropout=0.3, masked_visible=0.5,
    predictor_hidden=16, centering_momentum=0.9, ema_half_life=0.1,
)  # fmt: skip


CLASSES = ["water", "crop", "grass", "built"]


def build(model: ModelConfig = MODEL, objective: ObjectiveConfig = OBJECTIVE) -> Student:
    torch.manual_seed(0)
    return Student(model, objective, STATISTICS, CLASSES).double()


def one_step(student: Student, teacher: Student, batches: list, reduce, samples_seen: int = 40):
    """(summed metrics / W·A contributions, gradients / (W·A), step metrics) of this rank's micro-batches."""
    student.train()
    targets = teacher.center([teacher.teacher_forward(b) for b in batches], samples_seen, reduce)
    parts = len(batches) * reduce.world
    metrics: dict[str, torch.Tensor] = {}
    for batch, target in zip(batches, targets):
        loss, values = student(batch, target)
        (loss / parts).backward()
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + value / parts
    grads = {name: p.grad for name, p in student.named_parameters()}
    return metrics, grads, student.finish_step(reduce)


def whole_and_split(ranks: int, micro: int, objective: ObjectiveConfig = OBJECTIVE, steps: int = 2):
    batches = [make_batch(4, seed=seed) for seed in range(steps)]
    whole = build(objective=objective)
    teacher = make_teacher(build(objective=objective))
    rank_students = [copy.deepcopy(whole) for _ in range(ranks)]
    teachers = [make_teacher(teacher) for _ in range(ranks)]
    for batch in batches:  # the second step has loads of a previous one
        whole.zero_grad()
        for s in rank_students:
            s.zero_grad()
        expected = one_step(whole, teacher, [batch], SingleProcess())

        def work(rank: int, reduce: ThreadReduce, batch=batch):
            mine = split(split(batch, ranks)[rank], micro)
            return one_step(rank_students[rank], teachers[rank], mine, reduce)

        got = run_ranks(ranks, work)
    metrics = {name: sum(g[0][name] for g in got) for name in got[0][0]}
    grads = {name: sum(g[1][name] for g in got) for name in got[0][1]}
    return expected, (metrics, grads, got[0][2])


@pytest.mark.parametrize(
    ("ranks", "micro", "objective"),
    [
        (2, 2, OBJECTIVE), (1, 2, ALL), (4, 1, ALL),
        (2, 2, replace(ALL, masked_target="projection", masked_loss="discrimination", prototypes_frozen=50)),
        (2, 1, replace(ALL, masked_target="teacher", heads="per_level", mgcl_levels=("pixel", "image"), cross_levels=("image",))),
    ],
)  # fmt: skip
def test_any_split_gives_the_same_loss_metrics_and_gradients(
    ranks: int, micro: int, objective: ObjectiveConfig
) -> None:
    (metrics, grads, step), (split_metrics, split_grads, split_step) = whole_and_split(ranks, micro, objective)
    for name, value in metrics.items():
        if not name.startswith("feature/"):
            torch.testing.assert_close(
                split_metrics[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, grad in grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-7, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in step.items():
        torch.testing.assert_close(split_step[name], value, rtol=1e-9, atol=1e-12)


def test_loads_of_the_micro_batch_are_exact_over_ranks_but_not_over_accumulation() -> None:
    objective = replace(OBJECTIVE, balance_load="micro_batch")
    (metrics, grads, _), (split_metrics, split_grads, _) = whole_and_split(2, 1, objective)
    for name, grad in grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-7, atol=1e-11)
    (metrics, _, _), (split_metrics, _, _) = whole_and_split(1, 2, objective, steps=1)
    torch.testing.assert_close(split_metrics["loss/mgcl_hr"], metrics["loss/mgcl_hr"])
    assert abs(float(split_metrics["loss/balance"] - metrics["loss/balance"])) > 1e-6


@pytest.mark.parametrize("objective", [OBJECTIVE, ALL, replace(ALL, masked_target="teacher")])
def test_absent_modalities_contribute_nothing_and_break_nothing(objective: ObjectiveConfig) -> None:
    student, batch = build(objective=objective), make_batch(4, seed=3)
    teacher = make_teacher(student)
    for view in (batch.u, batch.v, *batch.local):
        view.modalities["s1"].valid_BTHW[:] = False
        view.modalities["s1"].x_BTCHW[:] = float("nan")
        view.modalities["s1"].affine_B23[:] = 0
    metrics, grads, _ = one_step(student, teacher, [batch], SingleProcess())
    for name in ("mgcl", "restore", "site", "masked", "cross"):
        assert float(metrics.get(f"loss/{name}_s1", 0.0)) == 0.0, name
    assert float(metrics["loss/mgcl_s2"]) > 0.0
    assert float(metrics["loss/ita"]) > 0.0
    assert all(torch.isfinite(value).all() for value in metrics.values())
    for name, grad in grads.items():
        assert grad is not None, name
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("objective", [OBJECTIVE, ALL])
def test_nothing_valid_at_all_gives_zero_and_finite_gradients(objective: ObjectiveConfig) -> None:
    student, batch = build(objective=objective), make_batch(2, seed=4, missing=1.0)
    batch.u.classes_BHW[:] = -1
    metrics, grads, _ = one_step(student, make_teacher(student), [batch], SingleProcess())
    assert float(metrics["loss"]) == 0.0
    assert all(grad is not None and float(grad.abs().sum()) == 0.0 for grad in grads.values())


@pytest.mark.parametrize("objective", [OBJECTIVE, ALL, replace(ALL, masked_target="projection")])
def test_values_of_invalid_pixels_change_nothing(objective: ObjectiveConfig) -> None:
    student, batch = build(objective=objective), make_batch(4, seed=5)
    teacher = make_teacher(student)
    expected, _, _ = one_step(copy.deepcopy(student), teacher, [batch], SingleProcess())
    for view in (batch.u, batch.v, *batch.local):
        for m in view.modalities.values():
            m.x_BTCHW = torch.where(m.valid_BTHW[:, :, None], m.x_BTCHW, 1e4)
    got, _, _ = one_step(student, teacher, [batch], SingleProcess())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("off", ["mgcl_weight", "qsacl_weight", "ita_weight"])
def test_a_term_with_weight_zero_is_not_computed(off: str) -> None:
    objective = replace(OBJECTIVE, **{off: 0.0})
    student = build(objective=objective)
    metrics, _, _ = one_step(student, make_teacher(student), [make_batch(2)], SingleProcess())
    assert {"mgcl_weight": "loss/mgcl_hr", "qsacl_weight": "loss/qsacl", "ita_weight": "loss/ita"}[off] not in metrics
    heads = {"mgcl_weight": {"query"}, "qsacl_weight": {"dense", "fused"}, "ita_weight": {"dense", "fused", "query"}}
    assert set(student.heads) == heads[off]
    assert (student.alignment is None) == (off == "ita_weight")


@pytest.mark.parametrize("heads", ["shared", "per_level"])
def test_parameter_counts_equal_the_closed_formula(heads: str) -> None:
    objective = replace(OBJECTIVE, heads=heads)
    student = Student(MODEL, objective, STATISTICS, CLASSES)
    counted = count_parameters(MODEL, objective)
    assert counted["heads"] == sum(p.numel() for p in student.heads.parameters())
    assert student.decoder is not None
    assert counted["decoder"] == sum(p.numel() for p in student.decoder.parameters())
    assert student.alignment is not None
    assert counted["ita"] == sum(p.numel() for p in student.alignment.parameters())


@pytest.mark.parametrize(
    "objective",
    [
        ALL,
        replace(ALL, heads="per_level"),
        replace(ALL, masked_target="projection"),
        replace(ALL, masked_target="teacher"),
    ],
)
def test_prediction_terms_are_counted(objective: ObjectiveConfig) -> None:
    student = Student(MODEL, objective, STATISTICS, CLASSES)
    counted = count_parameters(MODEL, objective, num_classes=len(CLASSES))
    assert counted["prediction"] == sum(p.numel() for p in student.prediction.parameters())
    assert counted["heads"] == sum(p.numel() for m in (student.heads, student.cross) for p in m.parameters())
    assert sum(counted.values()) == sum(
        p.numel() for name, p in student.named_parameters() if not name.startswith("skysense")
    )


@pytest.mark.parametrize(
    ("weight", "key"),
    [
        ("cross_weight", "loss/cross_hr"), ("site_weight", "loss/site_fused"), ("restore_weight", "loss/restore_s2"),
        ("masked_weight", "loss/masked_s1"), ("labels_weight", "loss/labels"), ("koleo_weight", "loss/koleo_fused"),
    ],
)  # fmt: skip
def test_each_prediction_term_alone_is_on_and_off_by_its_weight(weight: str, key: str) -> None:
    batch = make_batch(3)
    for value in (1.0, 0.0):
        objective = replace(OBJECTIVE, **{weight: value})
        student = build(objective=objective)
        metrics, grads, _ = one_step(student, make_teacher(student), [batch], SingleProcess())
        assert (key in metrics) == bool(value)
        assert all(grad is not None for grad in grads.values())
        assert bool(sum(p.numel() for m in (student.prediction, student.cross) for p in m.parameters())) == (
            bool(value) and weight != "koleo_weight"
        )


def test_without_dense_labels_there_is_no_alignment_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert Student(MODEL, OBJECTIVE, STATISTICS, None).alignment is None
    assert "no dense class labels" in caplog.text


def test_softmax_centering_and_no_local_views_run() -> None:
    objective = replace(OBJECTIVE, centering="softmax", mgcl_levels=("pixel",))
    student = build(MODEL, objective)
    metrics, _, _ = one_step(student, make_teacher(student), [make_batch(2, local_views=0)], SingleProcess())
    assert torch.isfinite(metrics["loss"])
    assert float(metrics["loss/qsacl"]) > 0


def test_bfloat16_weights_give_nearly_the_same_loss() -> None:
    batch = make_batch(4, seed=7)
    torch.manual_seed(0)
    student = Student(MODEL, OBJECTIVE, STATISTICS, CLASSES)
    teacher = make_teacher(student)
    expected, _, _ = one_step(copy.deepcopy(student), teacher, [batch], SingleProcess())
    metrics, grads, _ = one_step(student.bfloat16(), teacher, [batch], SingleProcess())
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=0.03)
    assert all(
        grad is not None and grad.dtype == torch.bfloat16 and torch.isfinite(grad).all() for grad in grads.values()
    )
