"""Expert layers, forward and backward: ours (one product per expert; grouped), DeepSpeed's own, and a dense FFN of equal FLOPs.

Useful FLOPs only: padding to capacity and dropped tokens count for nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--dim", type=int, default=352)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    import importlib.util

    import torch

    from cluster.cli import print_json
    from cluster.ranks import Ranks
    from model.moe.layer import MoELayer
    from pipeline.launch import free_port
    from pipeline.parallel.processes import finish, start

    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if has_deepspeed:
        device = start(Ranks(port=free_port()), 120.0)
    else:  # its rows are left out
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    x_NLD = torch.randn(1, args.tokens, args.dim, device=device, dtype=dtype, requires_grad=True)
    valid_NL = torch.ones(1, args.tokens, dtype=torch.bool, device=device)
    useful = 3 * 16 * args.tokens * args.top_k * args.dim**2  # forward, and twice that backward; two matrices of 4·D²

    def ours(grouped: bool) -> Callable[[], Any]:
        layer = MoELayer(args.dim, 4 * args.dim, args.experts, args.top_k, grouped).to(device, dtype)
        return lambda: layer(x_NLD, valid_NL)[0]

    wide = 4 * args.dim * args.top_k
    dense = torch.nn.Sequential(torch.nn.Linear(args.dim, wide), torch.nn.GELU(), torch.nn.Linear(wide, args.dim)).to(
        device, dtype
    )
    rivals: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(x_NLD), "geoloom_loop": ours(False), "geoloom_grouped": ours(True),
    }  # fmt: skip
    if has_deepspeed:
        rivals |= {
            "deepspeed_cap1.25": _deepspeed(args, x_NLD, dtype, drop=True),
            "deepspeed_nodrop": _deepspeed(args, x_NLD, dtype, drop=False),
        }
    figures: dict[str, dict[str, float]] = {}
    for name, forward in rivals.items():
        try:
            seconds = _time(forward, args.repeats)
        except (RuntimeError, AssertionError) as error:  # a kernel this device or precision has not
            print(f"{name:<20} not here: {str(error).splitlines()[0][:90]}")
            continue
        figures[name] = {
            "of_dense": 1.0 if name == "dense" else figures["dense"]["ms"] / (1000 * seconds),
            "ms": 1000 * seconds,
            "tokens_per_s": args.tokens / seconds,
            "useful_gflops": useful / seconds / 1e9,
        }
        print(
            f"{name:<20}{1000 * seconds:>10.1f} ms{args.tokens / seconds:>12.0f} tokens/s{useful / seconds / 1e9:>10.1f} useful GFLOP/s"
            f"{figures[name]['of_dense']:>8.2f} of dense"
        )
    if args.json:
        print_json({"moe": figures})
    if has_deepspeed:
        finish()
    return 0


def _deepspeed(args: argparse.Namespace, x_NLD: Any, dtype: Any, drop: bool) -> Callable[[], Any]:
    """DeepSpeed's own layer, with capacity 1.25 and dropped tokens, or padded to the fullest expert."""
    import torch
    from deepspeed.moe.layer import MoE

    expert = torch.nn.Sequential(
        torch.nn.Linear(args.dim, 4 * args.dim), torch.nn.GELU(), torch.nn.Linear(4 * args.dim, args.dim)
    )
    layer = MoE(args.dim, expert, args.experts, 1, k=args.top_k, capacity_factor=1.25, drop_tokens=drop, use_rts=False)
    layer.set_deepspeed_parallelism()
    layer.to(x_NLD.device, dtype)
    return lambda: layer(x_NLD)[0]


def _time(forward: Callable[[], Any], repeats: int) -> float:
    """Best seconds of one forward and backward pass."""
    import torch

    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        forward().sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
