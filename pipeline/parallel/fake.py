"""Any rank of any world in one process: engines built under torch's fake process group, whose collectives move nothing.

What such an engine shows is structure: which pieces it holds, in which groups, how many bytes. Values mean nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from cluster.ranks import Ranks
from data_prep.schema import MODALITIES
from model.losses.reduce import SingleProcess
from pipeline.config import PretrainConfig
from pipeline.optimizer import groups_of
from pipeline.parallel.layout import Layout
from pipeline.parallel.pieces import owned, state_bytes


@contextlib.contextmanager
def fake_rank(ranks: Ranks) -> Iterator[None]:
    """Makes this process `ranks.rank` of `ranks.world` while the block lasts. No process group may be there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.parallel.processes import choose_accelerator, start_deepspeed

    choose_accelerator()
    before = dict(os.environ)
    os.environ.update(ranks.environment())
    dist.init_process_group("fake", store=FakeStore(), rank=ranks.rank, world_size=ranks.world)
    try:
        start_deepspeed()
        yield
    finally:
        _forget_groups()
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _forget_groups() -> None:
    """DeepSpeed keeps its groups, and its backend, in module variables: the next rank makes its own."""
    import deepspeed.comm
    from deepspeed.utils import groups

    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP",
                 "_EXPERT_DATA_PARALLEL_GROUP_RANKS", "_ALL_TO_ALL_GROUP"):  # fmt: skip
        getattr(groups, name).clear()
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
    deepspeed.comm.comm.cdb = None


def built(config: PretrainConfig, rank: int, world: int, per_node: int) -> dict[str, Any]:
    """What an engine built for one rank holds, beside what `pieces` says it should.

    Returns: `rank`; `pieces`, `planned_pieces` [[name, start, size], …]; `state_bytes`, `planned_state_bytes` of masters,
    moments and averages; `parameters` the rank computes with; `groups`: ranks in the group of each master.
    """
    from pipeline.engine import Engine
    from pipeline.first_weights import blank, first_networks

    ranks = Ranks(rank, world, rank % per_node, per_node)
    layout = Layout.of(config, ranks)
    statistics = {n: {"mean": [0.0] * len(m.bands), "std": [1.0] * len(m.bands)} for n, m in MODALITIES.items()}
    with fake_rank(ranks):
        device = torch.device("cpu")
        groups = groups_of(blank(config, statistics, []), config.optimizer, layout.ep)
        student, teacher = first_networks(config, layout, statistics, [], device)
        engine = Engine(student, teacher, config, layout, device, SingleProcess())
        held = [(p.name, p.start + p.owned[0], p.owned[1] - p.owned[0]) for p in engine.state.pieces]
        found = {
            "rank": rank,
            "pieces": [list(piece) for piece in held if piece[2]],
            "planned_pieces": [list(piece) for piece in owned(groups, layout.zero_stage, world, layout.ep, rank)],
            "state_bytes": 16 * sum(size for _, _, size in held),
            "planned_state_bytes": state_bytes(groups, layout.zero_stage, world, layout.ep, rank),
            "parameters": sum(p.numel() for p in engine.student.parameters() if p.requires_grad),
            "planned_parameters": sum(sum(group.local_numels(layout.ep)) for group in groups),
            "groups": [
                1 if m.group is None else dist.get_world_size(m.group) for m in engine.state.masters
            ],
            "total": sum(math.prod(shape) for group in groups for _, shape in group.parameters),
        }  # fmt: skip
        engine.deepspeed.destroy()
    return found
