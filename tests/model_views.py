"""Small views of random pixels for tests of the model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_prep.schema import MODALITIES
from model.backbone import Images
from model.batch import ModalityView, View
from model.config import ModelConfig
from model.plan import Transition, WindowPlan, halve, number_rows, plan_transition, plan_windows


def random_view(
    sites: int = 2,
    hr: int | tuple[int, int] = 64,
    series: int | tuple[int, int] = 16,
    s2_dates: int = 3,
    s1_dates: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    modalities: tuple[str, ...] = ("hr", "s2", "s1"),
) -> View:
    """Everything present and valid; the ground side follows from the series canvas at 10 m."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    side_m = 10.0 * (series if isinstance(series, int) else series[1])
    for name in modalities:
        dates = {"hr": 1, "s2": s2_dates, "s1": s1_dates}[name]
        rows, columns = _sides(hr if name == "hr" else series)
        x = torch.randn(sites, dates, len(MODALITIES[name].bands), rows, columns, generator=generator, dtype=dtype)
        parts[name] = ModalityView(
            x,
            torch.ones(sites, dates, rows, columns, dtype=torch.bool),
            torch.randint(1, 367, (sites, dates), generator=generator).to(torch.int16),
            torch.full((sites,), side_m / columns),
            torch.eye(2, 3, dtype=torch.float64).expand(sites, 2, 3),
        )
    return View(parts, torch.zeros(sites, 1), None, torch.full((sites,), side_m))


def _sides(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Weights far from their initial values (biases, norms and scales too), so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise: Tensor = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(std * noise)
    return module


def window_plans(valid_NHW: Tensor, window: int) -> tuple[WindowPlan, WindowPlan]:
    """Unshifted and shifted windows of the valid tokens of one grid, packed in their order."""
    grids = number_rows([valid_NHW.numpy()])
    first, second = (plan_windows(window, grids, shift, torch.device("cpu")) for shift in (0, window // 2))
    return first, second


def transition(valid_NHW: Tensor, merge: bool) -> tuple[Transition, Tensor]:
    """From the valid tokens of one grid to those of the next stage, and these as a mask."""
    valid = valid_NHW.numpy()
    after = halve(valid) if merge else valid
    grids = [number_rows([grid]) for grid in (valid, after)]
    plan = plan_transition([merge], *grids, int(np.sum(valid)), torch.device("cpu"))
    return plan, torch.from_numpy(after)


def images_of(cfg: ModelConfig, modality: str, part: ModalityView) -> Images:
    """The first date of every site."""
    return Images(modality, part.x_BTCHW[:, 0], part.valid_BTHW[:, 0], part.gsd_B, None, cfg.merges(modality))
