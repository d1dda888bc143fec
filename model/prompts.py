"""Modality prompt tokens: a few learnable tokens per modality in front of the image tokens of stages 3 and 4.

Dimension legend: K images · M modalities · P prompt tokens · D channels · X = P · D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model import initial


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
            initial.trunc_normal_(tokens_PD, std=0.02)

    def forward(self, member_KM: Tensor, names: Sequence[str]) -> Tensor:
        """[K · P, D]: the prompts of K images, from the one-hot modality (of `names`) of each; a product, so that the gradient is
        one too."""
        table_MX = torch.stack([self.tokens[name].flatten() for name in names])
        return (member_KM.to(table_MX.dtype) @ table_MX).unflatten(1, (self.num, -1)).flatten(0, 1)
