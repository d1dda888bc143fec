"""A pretrained SkySense as a plain `torch.nn.Module`: one import, one file, no DeepSpeed, no MLflow.

    from model.pretrained import load_backbone
    model = load_backbone("moe.safetensors")
    features = model({"s2": s2_BTCHW, "s1": s1_BTCHW}, doy={"s2": doy_BT})   # what is missing is simply not given
    maps = model.pyramid("hr", rgb_BCHW, gsd_m=0.2)                          # four feature maps for a segmentation head

Inputs are numbers as sensors store them (hr 0-255; s2 reflectance x 10000 with the offset removed, 0 = nodata; s1 dB, NaN =
nodata); the statistics they are normalised with lie in the file. Dimension legend: B sites · T dates · C bands · H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.config import from_dict, to_dict
from cluster.errors import UsageError
from data_prep.schema import MODALITIES
from model.backbone import Images
from model.batch import ModalityView, View
from model.config import ModelConfig
from model.inputs import normalise
from model.skysense import Features, SkySense

FORMAT = "geoloom-backbone-1"


class Pretrained(nn.Module):
    """Backbone and fusion with the statistics of their training data. A whole module: fine-tune it, freeze it, move it.

    Attributes:
        skysense: the network.
        statistics: per modality `mean` and `std` per band.
        facts: where it comes from (run, step, samples seen, manifest hash).
    """

    def __init__(
        self, cfg: ModelConfig, statistics: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any] | None = None
    ):
        super().__init__()
        self.skysense = SkySense(cfg)
        self.statistics = {name: dict(values) for name, values in statistics.items()}
        self.facts = dict(facts or {})

    @classmethod
    def around(
        cls, skysense: SkySense, statistics: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any] | None = None
    ) -> Pretrained:
        """Around a network that there is already: its weights are shared, none are made."""
        with torch.device("meta"):
            model = cls(skysense.cfg, statistics, facts)
        model.skysense = skysense
        return model

    @property
    def cfg(self) -> ModelConfig:
        return self.skysense.cfg

    @property
    def pyramid_dims(self) -> list[int]:
        """Channels of the four maps of `pyramid`."""
        return list(self.cfg.dims)

    @property
    def fused_dim(self) -> int:
        return self.cfg.fusion_dim

    def forward(
        self,
        images: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
        doy: Mapping[str, Tensor] | None = None,
        gsd_m: Mapping[str, float] | None = None,
    ) -> Features:
        """Features of sites seen by any of the modalities; all images of a site cover the same ground square.

        Args:
            images: by modality, [B, T, C, H, W], or [B, C, H, W] for one date. Any size, also smaller than a window.
            valid: bool [B, T, H, W]; default: s2 not 0, s1 not NaN, hr everywhere.
            doy: day of year [B, T], 0 = unknown (the default).
            gsd_m: metres per pixel; default: the sensor's nominal one.

        Raises:
            UsageError: a modality this model was not trained on, or another number of bands.
        """
        return self.skysense(self.view(images, valid, doy, gsd_m))

    def pyramid(
        self,
        modality: str,
        images_BCHW: Tensor,
        valid_BHW: Tensor | None = None,
        gsd_m: float | None = None,
        merges: tuple[bool, bool, bool] | None = None,
    ) -> list[Tensor]:
        """Four maps [B, D, h, w] of one modality, fine to coarse (invalid tokens are zero), for FPN or UPerNet heads.

        merges: whether to halve the grid at the three transitions; default as trained. (False, False, False) keeps `hr` at
        full token resolution, which the paper found better for segmentation.
        """
        part = self._modality(modality, images_BCHW, valid_BHW, None, gsd_m)
        view = normalise(View({modality: part}, part.gsd_B.new_zeros(0), None, part.gsd_B), self.statistics)
        x, ok = view.modalities[modality].x_BTCHW, view.modalities[modality].valid_BTHW
        merges = self.cfg.merges(modality) if merges is None else merges
        gsd_N = part.gsd_B.repeat_interleave(ok.shape[1])
        images = Images(modality, x.flatten(0, 1), ok.flatten(0, 1), gsd_N, None, merges)
        [tokens] = self.skysense.backbone([images], pyramid=True)
        return [level.permute(0, 3, 1, 2).contiguous() for level, _ in tokens.pyramid]

    def view(
        self,
        images: Mapping[str, Tensor],
        valid: Mapping[str, Tensor] | None = None,
        doy: Mapping[str, Tensor] | None = None,
        gsd_m: Mapping[str, float] | None = None,
    ) -> View:
        """The normalised `View` that `forward` runs on; a modality not given is there, and nothing in it is valid."""
        unknown = [name for name in images if name not in self.cfg.modalities]
        if unknown or not images:
            known = ", ".join(self.cfg.modalities)
            raise UsageError(f"this model reads {known}; found {unknown[0] if unknown else 'no image at all'}")
        sites, device = next(iter(images.values())).shape[0], next(iter(images.values())).device
        parts = {}
        for name in self.cfg.modalities:
            if name in images:
                pick = [(given or {}).get(name) for given in (valid, doy)]
                parts[name] = self._modality(name, images[name], pick[0], pick[1], (gsd_m or {}).get(name))
            else:
                shape = (sites, 1, len(MODALITIES[name].bands), *self._blank_sides(name, images, gsd_m))
                blank = torch.zeros(shape, device=device)
                parts[name] = self._modality(
                    name, blank, torch.zeros_like(blank[:, :, 0], dtype=torch.bool), None, None
                )
        lead = next(iter(parts.values()))
        return normalise(View(parts, lead.gsd_B.new_zeros(sites, 0), None, lead.gsd_B), self.statistics)

    def _blank_sides(
        self, name: str, images: Mapping[str, Tensor], gsd_m: Mapping[str, float] | None
    ) -> tuple[int, int]:
        """Rows and columns in pixels of a sensor that is missing: as many tokens as it would have on this ground, but no more than the
        coarsest sensor that is there. So neither the cells nor the places of the fusion are its own doing.
        """
        sides = []
        for axis in (-2, -1):
            ground_m = max(x.shape[axis] * self._gsd(given, gsd_m) for given, x in images.items())
            fewest = min(-(-x.shape[axis] // self.cfg.stride(given)) for given, x in images.items())
            tokens = round(ground_m / (self.cfg.stride(name) * self._gsd(name, gsd_m)))
            sides.append(self.cfg.stride(name) * min(max(tokens, 1), fewest))
        return sides[0], sides[1]

    @staticmethod
    def _gsd(name: str, gsd_m: Mapping[str, float] | None) -> float:
        return (gsd_m or {}).get(name) or MODALITIES[name].gsd_m

    def _modality(
        self, name: str, x: Tensor, valid: Tensor | None, doy_BT: Tensor | None, gsd_m: float | None
    ) -> ModalityView:
        x_BTCHW = x[:, None] if x.ndim == 4 else x
        bands = MODALITIES[name].bands
        if x_BTCHW.ndim != 5 or x_BTCHW.shape[2] != len(bands):
            raise UsageError(f"{name} must be [B, T, {len(bands)}, H, W] ({', '.join(bands)}), found {list(x.shape)}")
        if valid is None:
            known = torch.isfinite(x_BTCHW.float())
            valid = (known & (x_BTCHW != 0) if name.startswith("s2") else known).all(2)
        valid = valid[:, None] if valid.ndim == 3 else valid
        sites, dates = x_BTCHW.shape[:2]
        gsd = MODALITIES[name].gsd_m if gsd_m is None else gsd_m
        identity = torch.eye(2, 3, dtype=torch.float64, device=x.device) * gsd
        doy_BT = torch.zeros(sites, dates) if doy_BT is None else doy_BT
        return ModalityView(
            x_BTCHW, valid.bool(), doy_BT.to(x.device, torch.int16), torch.full((sites,), gsd, device=x.device),
            identity.expand(sites, 2, 3),
        )  # fmt: skip


def embed(
    model: Pretrained,
    images: Mapping[str, np.ndarray],
    valid: Mapping[str, np.ndarray] | None = None,
    doy: Mapping[str, np.ndarray] | None = None,
    gsd_m: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """One vector per sensor of one site, and `fused` of all together: means over valid tokens and dates.

    Args:
        images: by modality [T, C, H, W] (or [C, H, W]); valid: [T, H, W]; doy: day of year [T]; see `Pretrained.forward`.

    Raises:
        UsageError: a modality this model was not trained on, or another number of bands.
    """

    def batch(given: Mapping[str, np.ndarray] | None) -> dict[str, Tensor]:
        return {name: torch.as_tensor(np.asarray(value))[None] for name, value in (given or {}).items()}

    with torch.no_grad():
        features = model(batch(images), batch(valid), batch(doy), gsd_m)
    parts = {name: (features.dense[name], features.dense_valid[name]) for name in images}
    parts["fused"] = (features.fused[:, None], features.fused_valid[:, None])
    vectors = {}
    for name, (feat, ok) in parts.items():
        weight = ok[..., None].float()
        total = torch.where(weight > 0, feat.float(), 0.0).sum((0, 1, 2, 3))
        vectors[name] = (total / weight.sum().clamp_min(1)).numpy()
    return vectors


def save_backbone(
    path: str,
    weights: Mapping[str, Tensor],
    cfg: ModelConfig,
    statistics: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Writes one safetensors file: weights of a `SkySense` (all experts), its config, statistics and origin."""
    metadata = {
        "format": FORMAT, "config": json.dumps(to_dict(cfg)), "facts": json.dumps(dict(facts)),
        "statistics": json.dumps({m: {key: list(map(float, s[key])) for key in ("mean", "std")} for m, s in statistics.items()}),
    }  # fmt: skip
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)


def load_backbone(path: str, device: str | torch.device = "cpu") -> Pretrained:
    """Reads a file of `python -m pipeline export`; returns it in evaluation mode.

    Raises:
        UsageError: no such file, another format, or weights that do not fit its config.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} does not exist; make one with python -m pipeline export CHECKPOINT {path}")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UsageError(
            f"{path} is no exported backbone (format {metadata.get('format')!r}); use python -m pipeline export"
        )
    tree = json.loads(metadata["config"])
    tree.setdefault("fusion", {}).setdefault("kind", "frames")  # files from before there was another
    cfg = from_dict(ModelConfig, tree, path)
    with torch.device("meta"):
        model = Pretrained(cfg, json.loads(metadata["statistics"]), json.loads(metadata["facts"]))
    try:
        model.skysense.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{path}: weights do not fit their config: {' '.join(str(error).split())[:300]}") from None
    return model.to(device).eval()
