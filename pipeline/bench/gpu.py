"""What only a GPU can show, in one run and one report: tests marked `gpu`, the measured peak of a matrix product, the full-size step part
by part (time, kernels, memory, MFU on useful FLOPs against that peak), the ladder of optimisations, experts against a dense layer.

Batches are made in memory; DeepSpeed and a shard set are not needed. Without a CUDA device it says so and ends with 0.

examples:
  python -m pipeline bench gpu
  python -m pipeline bench gpu pipeline/runs/tiny.yaml train.micro_batch=16 --out gpu_out --minutes 4 --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

SIZE = 8192  # side of the square matrices whose product is taken for the peak
WARM, REPEATS = 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="pipeline/runs/skysense_v2.yaml", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", default="gpu_out", help="folder of report.txt and report.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="no further part begins after so long")
    parser.add_argument("--ladder-config", default="pipeline/runs/tiny.yaml", help="run whose step the ladder varies")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    import torch

    from cluster.cli import print_json

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"no GPU here: torch {torch.__version__} ({built}) sees no CUDA device. Nothing was measured.")
        if args.json:
            print_json({"gpu": None})
        return 0
    report = Report(Path(args.out), time.monotonic() + 60 * args.minutes)
    report.say(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    )
    failed = run_tests(report)
    for name, part in (("peak", peak), ("step", step), ("ladder", ladder), ("moe", moe)):
        if report.is_over:
            report.say(f"{name}: not begun, the {args.minutes:g} minutes are over")
            continue
        try:
            part(args, report)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # out of memory, a kernel this device has not: the rest is still worth having
            report.say(f"{name}: failed: {str(error).splitlines()[0][:200]}")
            failed = True
        torch.cuda.empty_cache()
    report.write()
    if args.json:
        print_json({"gpu": report.figures})
    return 1 if failed else 0


class Report:
    """Lines for people and figures for programs, written at the end of every part."""

    def __init__(self, folder: Path, end: float) -> None:
        self.folder, self.end = folder, end
        self.lines: list[str] = []
        self.figures: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        (self.folder / "report.txt").write_text("\n".join(self.lines) + "\n")
        (self.folder / "report.json").write_text(json.dumps(self.figures, indent=1))


def run_tests(report: Report) -> bool:
    """Tests marked `gpu`, in a process of their own; true if any failed."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "--no-header", "--noconftest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines()[-30:]:
        report.say(f"tests: {line}")
    report.figures["tests"] = {"returncode": done.returncode}
    return done.returncode != 0


def peak(args: argparse.Namespace, report: Report) -> None:
    """TFLOP/s of a large bfloat16 product: what MFU below refers to."""
    import torch

    a = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    seconds = min(_seconds(lambda: a @ a) for _ in range(8))
    report.figures["peak_tflops"] = 2 * SIZE**3 / seconds / 1e12
    report.say(f"peak: {report.figures['peak_tflops']:.0f} TFLOP/s, {SIZE} x {SIZE} bf16 product")


class Part(NamedTuple):
    """One part of a step: milliseconds, kernels launched, GiB at most while it ran."""

    ms: float
    kernels: int
    gib: float


