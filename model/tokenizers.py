"""Pixels to tokens: one strided convolution per modality, and which tokens are valid.

Dimension legend: N images · C bands · H, W pixels · h, w tokens · D channels · P pixels per token side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.schema import MODALITIES
from model.validity import patch_validity


class Tokenizer(nn.Module):
    """P x P convolution with stride P over the clear pixels of one modality.

    Invalid pixels (and the padding up to a multiple of P) take no part: after normalisation zero is what a convolution
    ignores, and `where`, unlike a product, also stops NaN.
    """

    def __init__(self, modality: str, dim: int, patch: int, min_valid: float, bias: float = 0.0) -> None:
        super().__init__()
        self.patch, self.min_valid, self.bias = patch, min_valid, bias
        self.conv = nn.Conv2d(len(MODALITIES[modality].bands), dim, patch, patch)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of std 0.02; biases spread by `bias` times the response to unit pixels. The norm behind the tokenizer takes a
        token's length away: with zero biases its brightness would go with it (0.54 → 0.42 in `LOG.md`)."""
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        assert self.conv.bias is not None
        nn.init.normal_(self.conv.bias, std=self.bias * 0.02 * self.conv.weight[0].numel() ** 0.5)

    def forward(self, x_NCHW: Tensor, valid_NHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x_NhwD and valid_Nhw: more than `min_valid` of the token's P² pixels are valid."""
        weight = self.conv.weight
        x_NCHW = torch.where(valid_NHW[:, None], x_NCHW, 0).to(weight.dtype)
        pad = (0, -x_NCHW.shape[3] % self.patch, 0, -x_NCHW.shape[2] % self.patch)
        if any(pad):
            x_NCHW = F.pad(x_NCHW, pad)
        return self.conv(x_NCHW).permute(0, 2, 3, 1), patch_validity(valid_NHW, self.patch, self.min_valid)
