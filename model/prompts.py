"""Modality prompt tokens: a few learnable tokens per modality in front of the image tokens of stages 3 and 4.

Dimension legend: N images · P prompt tokens · L image tokens · D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Prompts(nn.Module):
    """One set per modality for one stage. They take part in self-attention; the stage drops their outputs."""

    def __init__(self, modalities: tuple[str, ...], num: int, dim: int) -> None:
        super().__init__()
        self.num = num
        self.tokens = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(num, dim)) for name in modalities} if num else {}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tokens_PD in self.tokens.values():
            nn.init.trunc_normal_(tokens_PD, std=0.02)

    def forward(self, modality: str, x_NLD: Tensor) -> Tensor:
        """[N, L, D] → [N, P + L, D]."""
        if not self.num:
            return x_NLD
        front_NPD = self.tokens[modality].to(x_NLD.dtype).expand(x_NLD.shape[0], -1, -1)
        return torch.cat([front_NPD, x_NLD], dim=1)