def step(args: argparse.Namespace, report: Report) -> None:
    """The configured model, one micro-batch in bfloat16 with float32 masters, part by part."""
    import torch

    from cluster.config import load
    from model.counts import table
    from model.losses.reduce import SingleProcess
    from model.pretrain import Student
    from model.teacher import make_teacher
    from pipeline.bench.simulated import STATISTICS, batch_of
    from pipeline.config import PretrainConfig
    from pipeline.parallel.processes import set_matmul_precision

    config = load(PretrainConfig, args.config, ["objective.ita_embeddings=null", *args.overrides])
    set_matmul_precision(True)
    sites = config.train.micro_batch or 1
    with torch.device("cuda"):
        torch.manual_seed(0)
        student = Student(config.model, config.objective, STATISTICS).train()
    masters = [parameter.detach().clone() for parameter in student.parameters()]
    for parameter in student.parameters():  # parameters only: buffers stay float32, as under the engine
        parameter.data = parameter.data.to(torch.bfloat16)
    teacher = make_teacher(student)
    if config.train.compile:
        for each in (student, teacher):
            each.skysense.compile_blocks()
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)
    batch, reduce = batch_of(config, sites).to("cuda"), SingleProcess()
    kept: dict[str, Any] = {}

    def teach() -> None:
        kept["scores"] = [teacher.teacher_forward(batch)]

    def centre() -> None:
        [kept["target"]] = teacher.center(kept["scores"], 0, reduce)

    def learn() -> None:
        kept["loss"], kept["metrics"] = student(batch, kept["target"])

    def update() -> None:
        parameters: list[torch.Tensor] = list(student.parameters())
        for master, parameter in zip(masters, parameters):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
            torch._foreach_lerp_([*teacher.parameters()], parameters, 0.01)
        student.zero_grad()
        student.finish_step(reduce)

    def back() -> None:
        kept["loss"].backward()

    parts = _by_part({"teacher": teach, "centring": centre, "student": learn, "backward": back, "update": update})
    seconds = sum(part.ms for part in parts.values()) / 1000
    share = float(kept["metrics"]["work/share"])
    useful = sites * share * table(config)["flops_per_sample"]["train"]
    mfu = useful / seconds / (report.figures["peak_tflops"] * 1e12)
    report.say(f"step: {args.config}, {sites} sites, share of useful work {share:.2f}")
    for name, part in parts.items():
        report.say(f"  {name:<10}{part.ms:>9.1f} ms{part.kernels:>8} kernels{part.gib:>8.1f} GiB")
    report.say(f"  {sites / seconds:.2f} samples/s, {useful / seconds / 1e12:.0f} TFLOP/s useful, MFU {mfu:.1%}")
    report.figures["step"] = {
        "samples_per_s": sites / seconds, "mfu": mfu, "work_share": share, "sites": sites,
        "parts": {name: part._asdict() for name, part in parts.items()},
    }  # fmt: skip


def _by_part(functions: dict[str, Any]) -> dict[str, Part]:
    """Each part's best time over several whole steps; kernels counted in one more, so that the counting costs no time."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    times: dict[str, list[float]] = {name: [] for name in functions}
    gib = {}
    for number in range(WARM + REPEATS):
        for name, function in functions.items():
            torch.cuda.reset_peak_memory_stats()
            seconds = _seconds(function)
            gib[name] = torch.cuda.max_memory_allocated() / 2**30
            if number >= WARM:
                times[name].append(seconds)
    kernels = {}
    for name, function in functions.items():
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            function()
            torch.cuda.synchronize()
        kernels[name] = sum(event.device_type == DeviceType.CUDA for event in found.events())
    return {name: Part(1000 * min(times[name]), kernels[name], gib[name]) for name in functions}


def _seconds(function: Any) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def ladder(args: argparse.Namespace, report: Report) -> None:
    """`bench step --ladder --operations` on a smaller run, in a process of its own."""
    command = [sys.executable, "-m", "pipeline", "bench", "step", args.ladder_config, "--simulated", "--ladder", "--operations", "--compiled",
               "--json", "objective.ita_embeddings=null", "train.batch=32"]  # fmt: skip
    _child("ladder", command, report)


def moe(args: argparse.Namespace, report: Report) -> None:
    """Experts against a dense layer of equal FLOPs, beside DeepSpeed's where it is installed."""
    for experts, top_k in ((8, 1), (64, 4)):
        command = [sys.executable, "-m", "pipeline", "bench", "moe", "--experts", str(experts), "--top-k", str(top_k),
                   "--tokens", "32768", "--dim", "2048", "--json"]  # fmt: skip
        _child(f"moe_{experts}_{top_k}", command, report)


def _child(name: str, command: list[str], report: Report) -> None:
    left = max(report.end - time.monotonic(), 30.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        report.say(f"{name}: not done in {left:.0f} s")
        return
    lines = done.stdout.splitlines()
    for line in lines[:-1] if done.returncode == 0 else [*lines, *done.stderr.splitlines()[-5:]]:
        report.say(f"{name}: {line}")
    if done.returncode == 0 and lines:
        report.figures[name] = json.loads(lines[-1])
