"""What a user gets for nothing: statistics of the very pixels that a probe's network sees, put through the same classifiers.

Per modality and band over the valid pixels of all dates of the view: mean, standard deviation, 10th and 90th percentile; for an image
without series (hr) also the mean absolute difference of neighbours, horizontally and vertically, at lags 1 and 2, mean over the bands.
They are taken of *normalised* pixels, as the network gets them; the classifiers standardise each feature, so raw pixels would give the
same scores (but for normalisation's clip at ±10 standard deviations). A backbone that does not beat this is of no worth.

Dimension legend: B sites · T dates · C bands · H, W canvas pixels · P label pixels · N pixels of one statistic · F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_prep.schema import MODALITIES
from model.batch import ModalityView, View
from pipeline.probes.features import pick_pixels

QUANTILES = (0.1, 0.9)
LAGS = (1, 2)


def describe_pixels(view: View, labels_BHW: Tensor | None, num_pixels: int) -> dict[str, Tensor]:
    """A `pipeline.probes.features.Describer`: pixel statistics per site and, with labels, per label pixel over the pixels under it."""
    out: dict[str, Tensor] = {}
    picked = None if labels_BHW is None else pick_pixels(labels_BHW, num_pixels)
    if labels_BHW is not None and picked is not None:
        out["classes"] = labels_BHW.flatten(1)[:, picked.to(labels_BHW.device)].cpu()
    for name, part in view.modalities.items():
        out[f"pooled:{name}"] = site_statistics(name, part).cpu()
        out[f"present:{name}"] = part.valid_BTHW.flatten(1).any(1).cpu()
        if labels_BHW is not None and picked is not None:
            x_BPF, ok_BP = pixel_statistics(part, picked, (labels_BHW.shape[1], labels_BHW.shape[2]))
            out[f"pixels:{name}"], out[f"valid:{name}"] = x_BPF.half().cpu(), ok_BP.cpu()
    return out


def site_statistics(name: str, part: ModalityView) -> Tensor:
    """float32 [B, F]; zero where a site has no valid pixel."""
    rows = []
    for x_TCHW, ok_THW in zip(part.x_BTCHW.float(), part.valid_BTHW):  # site by site: their pixels are sorted
        x_CN = x_TCHW.transpose(0, 1).flatten(1)
        found = [masked_statistics(x_CN, ok_THW.flatten()[None].expand(x_CN.shape))]
        if not MODALITIES[name].is_series:
            found.append(texture(x_TCHW, ok_THW))
        rows.append(torch.cat(found))
    return torch.stack(rows)


def masked_statistics(x_XN: Tensor, ok_XN: Tensor) -> Tensor:
    """[4 · X]: means, standard deviations and the two percentiles of each row's valid values; zero for a row without any.

    Percentiles are interpolated linearly between order statistics, as numpy does.
    """
    count_X = ok_XN.sum(-1)
    n_X = count_X.clamp_min(1)
    x_XN = torch.where(ok_XN, x_XN, 0.0)
    mean_X = x_XN.sum(-1) / n_X
    std_X = (torch.where(ok_XN, x_XN - mean_X[:, None], 0.0).square().sum(-1) / n_X).sqrt()
    ordered_XN = torch.where(ok_XN, x_XN, torch.inf).sort(-1).values
    parts = [mean_X, std_X]
    for q in QUANTILES:
        place_X = q * (n_X - 1).double()
        low_X = place_X.floor().long()
        a, b = (ordered_XN.gather(-1, at[:, None])[:, 0] for at in (low_X, torch.minimum(low_X + 1, n_X - 1)))
        parts.append(torch.where(count_X > 0, a + (place_X - low_X).to(a.dtype) * (b - a), 0.0))
    return torch.cat(parts)


def texture(x_TCHW: Tensor, ok_THW: Tensor) -> Tensor:
    """[4]: mean absolute difference of valid pixels to their right and lower neighbours, at lags 1 and 2."""
    found = []
    for lag in LAGS:
        for dim in (-1, -2):
            size = x_TCHW.shape[dim] - lag
            if size < 1:
                found.append(x_TCHW.new_zeros(()))
                continue
            ok = ok_THW.narrow(dim, lag, size) & ok_THW.narrow(dim, 0, size)
            step = (x_TCHW.narrow(dim, lag, size) - x_TCHW.narrow(dim, 0, size)).abs()
            total = torch.where(ok[:, None], step, 0.0).sum()
            found.append(total / (ok.sum() * x_TCHW.shape[1]).clamp_min(1))
    return torch.stack(found)


def pixel_statistics(part: ModalityView, picked_P: Tensor, label_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """float32 [B, P, F] and validity [B, P]: statistics of the pixels under each label pixel, over all dates (at least one pixel)."""
    canvas = part.valid_BTHW.shape[2:]
    places = (picked_P // label_hw[1], picked_P % label_hw[1])
    spans = []
    for at, size, pixels in zip(places, label_hw, canvas):
        width = max(1, round(pixels / size))
        first = ((at.double() + 0.5) * pixels / size - width / 2).round().long().clamp(0, pixels - width)
        spans.append((first[:, None] + torch.arange(width)).to(part.x_BTCHW.device))
    rows, columns = spans[0][:, :, None], spans[1][:, None, :]
    found, valid = [], []
    for x_TCHW, ok_THW in zip(part.x_BTCHW.float(), part.valid_BTHW):
        x_CPN = x_TCHW[:, :, rows, columns].permute(1, 2, 0, 3, 4).flatten(2)
        ok_PN = ok_THW[:, rows, columns].permute(1, 0, 2, 3).flatten(1)
        flat = masked_statistics(x_CPN.flatten(0, 1), ok_PN.repeat(len(x_CPN), 1))
        found.append(flat.unflatten(0, (4 * len(x_CPN), len(picked_P))).T)
        valid.append(ok_PN.any(1))
    return torch.stack(found), torch.stack(valid)
