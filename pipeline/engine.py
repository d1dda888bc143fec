"""One optimizer step over all ranks: teacher, centring, student, update, average. The only user of DeepSpeed's engine.

Order inside a step (`model.losses.reduce` says why it makes any split of the batch exact): the teacher sees all micro-batches
first; the whole step's targets are centred together, over all ranks; then the student runs micro-batch by micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import UsageError
from model.config import run_samples
from pipeline.config import PretrainConfig
from pipeline.ema import Teacher
from pipeline.first_weights import compute_dtype, return_freed
from pipeline.health import Heartbeat
from pipeline.optimizer import adamw, set_rates
from pipeline.parallel.expert_parallel import apply_expert_parallel
from pipeline.parallel.layout import Layout
from pipeline.parallel.zero import ShardedState, logical
from pipeline.schedules import learning_rate, teacher_momentum, weight_decay


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, equal on all ranks. `applied` is false where DeepSpeed skipped the update."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    applied: bool


def deepspeed_config(config: PretrainConfig, layout: Layout) -> dict[str, Any]:
    """DeepSpeed's settings for a run; `engine.extra` is merged last and may set nothing that is set here.

    ZeRO-0 clips in `Engine`, because DeepSpeed's norm there averages over ranks what it must sum over experts.
    """
    cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": layout.zero_stage, "overlap_comm": cuda, "contiguous_gradients": True, "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 200_000_000,
    }  # fmt: skip
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    settings: dict[str, Any] = {
        "train_batch_size": layout.batch, "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optimizer.clip if layout.zero_stage else 0.0,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }  # fmt: skip
    if layout.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # accumulation in fp32 is each rank's own; DeepSpeed would sum over ranks in the weights' precision
        settings["communication_data_type"] = config.parallel.reduce
        if (
            layout.zero_stage != 1
        ):  # ZeRO-1 with this setting becomes another optimizer class, without our masters' layout
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(settings, config.engine.extra, "engine.extra")


def _merge(ours: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        if key in ours and isinstance(ours[key], dict) and isinstance(value, dict):
            merged[key] = _merge(ours[key], value, f"{path}.{key}")
        elif key in ours:
            raise UsageError(
                f"{path}.{key} collides with what geoloom sets ({ours[key]!r}); use geoloom's own key for it"
            )
        else:
            merged[key] = value
    return merged


def _at(beat: Heartbeat | None, phase: str) -> None:
    if beat is not None:
        beat.at(phase)


class Engine:
    """Student under DeepSpeed, teacher beside it, both sharded alike.

    Args:
        student: `model.pretrain.Student`, the same function on all ranks: whole, or with this rank's experts.
        teacher: its twin (`make_teacher`), on `meta` or anywhere: it starts as the student.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        config: PretrainConfig,
        layout: Layout,
        device: torch.device,
        reduce: Any,
    ) -> None:
        import deepspeed

        self.config, self.layout, self.device, self.reduce = config, layout, device, reduce
        apply_expert_parallel(student, layout)
        apply_expert_parallel(teacher, layout)
        if config.train.compile:
            for model in (student, teacher):
                model.skysense.compile_blocks()
        self.student = student
        self.logical_shapes = {n: logical(p)[0] for n, p in student.named_parameters() if p.requires_grad}
        settings = deepspeed_config(config, layout)
        self.deepspeed, *_ = deepspeed.initialize(
            model=student, optimizer=adamw(student, config.optimizer), config=settings
        )
        self.state = ShardedState(self.deepspeed, student)
        return_freed()
        self.teacher = Teacher(teacher, student, self.state, compute_dtype(layout), device)
        self.total_samples = config.train.steps * layout.batch

    def step(
        self, micro_batches: list[Any], samples: int, beat: Heartbeat | None = None, diagnose: bool = True
    ) -> StepResult:
        """One update. samples: seen before this step; schedules are evaluated at the step's end. diagnose: also the figures that
        cost time of their own (`model.collapse`); the same on all ranks.
        """
        after = samples + self.layout.batch
        lr = self._set_rates(after)
        student, teacher = self.student, self.teacher.module
        _at(beat, "teacher")
        scores = [teacher.teacher_forward(batch) for batch in micro_batches]
        targets = teacher.center(scores, samples, self.reduce, self.total_samples)
        _at(beat, "student")
        self.deepspeed.train()
        names: list[str] = []
        sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        for index, (batch, target) in enumerate(zip(micro_batches, targets)):
            loss, metrics = self.deepspeed(batch, target, diagnose)
            self.deepspeed.backward(loss)
            found = {**metrics, "loss": loss}
            packed = torch.stack([value.detach().reshape(()).double() for value in found.values()])
            names, sums = list(found), packed if index == 0 else sums + packed
            if index < len(micro_batches) - 1:
                self.deepspeed.step()
        _at(beat, "update")
        norm = self._clip() if self.layout.zero_stage == 0 else None
        self.deepspeed.step()
        applied = not bool(getattr(self.deepspeed.optimizer, "overflow", False))
        grad_norm = float(self.deepspeed.get_global_grad_norm() or 0.0) if norm is None else norm
        if applied:
            self.teacher.update(teacher_momentum(self.config.objective, after, self.total_samples, self.layout.batch))
        figures = self._average(names, sums, len(micro_batches))
        figures.update(student.finish_step(self.reduce))
        return StepResult(figures.pop("loss"), figures, grad_norm, lr, applied)

    def _set_rates(self, samples: int) -> float:
        config, total = self.config.optimizer, self.total_samples
        lr = learning_rate(samples, total, run_samples(config.warmup, total), config.lr, config.lr_end)
        set_rates(self.state.optimizer.param_groups, lr, weight_decay(samples, total, *config.weight_decay))
        return lr

    def _average(self, names: list[str], sums: Tensor, parts: int) -> dict[str, float]:
        """Mean over micro-batches and ranks, in one collective; names must be the same on all ranks."""
        packed = sums / parts
        if self.layout.world > 1:
            dist.all_reduce(packed)
            packed /= self.layout.world
        return dict(zip(names, packed.tolist()))

    def _clip(self) -> float:
        """ZeRO-0: global norm with every expert counted once, then scaling in place. Returns the norm before clipping."""
        dense = [p.grad for p in self.student.parameters() if p.grad is not None and getattr(p, "allreduce", True)]
        expert = [p.grad for p in self.student.parameters() if p.grad is not None and not getattr(p, "allreduce", True)]
        square = torch.stack(torch._foreach_norm(dense)).square().sum()
        if self.layout.ep > 1:
            mine = torch.stack(torch._foreach_norm(expert)).square().sum() if expert else square.new_zeros(())
            dist.all_reduce(mine)  # over all ranks: each expert is counted once per replica
            square = square + mine / (self.layout.world / self.layout.ep)
        norm = float(square.sqrt())
        limit = self.config.optimizer.clip
        if limit > 0 and norm > limit:
            torch._foreach_mul_(dense + expert, limit / (norm + 1e-6))
        return norm
