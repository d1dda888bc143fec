"""The share of the nominal work that a batch really asks for: absent images, cloudy tokens and empty cells are not computed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from data_prep.schema import MODALITIES
from model.batch import View
from model.config import ModelConfig
from model.counts import fusion_flops, image_flops
from model.skysense import Features


@torch.no_grad()
def useful_share(cfg: ModelConfig, views: Sequence[View], features: Sequence[Features]) -> Tensor:
    """FLOPs on valid tokens over FLOPs with everything valid, of backbone and fusion; float64 scalar. A sensor's part counts by its
    share of valid final tokens, the fusion's by that of valid tokens and places. Canvases are taken as square.
    """
    device = features[0].fused_valid.device
    done, nominal = torch.zeros((), dtype=torch.float64, device=device), 0.0
    for view, found in zip(views, features):
        sides, dates, tokens = {}, {}, 0
        seen = found.fused_valid.sum()
        for name, valid_BThw in found.dense_valid.items():
            sides[name], dates[name] = view.modalities[name].valid_BTHW.shape[-1], valid_BThw.shape[1]
            work = float(dates[name] * sum(image_flops(cfg, name, sides[name]).values()))
            done = done + work * valid_BThw.double().mean()
            nominal += work
            seen, tokens = seen + valid_BThw.sum(), tokens + valid_BThw.numel()
        series = [name for name in sides if MODALITIES[name].is_series]
        size = SimpleNamespace(
            hr_px=next((sides[n] for n in sides if n not in series), 0), series_px=next((sides[n] for n in series), 0),
            **{f"{name}_dates": dates[name] for name in series},
        )  # fmt: skip
        fusion = float(fusion_flops(cfg, size))
        done = done + fusion * (seen.double() / (tokens + found.fused_valid.numel()))
        nominal += fusion
    return done / nominal
