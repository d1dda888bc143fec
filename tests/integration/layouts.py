"""Jobs that run inside ranks: train the stand-in under many layouts and return losses, weights, teacher, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cluster.config import from_dict
from cluster.ranks import Ranks
from model.losses.reduce import DistributedReduce
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.parallel.layout import Layout
from pipeline.schedules import ema_momentum
from tests.standin import Rows, StandIn, make_batch


def config_of(case: dict[str, Any]) -> PretrainConfig:
    return from_dict(PretrainConfig, {
        "model": {"moe": {"experts": case.get("experts", 4)}},
        "train": {"steps": case.get("total", 20), "batch": 8, "micro_batch": case.get("micro"), "precision": case.get("precision", "fp32")},
        "optimizer": {"lr": 1e-2, "warmup": 40, "clip": case.get("clip", 0.5), "lr_scale": {"leave": 0.5}},
        "objective": {"ema_momentum": [0.9, 1.0]},
        "parallel": {"zero_stage": case["stage"], "ep": case.get("ep", 1), "offload": case.get("offload", False)},
        # by default DeepSpeed keeps small parameters whole at stage 3, that is all of ours here
        "engine": {"extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    })  # fmt: skip


def build(case: dict[str, Any]) -> Engine:
    config, ranks = config_of(case), Ranks.from_environment()
    torch.manual_seed(case.get("seed", 0))
    student, teacher = StandIn(case.get("experts", 4)), StandIn(case.get("experts", 4))
    teacher.load_state_dict(student.state_dict())
    layout = Layout.of(config, ranks)
    return Engine(student, teacher, config, layout, torch.device("cpu"), DistributedReduce())


def micro_batches(layout: Layout, step: int) -> list[Rows]:
    whole, mine = make_batch(step, layout.batch), []
    for i in range(layout.accumulation):
        start = layout.rank * layout.batch_per_rank + i * layout.micro_batch
        part = slice(start, start + layout.micro_batch)
        mine.append(Rows(whole.x_BLD[part], whole.valid_BL[part], whole.keys[part]))
    return mine


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole logical fp32 tensors, put together from all ranks' pieces: `student/NAME`, `exp_avg/…`, `teacher/…`."""
    mine = []
    for piece in engine.state.pieces:
        a, b = piece.owned
        values = {
            "student": piece.of(piece.master.tensor.detach()), "teacher": engine.teacher.of(piece),
            "exp_avg": engine.state.moment(piece, "exp_avg"), "exp_avg_sq": engine.state.moment(piece, "exp_avg_sq"),
        }  # fmt: skip
        mine.append((piece.name, piece.shape, piece.start + a, {k: v[a:b].clone() for k, v in values.items()}))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, int] = {}
    for pieces in everyone:
        for name, shape, start, values in pieces:
            for kind, part in values.items():
                key = f"{kind}/{name}"
                flat = whole.setdefault(key, torch.full(shape, float("nan"))).view(-1)
                flat[start : start + part.numel()] = part
                covered[key] = covered.get(key, 0) + part.numel()
    assert all(covered[key] == tensor.numel() for key, tensor in whole.items()), "pieces overlap or leave gaps"
    return whole


def train_all(cases: list[dict[str, Any]]) -> list[Any]:
    """Each case from scratch: losses of every step, gradient norms, and (rank 0) all tensors as nested lists."""
    results = []
    for case in cases:
        engine = build(case)
        losses, norms = [], []
        unsharded = {n: t for n, t in full_state(engine).items() if n.startswith("teacher/")}
        for step in range(case.get("steps", 20)):
            result = engine.step(micro_batches(engine.layout, step), step * engine.layout.batch)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            state = full_state(engine)
            momentum = ema_momentum((step + 1) * engine.layout.batch, engine.total_samples, 0.9, 1.0)
            for name, average in unsharded.items():
                average.lerp_(state[name.replace("teacher", "student", 1)], 1.0 - momentum)
        same_average = all(torch.equal(state[name], average) for name, average in unsharded.items())
        twin = {name: p.detach().float() for name, p in engine.teacher.module.named_parameters()}
        drift = max(  # the teacher computes with its average
            (twin[n.split("/", 1)[1]] - t[: len(twin[n.split("/", 1)[1]])]).abs().max().item()
            for n, t in state.items() if n.startswith("teacher/") and "experts" not in n
        )  # fmt: skip
        tensors = {k: v.flatten().tolist() for k, v in state.items()} if dist.get_rank() == 0 else {}
        results.append(
            {"losses": losses, "norms": norms, "tensors": tensors, "teacher_drift": drift, "same_average": same_average}
        )
        engine.deepspeed.destroy()
    return results


