"""Cross-sensor restoration: each sensor's tokens, and the fused ones, regress what every sensor measured in their ground cell.

A token that can say what the *other* sensors see has to know the ground, not its own pixels. Targets are statistics of the whole
view's normalised pixels per cell of the fused grid: mean and standard deviation of each band over the cell's pixels and dates;
for sensors without dates (`hr`) also the mean absolute difference to the next pixel, east and south: texture.

Legend: B sites · T dates · C bands · H, W canvas · h, w fused cells · D feature dim · Q target numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.schema import MODALITIES
from model import initial
from model.batch import ModalityView, View
from model.config import ModelConfig
from model.losses.sinkhorn import work_dtype
from model.objective_plan import restore_targets
from model.skysense import Features

VARIANCE_FLOOR = 1e-4  # of normalised pixels: the root of zero has no gradient, and nobody measures a smaller spread


def mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Two linear layers with GELU, weights at std 1/√fan_in as in `heads.ProjectionHead`."""
    head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))
    for layer in (head[0], head[2]):
        assert isinstance(layer, nn.Linear)
        initial.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        initial.zeros_(layer.bias)
    return head


def apply_head(head: nn.Module, x: Tensor) -> Tensor:
    """A head on features of any precision, in its own."""
    return head(x.to(next(head.parameters()).dtype))


def on_cells(x_BThwD: Tensor, ok_BThw: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Dates averaged, then the token under each cell's centre: [B, h, w, D], and whether it has any valid date."""
    weight = ok_BThw[..., None].to(x_BThwD.dtype)
    mean_BhwD = torch.where(weight > 0, x_BThwD, 0).sum(1) / weight.sum(1).clamp_min(1)
    return _under(mean_BhwD, cells), _under(ok_BThw.any(1), cells)


def _under(x_Bhw: Tensor, cells: tuple[int, int]) -> Tensor:
    for dim, (count, there) in enumerate(zip(cells, x_Bhw.shape[1:3]), start=1):
        if count != there:
            place = (2 * torch.arange(count, device=x_Bhw.device) + 1) * there // (2 * count)
            x_Bhw = x_Bhw.index_select(dim, place)
    return x_Bhw


def cell_validity(valid_BTHW: Tensor, cells: tuple[int, int]) -> Tensor:
    """bool [B, h, w]: any valid pixel of any date lies in the cell."""
    return F.adaptive_max_pool2d(valid_BTHW.any(1)[:, None].float(), cells)[:, 0] > 0


def cell_statistics(part: ModalityView, cells: tuple[int, int], texture: bool) -> Tensor:
    """[B, h, w, Q] of normalised pixels, see the head of this file; meaningless where `cell_validity` is false.

    A cell whose side is no whole number of pixels takes every pixel that it touches.
    """
    ok_BTHW1 = part.valid_BTHW[..., None].to(part.x_BTCHW.dtype)
    x_BTHWC = torch.where(ok_BTHW1 > 0, part.x_BTCHW.permute(0, 1, 3, 4, 2), 0)
    count = ok_BTHW1.sum(1)
    mean = _pool(x_BTHWC.sum(1), count, cells)
    square = _pool(x_BTHWC.square().sum(1), count, cells)
    found = [mean, (square - mean.square()).clamp_min(0).add(VARIANCE_FLOOR).sqrt()]
    if texture:
        for dim in (3, 2):
            number = x_BTHWC.shape[dim] - 1
            both = ok_BTHW1.narrow(dim, 0, number) * ok_BTHW1.narrow(dim, 1, number)
            step = (x_BTHWC.narrow(dim, 0, number) - x_BTHWC.narrow(dim, 1, number)).abs() * both
            found.append(_pool(step.sum(1), both.sum(1), cells))
    return torch.cat(found, -1)


def _pool(total_BHWC: Tensor, count_BHW1: Tensor, cells: tuple[int, int]) -> Tensor:
    def mean(x_BHWC: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x_BHWC.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1)

    return mean(total_BHWC) / mean(count_BHW1).clamp_min(1e-6)


class Restore(nn.Module):
    """One small head per source (sensors and fused), each for all sensors' targets."""

    def __init__(self, model: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.targets = restore_targets(model)
        dims = {**dict.fromkeys(model.modalities, model.dims[3]), "fused": model.fusion_dim}
        self.heads = nn.ModuleDict(
            {source: mlp(dim, hidden, sum(self.targets.values())) for source, dim in dims.items()}
        )

    def valid(self, whole: View, tokens: dict[str, Tensor], fused_Bhw: Tensor) -> dict[str, Tensor]:
        """bool [B, h, w] by `source/target`: the student has a token there and the target sensor a pixel.

        tokens: validity of the student's tokens per sensor, [B, T, h, w].
        """
        cells = (fused_Bhw.shape[1], fused_Bhw.shape[2])
        there = {name: cell_validity(whole.modalities[name].valid_BTHW, cells) for name in self.targets}
        sources = {name: _under(tokens[name].any(1), cells) for name in self.targets} | {"fused": fused_Bhw}
        return {f"{s}/{t}": sources[s] & there[t] for s in self.heads for t in self.targets}

    def forward(
        self, whole: View, u: Features, valid: dict[str, Tensor], scale: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Smooth L1 per source, summed over target sensors; each pair a mean over its valid cells and numbers.

        whole: normalised. valid: see `valid`. scale: W·A/N of each pair (`losses.reduce`).
        """
        cells = (u.fused_valid.shape[1], u.fused_valid.shape[2])
        with torch.no_grad():
            aims = {t: cell_statistics(whole.modalities[t], cells, not MODALITIES[t].is_series) for t in self.targets}
        found = {}
        for source, head in self.heads.items():
            if source == "fused":
                x_BhwD = torch.where(u.fused_valid[..., None], u.fused, 0)
            else:
                x_BhwD, _ = on_cells(u.dense[source], u.dense_valid[source], cells)
            loss_dtype = work_dtype(x_BhwD)
            parts = apply_head(head, x_BhwD).split(list(self.targets.values()), -1)
            total: Tensor = x_BhwD.new_zeros((), dtype=loss_dtype)
            for t, y_BhwQ in zip(self.targets, parts):
                off_Bhw = F.smooth_l1_loss(y_BhwQ.to(loss_dtype), aims[t].to(loss_dtype), reduction="none").mean(-1)
                ok_Bhw = valid[f"{source}/{t}"]
                total = total + torch.where(ok_Bhw, off_Bhw, 0).sum() * scale[f"{source}/{t}"].to(off_Bhw.dtype)
            found[source] = total
        return found
