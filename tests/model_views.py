"""Small views of random pixels for tests of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from data_prep.schema import MODALITIES
from model.batch import ModalityView, View


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
