"""Fine-tuning for segmentation: an exported backbone, its feature pyramid, and a small head. Plain torch.

example:
  python -m pipeline.examples.segmentation moe.safetensors demo_out/shards --steps 60
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.shards import ShardSet
from model.pretrained import Pretrained, load_backbone
from pipeline.config import ViewConfig
from pipeline.probes.sites import view_of_sites


class SegmentationModel(nn.Module):
    """Class scores [B, K, H, W] of one modality's images: every map of the pyramid to 64 channels, upsampled, added, classified.

    Args:
        backbone: fine-tuned together with the head; `backbone.requires_grad_(False)` freezes it.
        merges: as `Pretrained.pyramid`; (False, False, False) keeps hr tokens at full resolution.
    """

    def __init__(
        self, backbone: Pretrained, modality: str, num_classes: int, merges: tuple[bool, bool, bool] | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.modality, self.merges = backbone, modality, merges
        self.lateral = nn.ModuleList(nn.Conv2d(dim, 64, 1) for dim in backbone.pyramid_dims)
        self.norm = nn.ModuleList(nn.GroupNorm(8, 64) for _ in backbone.pyramid_dims)
        self.head = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, num_classes, 1))

    def forward(self, images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """size: rows, columns of the scores (those of the label raster)."""
        maps = self.backbone.pyramid(self.modality, images_BCHW, merges=self.merges)
        parts = [norm(lateral(m)) for norm, lateral, m in zip(self.norm, self.lateral, maps)]
        total = sum(F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts)
        return self.head(total)


def finetune(
    model: SegmentationModel, shardset: ShardSet, label: str, steps: int, batch: int = 8, lr: float = 1e-3
) -> list[float]:
    """Trains on the set's train split; returns the loss of every step. The last images are not dropped, order is fixed."""
    rows = shardset.rows_of("train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        picked = rows[torch.randint(len(rows), (batch,), generator=generator).numpy()]
        images, labels = load(shardset, picked.tolist(), model.modality, label)
        scores = model(images, (labels.shape[1], labels.shape[2]))
        loss = F.cross_entropy(scores, labels, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def pixel_accuracy(model: SegmentationModel, shardset: ShardSet, split: str, label: str) -> float:
    """Share of labelled pixels named rightly."""
    right = known = 0
    for row in shardset.rows_of(split).tolist():
        images, labels = load(shardset, [row], model.modality, label)
        named = model(images, (labels.shape[1], labels.shape[2])).argmax(1)
        right += int(((named == labels) & (labels >= 0)).sum())
        known += int((labels >= 0).sum())
    return right / max(known, 1)


def load(shardset: ShardSet, rows: list[int], modality: str, label: str) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] (of a series: its first shown date) and labels [B, h, w] of whole sites, 80 m around their centre."""
    view = view_of_sites([shardset.read_sample(row) for row in rows], ViewConfig(256, 8, 1, 1), (modality,), label)
    assert view.classes_BHW is not None
    return view.modalities[modality].x_BTCHW[:, 0], view.classes_BHW.long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="file of python -m pipeline export")
    parser.add_argument("shards", help="labelled shard set")
    parser.add_argument("--modality", default="s2")
    parser.add_argument("--label", default="landcover")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    shardset = ShardSet.open(args.shards)
    num_classes = len(shardset.classes[args.label])
    model = SegmentationModel(load_backbone(args.backbone), args.modality, num_classes)
    losses = finetune(model, shardset, args.label, args.steps)
    split = "probe" if len(shardset.rows_of("probe")) else "val"
    score = pixel_accuracy(model, shardset, split, args.label)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; pixel accuracy on {split}: {score:.3f}")


if __name__ == "__main__":
    main()
