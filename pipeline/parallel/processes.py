"""Starting and ending a rank: device, process groups with a timeout on every one of them, and a clean exit."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import resource
import sys
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist

from cluster.exit_codes import DONE, REQUEUE
from cluster.ranks import Ranks

MESH_RANKS = 64


def choose_accelerator() -> None:
    """Tells DeepSpeed where it runs; to be called before it is first imported, else it warns and guesses."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def start(ranks: Ranks, timeout_s: float) -> torch.device:
    """Joins the job and returns this rank's device. Every group, DeepSpeed's own included, gets the timeout.

    DeepSpeed is imported here for the first time, after the variables it reads on import; its shared-memory collective is
    switched off, because it would be compiled on first use (two minutes) for what gloo does already.
    """
    choose_accelerator()
    cuda = torch.cuda.is_available()
    allow_open_files(4 * ranks.world)
    os.environ.update(ranks.environment())
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    set_matmul_precision(cuda)
    connect_when_needed(ranks.world)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    # `timeout` of init_process_group does not reach groups made later, and DeepSpeed passes none
    torch.distributed.new_group = functools.partial(dist.new_group, timeout=timeout)
    start_deepspeed()
    return device


def set_matmul_precision(cuda: bool) -> None:
    """float32 products on CUDA run as TF32 (10 bits of mantissa, eight times as fast); the peak that MFU refers to is TF32's.
    What must be exact asks for float64 (geometry), or rounds the same way everywhere (routing).
    """
    if cuda:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def connect_when_needed(world: int) -> None:
    """Beyond MESH_RANKS, gloo connects two ranks when they first talk to one another: a ring and a tree need a few neighbours, the
    mesh it makes otherwise W − 1 connections on every rank and group.

    Small jobs keep the mesh: a connection made late ignores the timeout if the peer has died before (pytorch/gloo issue 520), and
    then the watchdog of `pipeline.health` is what ends the job.
    """
    if world > MESH_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def allow_open_files(wanted: int) -> None:
    """Raises this process's soft limit: gloo may connect every rank with every other one, and 1,024 is what many systems allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, wanted + 4096)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )


def start_deepspeed() -> None:
    """Imports DeepSpeed and hands it the process group that is there."""
    import logging

    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def finish(code: int = 0, together: bool | None = None) -> NoReturn:
    """Ends this rank without running destructors: a finished DeepSpeed job otherwise exits 1 about once in thirty runs.

    together: all ranks end here for the same reason and wait for each other first, so that nobody is taken for dead. None:
    where the code says that the run ended as it should.
    """
    if (code in (DONE, REQUEUE) if together is None else together) and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree_max(value: float, device: torch.device | str = "cpu") -> float:
    """The largest `value` over all ranks (a stop flag, a fault code)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())
