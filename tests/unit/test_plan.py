"""The planner: formulas by hand, what must hold for any layout, and what it prints. Measured figures: test_plan_measured."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands import plan
from cluster.errors import UsageError
from cluster.plan.communication import payload_bytes, seconds, share_leaving_node
from cluster.plan.compute import anchor, step_flops, step_seconds
from cluster.plan.facts import Layout, Model, configured_layout, hardware, model_facts
from cluster.plan.memory import memory_bytes
from cluster.plan.recommend import as_overrides, fits, layouts, recommend

KEPT = {"full": 9e9, "checkpointed": 6e8, "block": 3e8, "fixed": 1e8, "fixed_in_blocks": 1e7, "inputs": 8e6}
MODEL = Model(
    dense=800_000_000, expert=1_600_000_000, experts=8, flops=30e12, student_forward_flops=7.5e12,
    kept={"cpu": KEPT, "gpu": KEPT}, routed={"elements": 2e7, "calls": 36, "layers": 6, "flops": 5e11}, centring_bytes=12_000_000,
    steps=1000, batch=64,
)  # fmt: skip
LAYOUT = Layout(
    nodes=2, per_node=8, zero_stage=2, ep=1, micro_batch=2, accumulation=2, precision="bf16", checkpointing=True
)
H100, CPU = hardware("h100"), hardware("cpu")


def test_memory_by_hand() -> None:
    """2.4 G parameters, 16 ranks, bf16, ZeRO-2, experts on 4 ranks: 0.8 + 0.4 G here, 0.05 + 0.1 G of them sharded."""
    parts = memory_bytes(MODEL, dataclasses.replace(LAYOUT, ep=4), H100)
    assert parts["weights"] == 2 * 1.2e9
    assert parts["masters"] == 4 * 0.15e9
    assert parts["moments"] == 8 * 0.15e9
    assert parts["gradients"] == 4 * 0.15e9
    assert parts["teacher"] == 2 * 1.2e9 + 4 * 0.15e9
    assert parts["activations"] == 2 * (6e8 + 1.5 * 3e8) + 1e8
    assert parts["total"] == pytest.approx(sum(size for part, size in parts.items() if part != "total"))


def test_buckets_are_of_the_compute_precision_and_copied_where_they_run_full() -> None:
    small = dataclasses.replace(MODEL, dense=40_000_000, expert=0, experts=0)
    for model, layout, device, expected in (
        (small, LAYOUT, CPU, 2 * 50e6),
        (small, LAYOUT, H100, 2 * 2 * 50e6),
        (MODEL, LAYOUT, CPU, 2 * 50e6 + 4 * 50e6),
        (MODEL, LAYOUT, H100, 2 * 2 * 50e6 + 4 * 50e6),
        (MODEL, dataclasses.replace(LAYOUT, reduce="bf16"), H100, 2 * 2 * 50e6),
        (MODEL, dataclasses.replace(LAYOUT, precision="fp32"), H100, 2 * 4 * 50e6),
        (MODEL, dataclasses.replace(LAYOUT, zero_stage=0), H100, 0),
        (MODEL, dataclasses.replace(LAYOUT, zero_stage=3), H100, 2 * 4 * 50e6),
    ):
        assert memory_bytes(model, layout, device)["buffers"] == expected


def test_communication_by_hand() -> None:
    volumes = payload_bytes(MODEL, dataclasses.replace(LAYOUT, ep=4))
    assert volumes["gradient_all_reduce"] == 4 * 1.2e9 * 2  # float32, and twice: ZeRO-2 reduces every micro-batch
    assert volumes["weight_all_gather"] == 2 * (0.05e9 + 0.1e9)
    rows = 4 * 2e7 * 2 * 8  # 4 samples; to and fro in teacher, student, recomputation, backward
    assert volumes["expert_all_to_all"] == rows + 2 * 36 * 8 * 8 * 3


def test_experts_that_no_other_rank_holds_are_not_reduced() -> None:
    whole = payload_bytes(MODEL, dataclasses.replace(LAYOUT, nodes=1, ep=8))
    assert whole["gradient_all_reduce"] == 4 * 0.8e9 * 2
    narrow = payload_bytes(MODEL, dataclasses.replace(LAYOUT, nodes=1, ep=8, reduce="bf16"))
    assert narrow["gradient_all_reduce"] == 2 * 0.8e9 * 2
    assert whole["weight_all_gather"] == 2 * 0.1e9


def test_all_to_all_stays_in_a_node_if_the_group_does() -> None:
    assert share_leaving_node(dataclasses.replace(LAYOUT, ep=8)) == 0.0
    assert share_leaving_node(dataclasses.replace(LAYOUT, ep=16)) == 0.5


def test_one_process_talks_to_nobody() -> None:
    alone = dataclasses.replace(LAYOUT, nodes=1, per_node=1)
    volumes = payload_bytes(MODEL, alone)
    assert set(volumes.values()) == {0.0}
    assert set(seconds(volumes, alone, H100).values()) == {0.0}


def test_checkpointing_computes_more_and_keeps_less() -> None:
    without = dataclasses.replace(LAYOUT, checkpointing=False)
    assert step_flops(MODEL, LAYOUT) == pytest.approx(1.25 * step_flops(MODEL, without))
    kept = [memory_bytes(MODEL, layout, H100)["activations"] for layout in (LAYOUT, without)]
    assert kept[0] < kept[1]


layout_strategy = st.builds(
    Layout, nodes=st.integers(1, 16), per_node=st.sampled_from([1, 2, 4, 8]), zero_stage=st.sampled_from([1, 2]),
    ep=st.just(1), micro_batch=st.integers(1, 8), accumulation=st.integers(1, 4), precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.booleans(),
)  # fmt: skip


@given(layout_strategy)
def test_what_holds_for_any_layout(layout: Layout) -> None:
    parts = memory_bytes(MODEL, layout, H100)
    assert all(size >= 0 for size in parts.values())
    more_nodes = dataclasses.replace(layout, nodes=2 * layout.nodes)
    assert memory_bytes(MODEL, more_nodes, H100)["total"] <= parts["total"]
    bigger = dataclasses.replace(layout, micro_batch=layout.micro_batch + 1)
    assert memory_bytes(MODEL, bigger, H100)["total"] > parts["total"]
    low, high = step_seconds(MODEL, layout, H100)
    assert 0 < low <= high
    spread = dataclasses.replace(layout, ep=2) if layout.world % 2 == 0 else layout
    assert memory_bytes(MODEL, spread, H100)["weights"] <= parts["weights"]


@given(layout_strategy)
def test_the_recommendation_fits_and_keeps_batch_and_ranks(base: Layout) -> None:
    best = recommend(MODEL, base, H100)
    if best is None:
        assert not any(fits(MODEL, layout, H100) for layout in layouts(MODEL, base))
        return
    assert fits(MODEL, best, H100)
    assert (best.batch, best.world) == (base.batch, base.world)
    slowest = step_seconds(MODEL, best, H100)[1]
    assert all(
        step_seconds(MODEL, other, H100)[1] >= slowest - 1e-4
        for other in layouts(MODEL, base)
        if fits(MODEL, other, H100)
    )
    assert not (best.precision == "bf16" and best.zero_stage == 1 and best.accumulation > 1)


def answer(batch: int = 1024, experts: int = 8, ep: int = 1) -> dict:
    """As the dry run prints it, for a made-up model."""
    return {
        "parameters": {"total": 2_400_000_000, "active": 2_400_000_000 - 7 * 200_000_000 * bool(experts),
                       "moe_increment": 1_400_000_000 * bool(experts)},
        "flops_per_sample": {"train": 30e12}, "activations": {"cpu": KEPT, "gpu": KEPT}, "routed": dict(MODEL.routed),
        "fingerprint": "f", "resolved": {
            "model": {"moe": {"experts": experts, "top_k": 1}, "modalities": ["hr", "s2", "s1"], "activation_checkpointing": True},
            "objective": {"mgcl_weight": 1.0, "qsacl_weight": 1.0, "mgcl_levels": ["pixel", "object", "image"], "heads": "shared",
                          "centering": "sinkhorn", "sinkhorn_iterations": 3, "prototypes": 65536},
            "train": {"steps": 600_000, "batch": batch, "micro_batch": 4, "precision": "bf16"},
            "parallel": {"zero_stage": 2, "ep": ep, "offload": False},
        },
    }  # fmt: skip


def test_experts_are_told_from_dense_parameters() -> None:
    model = model_facts(answer())
    assert (model.expert, model.dense) == (8 * 200_000_000, 800_000_000)
    dense = model_facts(answer(experts=0))
    assert (dense.expert, dense.dense) == (0, 2_400_000_000)
    assert model.centring_bytes == 65536 * (4 * 3 * 13 + 8 * 3)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, **kwargs: int
) -> tuple[str, dict]:
    monkeypatch.setattr(plan, "resolve", lambda *_: answer(**kwargs))
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    assert plan.main(parser.parse_intermixed_args(["c.yaml", *arguments, "--json"])) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_the_papers_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """128 H20, batch 1024: the plan stands beside the published 3.8 samples/s per GPU (44,500 GPU-hours)."""
    arguments = ("--nodes", "16", "--gpus-per-node", "8", "--hardware", "h20", "--price-per-gpu-hour", "2")
    out, figures = run(monkeypatch, capsys, *arguments)
    assert {"memory_gb", "step_s", "comm_gb_per_step", "gpu_hours", "recommended"} <= figures.keys()
    assert "published  3.8 samples/s per H20" in out
    assert figures["cost"] == 2 * figures["gpu_hours"]
    # a model of the work that the published rate allows at 40 % MFU is planned at the published GPU-hours
    paper = dataclasses.replace(model_facts(answer()), flops=0.4 * 148e12 / 3.8)
    layout = dataclasses.replace(LAYOUT, nodes=16, micro_batch=8, accumulation=1, checkpointing=False)
    hours = [s * 600_000 * 128 / 3600 for s in step_seconds(paper, layout, hardware("h20"))]
    assert hours[0] < 44_500 < hours[1]
    published = anchor(paper, layout, step_seconds(paper, layout, hardware("h20")), hardware("h20"))
    assert published is not None
    assert published["mfu_that_would_match"] == pytest.approx(0.4)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = run(monkeypatch, capsys, "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "2", batch=8)
    assert not figures["fits"]
    assert "DOES NOT FIT" in out
    assert figures["recommended"] is None
    assert "no supported layout fits" in out


def test_overrides_are_config_keys() -> None:
    assert as_overrides(LAYOUT) == {
        "parallel.zero_stage": 2, "parallel.ep": 1, "train.micro_batch": 2, "model.activation_checkpointing": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        (("--hardware", "h900"), {}, "h900 is not one of h100"),
        (("--nodes", "0"), {}, "--nodes must be at least 1"),
        (("--gpus-per-node", "-1"), {}, "must not be negative"),
        (("--nodes", "3"), {}, "not divisible by 24 processes"),
        (("--nodes", "1"), {"ep": 3}, "must divide both 8 experts and 8 processes"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...],
    kwargs: dict,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError, match=message):
        run(monkeypatch, capsys, *arguments, **kwargs)


def test_configured_layout_takes_the_whole_share_without_micro_batch() -> None:
    resolved = answer(batch=64)["resolved"]
    resolved["train"]["micro_batch"] = None
    assert configured_layout(resolved, 1, 8).micro_batch == 8


def test_every_profile_is_complete() -> None:
    for name in ("h100", "h200", "a100", "h20", "cpu"):
        profile = hardware(name)
        assert 0 < profile.mfu[0] < profile.mfu[1] < 1
        assert profile.source