def segments(jobs: list[dict[str, Any]]) -> list[Any]:
    """Each job: a case, optionally `load` (checkpoints url) first, train steps [from, to), optionally `save`.

    Returns losses, all tensors right after loading and at the end (rank 0), and whether every expert is distinct.
    """
    from pipeline.checkpoint import Saver, committed
    from pipeline.config import CheckpointConfig
    from pipeline.resume import continue_run

    results = []
    ranks = Ranks.from_environment()
    for job in jobs:
        engine = build({**job["case"], "seed": job.get("seed", 99 if job.get("load") else 0)})
        loaded = None
        if job.get("load"):
            found = continue_run(engine, committed(job["load"]), strict=False, rank=ranks.rank)
            assert found is not None
            assert found.step == job["from"]
            assert engine.state.adam_step == job["from"] == int(engine.student.steps_seen)
            loaded = full_state(engine)
        losses = []
        for step in range(job["from"], job["to"]):
            losses.append(engine.step(micro_batches(engine.layout, step), step * engine.layout.batch).loss)
        if job.get("save"):
            config = CheckpointConfig(asynchronous=job.get("asynchronous", True), keep_last=10)
            saver = Saver(job["save"], config, ranks.rank, ranks.world, lambda: None)
            saver.save(engine, job["to"], job["to"] * engine.layout.batch, {"config": {}, "reader": {}})
            saver.wait()
            dist.barrier()
        final = full_state(engine)
        experts = {k: v for k, v in final.items() if ".experts.w" in k}
        distinct = all(not torch.equal(v[i], v[j]) for v in experts.values() for i in range(len(v)) for j in range(i))
        first = ranks.rank == 0
        results.append({
            "losses": losses, "distinct": distinct, "final": {k: v.flatten().tolist() for k, v in final.items()} if first else {},
            "loaded": {k: v.flatten().tolist() for k, v in loaded.items()} if first and loaded else {},
        })  # fmt: skip
        engine.deepspeed.destroy()
    return results


def gradients(cases: list[dict[str, Any]]) -> list[Any]:
    """Each case: the whole gradients of one batch (accumulated, reduced, before clipping), as DeepSpeed is about to apply them."""
    from deepspeed.utils import safe_get_full_grad

    results = []
    for case in cases:
        engine = build(case)
        parts = micro_batches(engine.layout, 0)
        targets = engine.teacher.module.center(
            [engine.teacher.module.teacher_forward(b) for b in parts], 0, engine.reduce
        )
        for index, (batch, target) in enumerate(zip(parts, targets)):
            loss, _ = engine.deepspeed(batch, target)
            engine.deepspeed.backward(loss)
            if index < len(parts) - 1:
                engine.deepspeed.step()
        found = {}
        for name, parameter in engine.student.named_parameters():
            grad = safe_get_full_grad(parameter).detach().clone()
            if hasattr(parameter, "num_experts"):  # put the slices of one expert-parallel group side by side
                slices = [torch.empty_like(grad) for _ in range(engine.layout.ep)]
                dist.all_gather(slices, grad, group=engine.student.moe[0].dispatch.group)
                grad = torch.cat(slices)
            found[name] = grad.flatten().tolist()
        results.append(found if dist.get_rank() == 0 else {})
        engine.deepspeed.destroy()
    return results


def survive(job: dict[str, Any]) -> int:
    """Trains to `steps`, saving every second step; logs `resumed|saved STEP DIGEST` lines that must agree over all starts."""
    import hashlib

    from pipeline.checkpoint import Saver, committed
    from pipeline.config import CheckpointConfig
    from pipeline.resume import continue_run

    ranks, url = Ranks.from_environment(), job["url"]
    engine = build({**job["case"], "total": job["steps"]})

    def note(what: str, step: int) -> None:
        state = full_state(engine)
        if ranks.is_first:
            digest = hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()[:16]
            with open(job["log"], "a") as log:
                log.write(f"{what} {step} {digest}\n")

    saver = Saver(url, CheckpointConfig(keep_last=2, keep_every=0), ranks.rank, ranks.world, lambda: None)
    urls: list[Any] = [committed(url)]
    dist.broadcast_object_list(urls, src=0)
    found = continue_run(engine, urls[0], strict=False, rank=ranks.rank)
    start = found.step if found else 0
    note("resumed", start)
    for step in range(start, job["steps"]):
        engine.step(micro_batches(engine.layout, step), step * engine.layout.batch)
        if step % 2:
            note("saved", step + 1)
            saver.save(engine, step + 1, 0, {"config": {}, "reader": {}})
    saver.wait()
    return start


def everything(jobs: dict[str, Any]) -> dict[str, Any]:
    """Several of the jobs above in one start of the ranks, which is what takes the time."""
    return {name: globals()[name](argument) for name, argument in jobs.items()}
