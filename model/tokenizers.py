"""Pixels to tokens: one strided convolution per modality.

Dimension legend: N images · C bands · H, W pixels · T tokens · D channels · P pixels per token side · X = C · P².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.schema import MODALITIES
from model import initial


class Tokenizer(nn.Module):
    """P x P convolution with stride P over the clear pixels of one modality.

    Invalid pixels (and the padding up to a multiple of P) take no part: after normalisation zero is what a convolution
    ignores, and `where`, unlike a product, also stops NaN.
    """

    def __init__(self, modality: str, dim: int, patch: int, bias: float = 0.0) -> None:
        super().__init__()
        self.patch, self.bias = patch, bias
        self.conv = nn.Conv2d(len(MODALITIES[modality].bands), dim, patch, patch)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of std 0.02; biases spread by `bias` times the response to unit pixels. The norm behind the tokenizer takes a
        token's length away: with zero biases its brightness would go with it (0.54 → 0.42 in `LOG.md`)."""
        initial.trunc_normal_(self.conv.weight, std=0.02)
        assert self.conv.bias is not None
        initial.normal_(self.conv.bias, std=self.bias * 0.02 * self.conv.weight[0].numel() ** 0.5)

    def forward(self, images: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Tokens [T, D] of several sets of images: (x_NCHW, valid_NHW, which patches are wanted, None: all)."""
        weight = self.conv.weight
        patches = []
        for x_NCHW, valid_NHW, members in images:
            x_TX = to_patches(torch.where(valid_NHW[:, None], x_NCHW, 0).to(weight.dtype), self.patch)
            patches.append(x_TX if members is None else x_TX.index_select(0, members))
        # a convolution whose stride is its size is a product with the patches
        return F.linear(torch.cat(patches), weight.flatten(1), self.conv.bias)


def to_patches(x_NCHW: Tensor, patch: int) -> Tensor:
    """[N · ⌈H/P⌉ · ⌈W/P⌉, C · P²], zero beyond the image."""
    pad = (0, -x_NCHW.shape[3] % patch, 0, -x_NCHW.shape[2] % patch)
    if any(pad):
        x_NCHW = F.pad(x_NCHW, pad)
    cells = x_NCHW.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # N C h P w P
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
