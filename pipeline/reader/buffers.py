"""Batches as re-used memory: tensors for the model over numpy arrays for the threads that fill them.

Writing into memory that was used before is many times faster than into fresh pages, and it bounds what a reader holds:
`prefetch + hold` batches, no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data_prep.schema import MODALITIES
from model.batch import Batch, ModalityView, View
from pipeline.config import ViewConfig
from pipeline.reader.views import PHOTOMETRIC, dates_wanted


@dataclasses.dataclass
class ModalityArrays:
    """The numpy side of a `ModalityView`, same memory."""

    x_BTCHW: np.ndarray
    valid_BTHW: np.ndarray
    doy_BT: np.ndarray
    gsd_B: np.ndarray
    affine_B23: np.ndarray


@dataclasses.dataclass
class ViewArrays:
    """The numpy side of a `View`, same memory."""

    modalities: dict[str, ModalityArrays]
    photometric_BP: np.ndarray
    classes_BHW: np.ndarray | None
    side_m_B: np.ndarray


class BatchBuffers:
    """Memory of one batch of B sites.

    Args:
        views: config of each view, in order u, v, local …; or a single one, then u and v are the same view.
        modalities: in config order.
        labelled: whether views carry `classes_BHW`.
        pinned: page-locked memory, for copies to a CUDA device that do not block.
    """

    def __init__(
        self, batch: int, views: list[ViewConfig], modalities: tuple[str, ...], labelled: bool, pinned: bool = False
    ) -> None:
        self._views = [_view(batch, view, modalities, labelled, pinned) for view in views]
        self._position, self._scene = torch.full((batch,), -1), torch.full((batch,), -1)
        self._lonlat = torch.zeros(batch, 2, dtype=torch.float64)
        if pinned:
            self._position, self._scene, self._lonlat = (
                t.pin_memory() for t in (self._position, self._scene, self._lonlat)
            )
        self.views = [_arrays(view) for view in self._views]
        self.position_B, self.scene_B, self.lonlat_B2 = (
            self._position.numpy(),
            self._scene.numpy(),
            self._lonlat.numpy(),
        )
        self.keys = [""] * batch
        self.filled = 0  # rows that hold samples
        self.copied: torch.cuda.Event | None = None  # set when a copy to the device may still be reading this memory

    def batch(self) -> Batch:
        """The tensors as a `Batch`; valid until the buffers are filled again."""
        views = self._views
        u, v = views[0], views[1] if len(views) > 1 else views[0]
        return Batch(u, v, views[2:], list(self.keys), self._position, self._scene, self._lonlat)

    @property
    def num_bytes(self) -> int:
        arrays = [a for view in self.views for m in view.modalities.values() for a in vars(m).values()]
        return sum(a.nbytes for a in arrays) + sum(
            v.classes_BHW.nbytes for v in self.views if v.classes_BHW is not None
        )

    def blank(self, i: int) -> None:
        """Row i without content: everything invalid."""
        for view in self.views:
            for m in view.modalities.values():
                blank_modality(m, i)
            view.photometric_BP[i], view.side_m_B[i] = 0, 0
            if view.classes_BHW is not None:
                view.classes_BHW[i] = -1
        self.position_B[i], self.scene_B[i], self.lonlat_B2[i], self.keys[i] = -1, -1, 0, ""


def blank_modality(m: ModalityArrays, i: int) -> None:
    """Row i of one modality: zeros, invalid, no dates. gsd 1 and a zero affine keep divisions finite."""
    m.x_BTCHW[i], m.valid_BTHW[i], m.doy_BT[i], m.gsd_B[i], m.affine_B23[i] = 0, False, 0, 1, 0


def canvas_px(view: ViewConfig, modality: str) -> int:
    """Canvas side of a modality in pixels."""
    return view.series_px if MODALITIES[modality].is_series else view.hr_px


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a batch."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Batch | View | ModalityView):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def _view(batch: int, view: ViewConfig, modalities: tuple[str, ...], labelled: bool, pinned: bool) -> View:
    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, pin_memory=pinned)

    parts = {}
    for name in modalities:
        spec, dates, side = MODALITIES[name], dates_wanted(view, name), canvas_px(view, name)
        dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
        parts[name] = ModalityView(
            empty(dates, len(spec.bands), side, side, dtype=dtype), empty(dates, side, side, dtype=torch.bool),
            empty(dates, dtype=torch.int16), empty(dtype=torch.float32), empty(2, 3, dtype=torch.float64),
        )  # fmt: skip
    classes = empty(view.series_px, view.series_px, dtype=torch.int16) if labelled else None
    return View(parts, empty(len(PHOTOMETRIC), dtype=torch.float32), classes, empty(dtype=torch.float32))


def _arrays(view: View) -> ViewArrays:
    parts = {
        name: ModalityArrays(
            m.x_BTCHW.numpy(), m.valid_BTHW.numpy(), m.doy_BT.numpy(), m.gsd_B.numpy(), m.affine_B23.numpy()
        )
        for name, m in view.modalities.items()
    }
    classes = None if view.classes_BHW is None else view.classes_BHW.numpy()
    return ViewArrays(parts, view.photometric_BP.numpy(), classes, view.side_m_B.numpy())
