"""Batches made in memory, for benchmarks without a shard set and for tests: views are real crops of one site, with exact geometry.

Every pixel is a smooth function of its place on the site, its date and the site, so that u and v agree where they overlap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data_prep.schema import MODALITIES
from model.augment import NEUTRAL
from model.batch import Batch, ModalityView, View

STATISTICS = {
    name: {"mean": [0.0] * len(spec.bands), "std": [1.0] * len(spec.bands)} for name, spec in MODALITIES.items()
}
CANVAS = {"hr": 64, "s2": 8, "s1": 8}
DATES = {"hr": 1, "s2": 2, "s1": 2}


def affine(side_m: float, pixels: int, origin: tuple[float, float], turn: int, flip: bool) -> Tensor:
    """Canvas pixel → site metres of a square crop at `origin`, turned by quarter turns and mirrored."""
    scale = side_m / pixels
    c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][turn % 4]
    linear = torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ torch.diag(
        torch.tensor([-scale if flip else scale, scale], dtype=torch.float64)
    )
    centre = torch.tensor([pixels / 2, pixels / 2], dtype=torch.float64)
    offset = torch.tensor(origin, dtype=torch.float64) + side_m / 2 - linear @ centre
    return torch.cat([linear, offset[:, None]], dim=1)


def make_view(
    sites: int, generator: torch.Generator, site_side_m: float = 120.0, share: float = 0.8, missing: float = 0.2,
    canvas: dict[str, int] | None = None, dates: dict[str, int] | None = None, modalities: tuple[str, ...] = ("hr", "s2", "s1"),
    num_classes: int = 4, frequencies: Tensor | None = None,
) -> View:  # fmt: skip
    """One view of `sites` sites; each date of each modality is absent with probability `missing`."""
    canvas, dates = {**CANVAS, **(canvas or {})}, {**DATES, **(dates or {})}

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    frequencies = torch.ones(sites, dtype=torch.float64) if frequencies is None else frequencies
    side_m = site_side_m * share
    origin = rand(sites, 2) * (site_side_m - side_m)
    turn, flip = torch.randint(0, 4, (sites,), generator=generator), rand(sites) > 0.5
    views = {}
    for name in modalities:
        n, t, bands = canvas[name], dates[name], len(MODALITIES[name].bands)
        maps = torch.stack(
            [
                affine(side_m, n, (float(origin[b, 0]), float(origin[b, 1])), int(turn[b]), bool(flip[b]))
                for b in range(sites)
            ]
        )
        ground = _ground(maps, n)
        phase = torch.arange(bands, dtype=torch.float64)[None, None, :, None, None]
        day = torch.randint(1, 366, (sites, t), generator=generator).sort(dim=1).values
        x = torch.sin(
            ground[:, None, None, :, :, 0] / 15 * frequencies[:, None, None, None, None]
            + torch.cos(ground[:, None, None, :, :, 1] / 20 + phase)
            + day[:, :, None, None, None] / 365 * 2 * math.pi
        )  # fmt: skip
        valid = (rand(sites, t) >= missing)[:, :, None, None] & (rand(sites, t, n, n) > 0.1)
        x = torch.where(valid[:, :, None], x, float("nan")).float()
        if name == "hr":
            x = torch.where(valid[:, :, None], (x + 1) * 127, float("nan"))
        gsd = torch.full((sites,), side_m / n)
        views[name] = ModalityView(x, valid, torch.where(valid.any((2, 3)), day, 0).to(torch.int16), gsd, maps)
    neutral = torch.tensor(NEUTRAL).expand(sites, -1).clone()
    neutral[:, 0] = 0.8 + 0.4 * rand(sites).float()
    classes = torch.randint(-1, num_classes, (sites, canvas["s2"], canvas["s2"]), generator=generator).to(torch.int16)
    return View(views, neutral, classes, torch.full((sites,), side_m))


def _ground(maps_B23: Tensor, pixels: int) -> Tensor:
    centre = torch.arange(pixels, dtype=torch.float64) + 0.5
    rows, cols = torch.meshgrid(centre, centre, indexing="ij")
    points = torch.stack([cols, rows], dim=-1).reshape(-1, 2)
    ground = points @ maps_B23[:, :, :2].transpose(1, 2) + maps_B23[:, None, :, 2]
    return ground.reshape(len(maps_B23), pixels, pixels, 2)


def make_batch(sites: int, seed: int = 0, local_views: int = 1, missing: float = 0.2, **kwargs: object) -> Batch:
    """A batch of `sites` sites with u, v and local views (half the side of the global ones)."""
    generator = torch.Generator().manual_seed(seed)
    kwargs["frequencies"] = 0.5 + torch.rand(sites, generator=generator, dtype=torch.float64)
    u, v = (make_view(sites, generator, missing=missing, **kwargs) for _ in range(2))  # type: ignore[arg-type]
    half = {name: pixels // 2 for name, pixels in {**CANVAS, **(kwargs.get("canvas") or {})}.items()}  # type: ignore[dict-item]
    small = {**kwargs, "canvas": half}
    local = [make_view(sites, generator, missing=missing, share=0.4, **small) for _ in range(local_views)]  # type: ignore[arg-type]
    return Batch(
        u, v, local, [f"site_{seed}_{i}" for i in range(sites)], torch.arange(sites) + 1000 * seed,
        torch.zeros(sites, dtype=torch.int64), torch.rand(sites, 2, generator=generator, dtype=torch.float64),
    )  # fmt: skip


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in `parts` equal runs of sites, as ranks or micro-batches get it."""
    size = len(batch.keys) // parts
    return [batch.part(i * size, (i + 1) * size) for i in range(parts)]


def batch_of(config: Any, sites: int, seed: int = 0, missing: float = 0.0) -> Batch:
    """A batch as a run (`PretrainConfig`) would read it: its canvases, dates, sensors and number of local views.

    missing: share of dates that are absent; a tenth of the pixels of every other one is invalid.
    """
    view, data = config.data.views_global, config.data
    return make_batch(
        sites, seed, data.local_views, missing, modalities=config.model.modalities,
        canvas={"hr": view.hr_px, "s2": view.series_px, "s1": view.series_px},
        dates={"hr": 1, "s2": view.s2_dates, "s1": view.s1_dates},
    )  # fmt: skip
