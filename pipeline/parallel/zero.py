"""The one door to DeepSpeed's internals: which piece of which logical parameter this rank owns, at every ZeRO stage.

A *logical* parameter is the parameter of the one-process model, under its one-process name; the stacked experts of a layer
are one logical parameter whose leading dimension counts all experts. Every layout cuts logical parameters into pieces that
are contiguous in the flattened logical parameter:

    expert parallelism   rows [r·E/ep, (r+1)·E/ep) of the experts           → contiguous, because experts lead
    ZeRO-1, -2           a range of the flattened group of parameters         → contiguous within each parameter
    ZeRO-3               the r-th of `world` equal ranges of each parameter   → contiguous

so that one record (name, start, fp32 values, Adam moments) describes them all, and a checkpoint is nothing but such records.
Checked against DeepSpeed 0.19.8; what is read here is listed at each function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one logical parameter that this rank holds in fp32.

    Attributes:
        name: logical name.
        shape: logical shape (all experts).
        start: where the piece begins in the flattened logical parameter.
        master: Master it lies in, at `offset`, `size` elements.
        owned: the part [a, b) of the piece that this rank alone answers for (ZeRO-0 holds everything everywhere).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Master
    offset: int
    size: int
    owned: tuple[int, int]

    def of(self, flat: Tensor) -> Tensor:
        """The piece's elements in a tensor laid out like its master (the master, a moment, an average)."""
        return flat.reshape(-1)[self.offset : self.offset + self.size]


@dataclass(frozen=True, eq=False)
class Master:
    """One fp32 tensor the optimizer updates on this rank, and the ranks that hold its other partitions.

    Attributes:
        tensor: fp32; a flat partition (ZeRO 1-3) or a parameter (ZeRO 0).
        group: process group over which `tensor` is one of equal partitions; None where it is whole.
        scatter: given all partitions, [ranks, size], puts them into a twin model's parameters.
        bind: makes a twin's parameters views of such a table, so that filling it is all; None where that cannot be.
    """

    tensor: Tensor
    group: dist.ProcessGroup | None
    scatter: Callable[[dict[str, nn.Parameter], Tensor], None]
    bind: Callable[[dict[str, nn.Parameter], Tensor], None] | None = None


