"""An exported backbone as the encoder that fine-tuning frameworks expect: images in, a list of feature maps out.

TerraTorch, torchgeo and segmentation_models build decoders on exactly this: `encoder(x)` gives maps from fine to coarse,
`encoder.out_channels` their widths. Dimension legend: B images · C bands · H, W pixels · D channels · h, w tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from model.pretrained import Pretrained, load_backbone


class Encoder(nn.Module):
    """One modality of a pretrained backbone as a feature pyramid.

    Attributes:
        out_channels: channels D of the four maps.
        reduction: pixels per token side of each map.
        bands: what the C channels of an image are, in order, in the unit that sensors store (see `model.pretrained`).
    """

    def __init__(self, backbone: Pretrained, modality: str, merges: tuple[bool, bool, bool] | None = None) -> None:
        super().__init__()
        if modality not in backbone.cfg.modalities:
            raise UsageError(f"this model reads {', '.join(backbone.cfg.modalities)}; found {modality}")
        self.backbone, self.modality, self.merges = backbone, modality, merges
        self.out_channels = list(backbone.pyramid_dims)
        self.bands = MODALITIES[modality].bands
        halved = backbone.cfg.merges(modality) if merges is None else merges
        self.reduction = [backbone.cfg.patch * 2 ** sum(halved[:i]) for i in range(4)]

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Four maps [B, D, h, w], fine to coarse; tokens without a valid pixel are zero."""
        return self.backbone.pyramid(self.modality, images_BCHW, merges=self.merges)


def encoder(
    path: str, modality: str, merges: tuple[bool, bool, bool] | None = None, frozen: bool = False,
    device: str | torch.device = "cpu",
) -> Encoder:  # fmt: skip
    """The encoder of one modality of an exported file (`python -m pipeline export`).

    merges: as `Pretrained.pyramid`; (False, False, False) keeps full token resolution. frozen: no parameter takes gradients.

    Raises:
        UsageError: no such file, another format, or a modality that the model was not trained on.
    """
    built = Encoder(load_backbone(path, device), modality, merges)
    return built.requires_grad_(not frozen)
