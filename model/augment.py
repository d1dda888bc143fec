"""Photometric augmentation on the device: parameters are drawn by the reader (keyed by sample), applied here.

hr: colour jitter, blur, solarize, grayscale. Series are measurements and keep their bands' ratios and their course over the year: at
most one gain per view for s2 and one offset in dB for s1, the size of what calibration and atmosphere leave (`data.series_jitter`).

Pure, vectorised over the batch, deterministic. Invalid pixels neither change nor leak into their neighbours.

Legend: B sites · P parameters · C bands · H, W canvas.
"""

from __future__ import annotations

from dataclasses import replace

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
    column = {name: parameters_BP[:, i, None, None, None].to(x_BCHW.dtype) for i, name in enumerate(PHOTOMETRIC)}
    valid_B1HW = valid_BHW[:, None]
    x_BCHW = torch.where(valid_B1HW, x_BCHW, 0.0)
    x_BCHW = x_BCHW * column["brightness"]
    luma_B1HW = _luma(x_BCHW)
    pixels_B111 = valid_B1HW.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    mean_B111 = torch.where(valid_B1HW, luma_B1HW, 0.0).sum(dim=(2, 3), keepdim=True) / pixels_B111
    x_BCHW = _mix(mean_B111, x_BCHW, column["contrast"])
    if x_BCHW.shape[1] >= 3:
        rgb, rest = x_BCHW[:, :3], x_BCHW[:, 3:]
        rgb = _mix(_luma(rgb), rgb, column["saturation"])
        rgb = _rotate_hue(rgb, column["hue"])
        rgb = torch.where(column["grayscale"] > 0.5, _luma(rgb).expand_as(rgb), rgb)
        x_BCHW = torch.cat([rgb, rest], dim=1)
    x_BCHW = torch.where(valid_B1HW, x_BCHW.clamp(0.0, 1.0), 0.0)
    x_BCHW = _blur(x_BCHW, valid_B1HW, column["blur_sigma"][:, 0, 0, 0])
    x_BCHW = torch.where(x_BCHW >= column["solarize_threshold"], 1.0 - x_BCHW, x_BCHW)
    return torch.where(valid_B1HW, x_BCHW, 0.0)


def _mix(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """a + factor · (b − a), exactly b at factor 1."""
    return torch.where(factor == 1.0, b, a + factor * (b - a))


def _luma(x_BCHW: Tensor) -> Tensor:
    if x_BCHW.shape[1] < 3:
        return x_BCHW.mean(dim=1, keepdim=True)
    weight = torch.tensor(LUMA, dtype=x_BCHW.dtype, device=x_BCHW.device)
    return (x_BCHW[:, :3] * weight[:, None, None]).sum(dim=1, keepdim=True)


def _rotate_hue(rgb_B3HW: Tensor, turns_B111: Tensor) -> Tensor:
    """Keeps luma, turns the chroma plane by 2π·turns (YIQ)."""
    to_yiq = torch.tensor(
        [LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], dtype=torch.float64, device=rgb_B3HW.device
    )
    angle_B = turns_B111[:, 0, 0, 0].to(torch.float64) * 2 * torch.pi
    turn_B33 = torch.zeros(len(angle_B), 3, 3, dtype=torch.float64, device=rgb_B3HW.device)
    turn_B33[:, 0, 0] = 1
    turn_B33[:, 1, 1] = turn_B33[:, 2, 2] = angle_B.cos()
    turn_B33[:, 1, 2], turn_B33[:, 2, 1] = -angle_B.sin(), angle_B.sin()
    matrix_B33 = (torch.linalg.inv(to_yiq) @ turn_B33 @ to_yiq).to(rgb_B3HW.dtype)
    turned = torch.einsum("bij,bjhw->bihw", matrix_B33, rgb_B3HW)
    return torch.where(turns_B111 == 0, rgb_B3HW, turned)


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
