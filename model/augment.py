"""Photometric augmentation on the device: parameters are drawn by the reader (keyed by sample), applied here.

hr: colour jitter, blur, solarize, grayscale. Series are measurements and keep their bands' ratios and their course over the year: at
most one gain per view for s2 and one offset in dB for s1, the size of what calibration and atmosphere leave (`data.series_jitter`).

Pure, vectorised over the batch, deterministic. Invalid pixels neither change nor leak into their neighbours.

Legend: B sites · P parameters · C bands · H, W canvas.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import View

# Columns of `View.photometric_BP`, in the order in which they are applied, and the values that change nothing.
PHOTOMETRIC = (
    "brightness", "contrast", "saturation", "hue", "blur_sigma", "solarize_threshold", "grayscale", "s2_gain", "s1_offset_db",
)  # fmt: skip
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0)
LUMA = (0.299, 0.587, 0.114)
BLUR_RADIUS = 6  # pixels: 3 sigma of DINO's strongest blur (sigma 2)
FULL_SCALE = 255.0


def photometric(view: View) -> View:
    """The view with its pixels changed as `photometric_BP` says.

    hr, on x/255 in [0, 1]: brightness × factor; contrast: mix with the mean luma of valid pixels; saturation: mix with
    each pixel's luma; hue: rotation by `hue` turns in the YIQ chroma plane (linear, so it vectorises; HSV differs slightly);
    grayscale 1: luma in all bands; blur: Gaussian of `blur_sigma` px, 0 = none; solarize: values >= threshold become 1 − x.
    Clamped to [0, 1] after the colour steps. Returns hr as float32 on the 0-255 scale. Bands past R G B take brightness,
    contrast, blur and solarize only. s2 × gain, s1 + offset, as float32.
    """
    if view.photometric_BP.shape[-1] != len(PHOTOMETRIC):
        raise ValueError(
            f"photometric_BP has {view.photometric_BP.shape[-1]} columns, expected {len(PHOTOMETRIC)}: {PHOTOMETRIC}"
        )
    changed = dict(view.modalities)
    hr = view.modalities.get("hr")
    if hr is not None:
        x_BCHW = apply_photometric(hr.x_BTCHW[:, 0].float() / FULL_SCALE, hr.valid_BTHW[:, 0], view.photometric_BP)
        changed["hr"] = replace(hr, x_BTCHW=x_BCHW[:, None] * FULL_SCALE)
    for name, column in (("s2", "s2_gain"), ("s1", "s1_offset_db")):
        part = view.modalities.get(name)
        if part is not None:
            amount = view.photometric_BP[:, PHOTOMETRIC.index(column), None, None, None, None]
            x_BTCHW = part.x_BTCHW.float()
            changed[name] = replace(part, x_BTCHW=x_BTCHW * amount if name == "s2" else x_BTCHW + amount)
    return replace(view, modalities=changed)


def apply_photometric(x_BCHW: Tensor, valid_BHW: Tensor, parameters_BP: Tensor) -> Tensor:
    """All steps on values in [0, 1]; see `photometric`. A row of NEUTRAL leaves values in [0, 1] unchanged."""
    column = {name: parameters_BP[:, i, None].to(x_BCHW.dtype) for i, name in enumerate(PHOTOMETRIC)}
    valid_B1HW = valid_BHW[:, None]
    x_BCHW = torch.where(valid_B1HW, x_BCHW, 0.0)
    gain_B1 = column["brightness"] * column["contrast"]
    luma_B1 = (x_BCHW.sum((2, 3)) * _luma_weights(x_BCHW.shape[1], x_BCHW.device)).sum(1, keepdim=True)
    mean_B1 = column["brightness"] * luma_B1 / valid_BHW.sum((1, 2))[:, None].clamp_min(1)
    offset_B111 = ((1.0 - column["contrast"]) * mean_B1)[..., None, None]
    parts = []
    if x_BCHW.shape[1] >= 3:
        # by hand, not a matrix product: TensorFloat-32 would round pixels to ten bits
        matrix_B33 = gain_B1[..., None] * _colour_matrix(column["saturation"], column["hue"], column["grayscale"])
        rgb: Tensor = offset_B111
        for source, to_B3 in zip(x_BCHW.split(1, dim=1), matrix_B33.unbind(-1)):
            rgb = torch.addcmul(rgb, to_B3[..., None, None], source)
        parts, x_BCHW = [rgb], x_BCHW[:, 3:]
    if x_BCHW.shape[1]:
        parts.append(torch.addcmul(offset_B111, gain_B1[..., None, None], x_BCHW))
    x_BCHW = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    x_BCHW = torch.where(valid_B1HW, x_BCHW.clamp(0.0, 1.0), 0.0)
    x_BCHW = _blur(x_BCHW, valid_B1HW, column["blur_sigma"][:, 0])
    x_BCHW = torch.where(x_BCHW >= column["solarize_threshold"][..., None, None], 1.0 - x_BCHW, x_BCHW)
    return torch.where(valid_B1HW, x_BCHW, 0.0)


def _colour_matrix(saturation_B1: Tensor, turns_B1: Tensor, grayscale_B1: Tensor) -> Tensor:
    """Saturation, hue and grayscale as one matrix, [B, 3, 3]; exactly the identity for neutral values.

    All three keep grey as it is and (hue, saturation) luma too, so with J = "luma in all bands" and H the turn of the chroma plane
    H·(s·1 + (1 − s)·J) = s·H + (1 − s)·J, and grayscale after it is J.
    """
    one_33, luma_33, keep_33, even_33, odd_33 = _colour_parts(saturation_B1.device)
    angle_B11 = turns_B1[..., None].to(torch.float64) * 2 * torch.pi
    turn_B33 = torch.where(angle_B11 == 0, one_33, keep_33 + angle_B11.cos() * even_33 + angle_B11.sin() * odd_33)
    colour_B33 = torch.lerp(luma_33, turn_B33, saturation_B1[..., None].to(torch.float64))
    return torch.where(grayscale_B1[..., None] > 0.5, luma_33, colour_B33).to(saturation_B1.dtype)


@functools.lru_cache(maxsize=16)
def _colour_parts(device: torch.device) -> tuple[Tensor, ...]:
    """float64 [3, 3] each: identity; luma in all bands; and three of which the turn of YIQ's chroma plane by an angle is constant +
    cos · even + sin · odd. Made once."""
    to_yiq = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    back = np.linalg.inv(to_yiq)
    y, i, q = ((back[:, k, None], to_yiq[None, k]) for k in range(3))
    parts = (np.eye(3), np.tile(LUMA, (3, 1)), y[0] * y[1], i[0] * i[1] + q[0] * q[1], q[0] * i[1] - i[0] * q[1])
    with torch.inference_mode(False):  # what inference makes first, training must be able to use
        return tuple(torch.from_numpy(part).to(device) for part in parts)


@functools.lru_cache(maxsize=16)
def _luma_weights(bands: int, device: torch.device) -> Tensor:
    """float32 [C]: luma of R G B, whatever bands follow; the mean of fewer than three."""
    weights = [*LUMA, *[0.0] * (bands - 3)] if bands >= 3 else [1 / bands] * bands
    with torch.inference_mode(False):
        return torch.tensor(weights, device=device)


def _blur(x_BCHW: Tensor, valid_B1HW: Tensor, sigma_B: Tensor) -> Tensor:
    """Separable Gaussian per sample, normalised over valid pixels so that nodata does not darken its neighbours."""
    B, C = x_BCHW.shape[:2]
    offset_S = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x_BCHW.device, dtype=x_BCHW.dtype)
    kernel_BS = torch.exp(-0.5 * (offset_S / sigma_B[:, None].clamp_min(1e-3)) ** 2)
    kernel_BS = kernel_BS / kernel_BS.sum(dim=1, keepdim=True)
    stacked = torch.cat([x_BCHW, valid_B1HW.to(x_BCHW.dtype)], dim=1).reshape(1, B * (C + 1), *x_BCHW.shape[2:])
    kernel = kernel_BS.repeat_interleave(C + 1, dim=0)
    for shape, padding in (((1, -1), (0, BLUR_RADIUS)), ((-1, 1), (BLUR_RADIUS, 0))):
        stacked = F.conv2d(
            stacked,
            kernel.reshape(B * (C + 1), 1, *_shape(shape, kernel.shape[1])),
            padding=padding,
            groups=B * (C + 1),
        )
    stacked = stacked.reshape(B, C + 1, *x_BCHW.shape[2:])
    blurred = (stacked[:, :C] / stacked[:, C:].clamp_min(1e-6)).clamp(0.0, 1.0)
    return torch.where(sigma_B[:, None, None, None] > 0, blurred, x_BCHW)


def _shape(shape: tuple[int, int], taps: int) -> tuple[int, int]:
    return (1, taps) if shape[0] == 1 else (taps, 1)
