"""The teacher: an exponential moving average of the student, sharded with it.

Each rank averages what it holds of the fp32 master weights (a ZeRO partition, its own experts) and nothing else; the averages
are then gathered into the teacher's compute weights, in the compute precision. The average itself is always fp32: at momentum
0.9995 a bfloat16 average would stand still (its spacing near 1 is 2^-8, a step of 5e-4 rounds away).

Sharding changes nothing in the result: averaging is elementwise, so the sharded teacher equals the unsharded one bit by bit
whenever the students do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.initial import renew
from pipeline.parallel.zero import Master, Piece, ShardedState


class Teacher:
    """Averages of the student's masters, and the module that computes with them.

    Args:
        module: same parameter names as the student; holds compute weights (all dense ones, the local experts). What it brings as
            weights is let go, so it may come on `meta`.
        student: of the engine that `state` belongs to.
    """

    def __init__(
        self, module: Any, student: nn.Module, state: ShardedState, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._device = dtype, device
        bound = all(master.bind is not None for master in state.masters)

        def room(parameter: Tensor) -> Tensor:  # of weights that will be views, the shape alone
            shape = parameter.shape
            return torch.empty([1] * len(shape) if bound else shape, dtype=dtype, device=device).expand(shape)

        renew(module, room)
        self.module, self.state = module.to(device).requires_grad_(False).eval(), state
        self._parameters = dict(module.named_parameters())
        # Starts as the student is, bit by bit: the student's masters are what the teacher is an average of.
        self.averages = {id(master): master.tensor.detach().clone() for master in state.masters}
        self._tables: dict[int, Tensor] = {}  # where the teacher's weights can be views of what is gathered
        for master in state.masters:
            if master.bind is not None:
                self._tables[id(master)] = self._new_table(master)
                master.bind(self._parameters, self._tables[id(master)])
        if not bound:
            self.publish()
            return
        with torch.no_grad():  # nothing need travel: what publishing would gather is what the student computes with
            for name, parameter in student.named_parameters():
                self._parameters[name].copy_(parameter)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average ← momentum · average + (1 − momentum) · student, then new compute weights."""
        averages = [self.averages[id(master)] for master in self.state.masters]
        students = [master.tensor.detach() for master in self.state.masters]
        torch._foreach_lerp_(averages, students, 1.0 - momentum)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Compute weights from the averages; a collective over each master's group."""
        for master in self.state.masters:
            table = self._tables.get(id(master))
            gathered = self._gather(master, self._new_table(master) if table is None else table)
            if table is None:
                master.scatter(self._parameters, gathered)

    def of(self, piece: Piece) -> Tensor:
        """This rank's part of the average, fp32."""
        return piece.of(self.averages[id(piece.master)])

    def _new_table(self, master: Master) -> Tensor:
        """Room for all partitions in compute precision: [ranks, size]."""
        ranks = 1 if master.group is None else dist.get_world_size(master.group)
        return torch.zeros(ranks, master.tensor.numel(), dtype=self._dtype, device=self._device)

    def _gather(self, master: Master, table: Tensor) -> Tensor:
        """Fills `table` with every rank's average, cast before it travels: half the traffic in bf16."""
        part = self.averages[id(master)].reshape(-1)
        if table.shape[0] == 1:
            table[0].copy_(part)
        else:
            dist.all_gather_into_tensor(table.view(-1), part.to(table.device, table.dtype), group=master.group)
        return table