class ShardedState:
    """Masters, pieces and moments of a DeepSpeed engine, whatever its stage."""

    def __init__(self, engine: Any, module: nn.Module) -> None:
        self.engine, self.optimizer = engine, engine.basic_optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        parts = {0: self._whole, 1: self._flat, 2: self._flat, 3: self._partitioned}[self.stage](module)
        self.pieces: list[Piece] = [piece for _, pieces in parts for piece in pieces]
        self.masters: list[Master] = [master for master, _ in parts]
        for master in self.masters:  # torch creates the state with the first step; a checkpoint may be loaded before it
            there = self.optimizer.state.get(master.tensor, {})  # DeepSpeed makes that step, with gradients of zero
            self.optimizer.state[master.tensor] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{key: _zeros(there.get(key), master.tensor) for key in MOMENTS},
            }

    def moment(self, piece: Piece, key: str) -> Tensor:
        """This rank's part of `exp_avg` or `exp_avg_sq`."""
        return piece.of(self.optimizer.state[piece.master.tensor][key])

    @property
    def adam_step(self) -> int:
        """Updates Adam has made: the same for every tensor, or the moments are not what a checkpoint says."""
        steps = {int(self.optimizer.state[master.tensor]["step"].item()) for master in self.masters}
        assert len(steps) == 1, f"Adam's step counts differ between parameters: {sorted(steps)}"
        return steps.pop()

    def set_adam_step(self, step: int) -> None:
        for master in self.masters:  # a tensor of its own each: a shared one would advance once per parameter
            self.optimizer.state[master.tensor]["step"] = torch.tensor(float(step))

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the compute weights follow the masters after these were written from outside."""
        wrapper = self.engine.optimizer
        if self.stage in (1, 2):
            wrapper.update_lp_params()
        elif self.stage == 3:
            for index in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(index)
            persistent = wrapper.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    # --- one function per way of cutting

    def _whole(self, module: nn.Module) -> list[tuple[Master, list[Piece]]]:
        """ZeRO-0: every rank holds every parameter (of its experts); each answers for an equal share of it."""
        found = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                master = Master(parameter, None, _scatter_whole(name))
                replicas, index = self._replicas(parameter)
                n = parameter.numel()
                owned = (n * index // replicas, n * (index + 1) // replicas)
                shape, first = logical(parameter)
                found.append((master, [Piece(name, shape, first, master, 0, n, owned)]))
        return found

    def _flat(self, module: nn.Module) -> list[tuple[Master, list[Piece]]]:
        """ZeRO-1/2: each optimizer group flattened, padded, cut into equal ranges.

        Reads `round_robin_bit16_groups`, `round_robin_bit16_offsets`, `single_partition_of_fp32_groups`, `partition_size`,
        `real_dp_process_group` of DeepSpeedZeroOptimizer.
        """
        wrapper, found = self.engine.optimizer, []
        for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
            parameters, offsets = wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i]
            group, size = wrapper.real_dp_process_group[i], int(wrapper.partition_size[i])
            low = dist.get_rank(group) * size
            places = [(self.names[id(p)], p.shape, int(o)) for p, o in zip(parameters, offsets)]
            master, pieces = Master(flat, group, _scatter_flat(places), _bind_flat(places)), []
            for parameter, offset in zip(parameters, offsets):
                a, b = max(offset, low), min(offset + parameter.numel(), low + size)
                if a < b:
                    shape, first = logical(parameter)
                    start = first + a - offset
                    pieces.append(Piece(self.names[id(parameter)], shape, start, master, a - low, b - a, (0, b - a)))
            found.append((master, pieces))
        return found

    def _partitioned(self, module: nn.Module) -> list[tuple[Master, list[Piece]]]:
        """ZeRO-3: each parameter padded and cut into equal ranges; a sub-group's ranges of one rank lie in one flat tensor.

        Reads `fp16_groups`, `fp32_partitioned_groups_flat`, `grad_position` of DeepSpeedZeroOptimizer_Stage3 and
        `ds_shape`, `ds_numel` of its parameters.
        """
        wrapper, found, world = self.engine.optimizer, [], dist.group.WORLD
        rank = dist.get_rank()
        for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
            places: list[tuple[str, tuple[int, ...], int, int]] = []
            spans = []
            for parameter in wrapper.fp16_groups[i]:
                _, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
                name, shape = self.names[id(parameter)], tuple(parameter.ds_shape)
                places.append((name, shape, int(offset), int(size)))
                a, b = rank * size, min((rank + 1) * size, parameter.ds_numel)
                if a < b:
                    spans.append((name, shape, a, int(offset), b - a))
            master = Master(flat, world, _scatter_partitioned(places))
            found.append((master, [Piece(n, s, a, master, o, m, (0, m)) for n, s, a, o, m in spans]))
        return found

    def _replicas(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(how many ranks hold the same values, which of them this is)."""
        if getattr(parameter, "allreduce", True):
            return dist.get_world_size(), dist.get_rank()
        group = self.engine.expert_data_parallel_group[parameter.group_name]  # type: ignore[attr-defined]
        return dist.get_world_size(group), dist.get_rank(group)


def _zeros(there: Tensor | None, like: Tensor) -> Tensor:
    """The tensor that is there, or a new one: a second pair of moments beside the first would be the most that a start takes."""
    return torch.zeros_like(like, requires_grad=False) if there is None else there.zero_()


def logical(parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
    """(logical shape, where the local parameter begins in the flattened logical one); see `expert_parallel.localise`."""
    shape = tuple(parameter.shape)
    if not hasattr(parameter, "num_experts"):
        return shape, 0
    rest = parameter.numel() // shape[0]
    return (parameter.num_experts, *shape[1:]), parameter.first_expert * rest  # type: ignore[attr-defined]


def _scatter_whole(name: str) -> Callable[[dict[str, nn.Parameter], Tensor], None]:
    def scatter(twin: dict[str, nn.Parameter], whole: Tensor) -> None:
        twin[name].copy_(whole.view_as(twin[name]))

    return scatter


def _scatter_flat(places: list[Any]) -> Callable[[dict[str, nn.Parameter], Tensor], None]:
    def scatter(twin: dict[str, nn.Parameter], partitions: Tensor) -> None:
        flat = partitions.reshape(-1)
        for name, shape, offset in places:
            twin[name].copy_(flat[offset : offset + shape.numel()].view(shape))

    return scatter


def _bind_flat(places: list[Any]) -> Callable[[dict[str, nn.Parameter], Tensor], None]:
    def bind(twin: dict[str, nn.Parameter], partitions: Tensor) -> None:
        flat = partitions.view(-1)
        for name, shape, offset in places:
            twin[name].data = flat[offset : offset + shape.numel()].view(shape)

    return bind


def _scatter_partitioned(places: list[Any]) -> Callable[[dict[str, nn.Parameter], Tensor], None]:
    def scatter(twin: dict[str, nn.Parameter], partitions: Tensor) -> None:
        for name, _, offset, size in places:
            twin[name].view(-1).copy_(partitions[:, offset : offset + size].reshape(-1)[: twin[name].numel()])

    return scatter
