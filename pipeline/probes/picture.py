"""What the features see: sites beside the first principal components of their features, as a picture that goes with the run."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import nn

from data_prep.schema import SiteArrays
from data_prep.shards import ShardSet
from data_prep.show import colours
from pipeline.config import PretrainConfig
from pipeline.probes.features import extract, network
from pipeline.probes.in_loop import statistics_dict
from pipeline.tracking.plots import feature_picture

NUM_SITES = 4


def feature_sheet(
    skysense: nn.Module, cfg: PretrainConfig, shardset: ShardSet, device: torch.device | str = "cpu"
) -> bytes:
    """PNG: per site its hr and s2 image and, on the 10 m grid, the three first components of each modality's features.

    Components are those of all sites shown together, so equal colours mean alike features. Collective: every rank calls.
    """
    rows = np.unique(
        np.linspace(0, shardset.num_samples - 1, min(NUM_SITES, shardset.num_samples)).astype(int)
    ).tolist()
    view = cfg.data.views_global
    # a label that no site has: features are laid out on the label grid, all unlabelled
    features = extract(
        [network(skysense, "mean")], cfg.model.modalities, shardset.read_sample, rows, view, statistics_dict(shardset), "",
        batch=1, device=device,
    )[0]  # fmt: skip
    side = view.series_px
    names = [name for name in features.pixels if features.pixel_valid[name].any()]
    columns = {
        name: feature_picture(features.pixels[name].float().numpy().reshape(len(rows) * side, side, -1))
        for name in names
    }

    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * (2 + len(names)), 1.7 * len(rows)), layout="constrained")
    for number, row in enumerate(rows):
        site = shardset.read_sample(row)
        pictures = [("hr", _image(site, "hr")), ("s2", _image(site, "s2"))]
        pictures += [(f"features {name}", columns[name].reshape(len(rows), side, side, 3)[number]) for name in names]
        for place, (title, picture) in enumerate(pictures):
            axes = figure.add_subplot(len(rows), len(pictures), number * len(pictures) + place + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            if number == 0:
                axes.set_title(title, fontsize=8)
            if picture is not None:
                axes.imshow(picture, interpolation="nearest")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _image(site: SiteArrays, name: str) -> np.ndarray | None:
    """The clearest date in natural colours; None if the site has none."""
    series = site.series.get(name)
    if series is None:
        return None
    return np.clip(colours(series, name, int((series.mask_THW == 1).mean((1, 2)).argmax())), 0, 1)
