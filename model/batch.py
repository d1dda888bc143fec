"""What the reader hands to the model: views of sites as tensors, with validity and geometry.

Dimension legend: B sites · T dates · C bands · H, W pixel rows, columns of the canvas · P parameters.
Shapes are fixed per view kind; whatever does not exist (nodata, cloud, outside the site, absent date, absent modality) is
invalid in `valid_BTHW`, and its pixel values mean nothing (they may be NaN).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class ModalityView:
    """One modality of one view.

    Attributes:
        x_BTCHW: stored dtype (uint8, uint16, float16) as read, float32 after `model.inputs.normalise`. hr has T = 1.
        valid_BTHW: bool, true where the pixel is CLEAR.
        doy_BT: int16 day of year 1-366; 0 where the date is absent or unknown.
        gsd_B: float32, metres per canvas pixel.
        affine_B23: float64, (column, row) on the canvas (pixel centres at +0.5) → site metres (east of the west edge,
            south of the north edge). Holds crop, resize and flips/rotations; the ground truth of correspondence.
    """

    x_BTCHW: Tensor
    valid_BTHW: Tensor
    doy_BT: Tensor
    gsd_B: Tensor
    affine_B23: Tensor


@dataclass
class View:
    """One view (crop of the ground) of B sites. All modalities cover the same ground square.

    Attributes:
        modalities: every configured modality, in config order, present or not (then nothing is valid): ranks must agree
            on the number of collectives.
        photometric_BP: float32 parameters of hr colour augmentation (columns named in `model.augment.PHOTOMETRIC`).
        classes_BHW: int16 dense class labels on the 10 m canvas of this view, -1 unlabelled; None if the set has none.
        side_m_B: float32 side of the ground square, metres.
    """

    modalities: dict[str, ModalityView]
    photometric_BP: Tensor
    classes_BHW: Tensor | None
    side_m_B: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> View:
        """The same view with every tensor on `device`."""
        return _map(self, lambda t: t.to(device, non_blocking=non_blocking))


@dataclass
class Batch:
    """Student view u, teacher view v (both global) and the local views, of the same B sites.

    Attributes:
        keys: sample keys, for error messages.
        position_B: int64 global sample number in the epoch's order.
        scene_B: int64 scalar scene label, -1 unlabelled (probes only; never seen by a pretraining loss).
        lonlat_B2: float64 centre of the site in WGS84 degrees.
    """

    u: View
    v: View
    local: list[View]
    keys: list[str]
    position_B: Tensor
    scene_B: Tensor
    lonlat_B2: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with every tensor on `device`."""
        return _map(self, lambda t: t.to(device, non_blocking=non_blocking))

    def part(self, start: int, stop: int) -> Batch:
        """Sites [start, stop) as a batch of their own (a micro-batch); tensors share memory with this one."""
        cut = _map(self, lambda t: t[start:stop])
        return replace(cut, keys=self.keys[start:stop])


def _map(value: Any, move: Any) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, ModalityView | View | Batch):
        return replace(value, **{f.name: _map(getattr(value, f.name), move) for f in fields(value)})
    if isinstance(value, dict):
        return {key: _map(item, move) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, move) for item in value]
    return value
