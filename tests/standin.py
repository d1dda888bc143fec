"""A small student with the real one's seams: dense layers, MoE layers, a buffer, a teacher that sets its targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe.layer import MoELayer

DIM = 8


@dataclass
class Rows:
    """Stands for a batch: x [B, L, D] and which tokens count."""

    x_BLD: Tensor
    valid_BL: Tensor
    keys: list[str]


class Network(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.enter = nn.Linear(DIM, DIM)
        self.moe = nn.ModuleList([MoELayer(DIM, 2 * DIM, experts, 1) for _ in range(2)]) if experts else nn.ModuleList()
        self.norm = nn.LayerNorm(DIM)
        self.leave = nn.Linear(DIM, 5)
        self.register_buffer("scale_D", torch.linspace(0.5, 1.5, DIM))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Rows) -> Tensor:
        h_BLD = self.enter(rows.x_BLD.to(self.enter.weight.dtype)) * self.scale_D.to(self.enter.weight.dtype)
        for layer in self.moe:
            y_BLD, _ = layer(h_BLD, rows.valid_BL)
            h_BLD = h_BLD + 4.0 * y_BLD
        return self.leave(self.norm(h_BLD))


class StandIn(Network):
    """loss = mean over the step's valid tokens of |student - centred teacher|^2, in `model.losses.reduce`'s convention."""

    @torch.no_grad()
    def teacher_forward(self, rows: Rows) -> tuple[Tensor, Rows]:
        return Network.forward(self, rows).float(), rows

    @torch.no_grad()
    def center(self, targets: list[tuple[Tensor, Rows]], samples: int, reduce: Any, total: int = 0) -> list[Any]:
        count = reduce.sum(torch.stack([rows.valid_BL.sum().float() for _, rows in targets]).sum())
        total = reduce.sum(torch.stack([(t * rows.valid_BL[..., None]).sum((0, 1)) for t, rows in targets]).sum(0))
        scale = reduce.world * len(targets) / count
        return [(t - total / count + torch.sin(7 * rows.x_BLD[..., :5]), scale) for t, rows in targets]

    def forward(self, rows: Rows, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
        aim_BLC, scale = target
        square_BL = F.mse_loss(Network.forward(self, rows).float(), aim_BLC, reduction="none").mean(-1)
        loss = (square_BL * rows.valid_BL).sum() * scale
        return loss, {"loss": loss.detach(), "loss/mse": loss.detach()}

    def finish_step(self, reduce: Any) -> dict[str, Tensor]:
        self.steps_seen += 1
        return {"moe/steps": self.steps_seen.float()}


def make_batch(step: int, batch: int, tokens: int = 6) -> Rows:
    """The global batch of a step: any rank can make it and take its part."""
    generator = torch.Generator().manual_seed(1000 + step)
    x_BLD = torch.randn(batch, tokens, DIM, generator=generator)
    return Rows(x_BLD, torch.rand(batch, tokens, generator=generator) > 0.3, [f"s{step}-{i}" for i in range(batch)])
