"""Training on labels, in one process and plain torch: the network from scratch as an upper bound, and fine-tuning with few labels.

Every modality's features and the fused ones, pooled as probes pool them, get a head of their own (batch normalisation without
parameters, then linear); the loss is the sum of their cross-entropies over the sites that have the modality. Who starts from
pretrained weights and who from scratch differ in nothing but the weights and, for the former, two settings (`FINETUNE`).

Dimension legend: B sites · T dates · C bands · H, W canvas pixels · D features · K classes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UsageError
from cluster.progress import progress
from model.batch import ModalityView, View
from model.pretrained import Pretrained
from pipeline.config import ViewConfig
from pipeline.probes.features import FUSED, pooled_moments, tokens_of
from pipeline.probes.scores import Outcome
from pipeline.probes.source import Source
from pipeline.reader.views import dates_wanted

CACHE_BYTES = 2**30  # of views held between epochs
CLIP = 5.0
MIN_ROWS = 2  # sites of a batch that batch normalisation needs


@dataclass(frozen=True)
class Recipe:
    """samples: labelled sites shown, one view each. lr: of the heads and, times backbone_share, of the network; cosine to 0 after a
    warm-up of a twentieth. frozen_share: of the steps, at the start, in which only the heads learn."""

    samples: int
    batch: int = 32
    lr: float = 1e-3
    backbone_share: float = 1.0
    frozen_share: float = 0.0
    weight_decay: float = 0.05
    seed: int = 0


def finetuned(recipe: Recipe) -> Recipe:
    """The same for pretrained weights, as OlmoEarth fine-tunes: a fifth of the steps frozen, then a tenth of the rate."""
    return replace(recipe, backbone_share=0.1, frozen_share=0.2)


class Heads(nn.Module):
    """Class scores per modality, and of the fused features."""

    def __init__(self, model: Pretrained, num_classes: int) -> None:
        super().__init__()
        dims = dict.fromkeys(model.cfg.modalities, model.cfg.dims[3]) | {FUSED: model.fused_dim}
        self.each = nn.ModuleDict(
            {name: nn.Sequential(nn.BatchNorm1d(2 * dim, affine=False), nn.Linear(2 * dim, num_classes)) for name, dim in dims.items()}
        )  # fmt: skip

    def forward(self, pooled: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
        """[sites that have it, K] per modality; those that too few sites of the batch have are left out in training."""
        least = MIN_ROWS if self.training else 1
        return {
            name: head(pooled[name][present[name]])
            for name, head in self.each.items()
            if int(present[name].sum()) >= least
        }


def train_on_labels(
    model: Pretrained, source: Source, train: Sequence[int], recipe: Recipe, title: str, device: str = "cpu"
) -> dict[str, Outcome]:
    """Trains a copy of `model` on the sites at the positions `train`, and returns what each test site got, by modality.

    Raises:
        UsageError: fewer than two sites to train on.
    """
    exam = source.exam
    assert exam.labels is not None
    if len(train) < MIN_ROWS:
        raise UsageError(f"{len(train)} labelled training sites; training on labels needs {MIN_ROWS}")
    labels_S = torch.from_numpy(exam.labels)
    views = _Views(source)
    rng = np.random.default_rng(recipe.seed)
    with torch.random.fork_rng(devices=[]):  # drop-path and the heads' weights draw from the default generator
        torch.manual_seed(recipe.seed)
        network = copy.deepcopy(model).to(device).train()
        heads = Heads(network, int(exam.labels.max()) + 1).to(device).train()
        batch = min(recipe.batch, len(train))
        steps = max(1, math.ceil(recipe.samples / batch))
        frozen = round(recipe.frozen_share * steps)
        optimizer = torch.optim.AdamW(
            [{"params": network.parameters(), "share": recipe.backbone_share}, {"params": heads.parameters(), "share": 1.0}],
            lr=recipe.lr, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        order = _endless(train, batch, rng)
        with progress(steps, title) as bar:
            for step in range(steps):
                picked = next(order)
                view = stacked([_drawn(views.get(i), source.training_view, rng) for i in picked])
                loss = _loss(network, heads, view.to(device), labels_S[picked].to(device), step < frozen)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * group["share"] * _schedule(step, steps)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([*network.parameters(), *heads.parameters()], CLIP)
                optimizer.step()
                bar.advance(1, f"loss {float(loss.detach()):.3f}")
    return _examined(network.eval(), heads.eval(), source, views, device)


def _loss(network: Pretrained, heads: Heads, view: View, labels_B: Tensor, is_frozen: bool) -> Tensor:
    with torch.set_grad_enabled(not is_frozen):
        pooled, present = _pooled(network, view)
    total = labels_B.new_zeros((), dtype=torch.float32, requires_grad=True)
    for name, scores in heads(pooled, present).items():
        total = total + F.cross_entropy(scores, labels_B[present[name]])
    return total


def _pooled(network: Pretrained, view: View) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    features = network.skysense(view)
    pooled, present = {}, {}
    for name in [*features.dense, FUSED]:
        feat, valid = tokens_of(features, name)
        pooled[name] = torch.cat(pooled_moments(feat, valid), 1)
        present[name] = valid.flatten(1).any(1)
    return pooled, present


@torch.no_grad()
def _examined(network: Pretrained, heads: Heads, source: Source, views: _Views, device: str) -> dict[str, Outcome]:
    exam = source.exam
    assert exam.labels is not None
    sites = range(exam.num_train, len(exam.labels))
    tested = {name: np.zeros(len(sites), bool) for name in heads.each}
    right = {name: np.zeros(len(sites), np.uint8) for name in heads.each}
    for start in range(0, len(sites), 32):
        chunk = list(sites[start : start + 32])
        pooled, present = _pooled(network, stacked([views.get(i) for i in chunk]).to(device))
        for name, scores in heads(pooled, present).items():
            there = start + np.flatnonzero(present[name].cpu().numpy())
            tested[name][there] = True
            right[name][there] = scores.argmax(1).cpu().numpy() == exam.labels[exam.num_train + there]
    return {name: Outcome(tested[name], right[name]) for name in heads.each}


class _Views:
    """Views of single sites, the first CACHE_BYTES of them kept."""

    def __init__(self, source: Source) -> None:
        self._source, self._bytes = source, 0
        self._held: dict[int, View] = {}

    def get(self, position: int) -> View:
        if position in self._held:
            return self._held[position]
        view = self._source.view([position])
        size = sum(part.x_BTCHW.nbytes for part in view.modalities.values())
        if self._bytes + size <= CACHE_BYTES:
            self._held[position], self._bytes = view, self._bytes + size
        return view


def stacked(views: Sequence[View]) -> View:
    """Views of single sites as one batch.

    Raises:
        UsageError: they are of different sizes.
    """
    parts: dict[str, ModalityView] = {}
    for name, first in views[0].modalities.items():
        each = [view.modalities[name] for view in views]
        if any(part.x_BTCHW.shape != first.x_BTCHW.shape for part in each):
            raise UsageError("training on labels needs images of one size")
        fields = [field.name for field in dataclasses.fields(ModalityView)]
        parts[name] = ModalityView(*(torch.cat([getattr(part, field) for part in each]) for field in fields))
    photometric = torch.cat([view.photometric_BP for view in views])
    return View(parts, photometric, None, torch.cat([view.side_m_B for view in views]))


def _drawn(view: View, training: ViewConfig | None, rng: np.random.Generator) -> View:
    """One training sample of a site: a crop of the training canvas and as many dates, turned and mirrored; `affine_B23` is not
    carried along, nothing here reads it."""
    turn, flip, places = int(rng.integers(4)), bool(rng.integers(2)), rng.random(2)
    parts = {}
    for name, part in view.modalities.items():
        x, ok, doy = part.x_BTCHW, part.valid_BTHW, part.doy_BT
        if training is not None:
            side = training.hr_px if name == "hr" else training.series_px
            cells = training.hr_px / training.series_px if name == "hr" else 1.0  # pixels per 10 m
            rows, columns = (_span(size, side, place, cells) for size, place in zip(ok.shape[2:], places))
            x, ok = x[..., rows, columns], ok[..., rows, columns]
            dates = _some_dates(ok[0].flatten(1).any(1).numpy(), dates_wanted(training, name), rng)
            x, ok, doy = x[:, dates], ok[:, dates], doy[:, dates]
        x, ok = (torch.rot90(t, turn, (-2, -1)) for t in (x, ok))
        x, ok = (t.flip(-1) if flip else t for t in (x, ok))
        parts[name] = replace(part, x_BTCHW=x, valid_BTHW=ok, doy_BT=doy)
    return replace(view, modalities=parts)


def _span(size: int, side: int, place: float, cells: float) -> slice:
    """`side` of `size` pixels; the offset is a whole number of 10 m cells, the same cell for every modality."""
    if side >= size:
        return slice(0, size)
    first = int(place * (math.floor((size - side) / cells + 1e-6) + 1))
    start = min(round(first * cells), size - side)
    return slice(start, start + side)


def _some_dates(there_T: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` dates (all, if there are no more), ascending, such with valid pixels first."""
    priority = rng.random(len(there_T)) + (~there_T).astype(float)
    return np.sort(np.argsort(priority, kind="stable")[:wanted])


def _endless(train: Sequence[int], batch: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of positions, epoch after epoch in a new order; what does not fill a batch waits for the next epoch."""
    held: list[int] = []
    while True:
        held += rng.permutation(np.asarray(train)).tolist()
        while len(held) >= batch:
            yield held[:batch]
            held = held[batch:]


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
