"""Fine-tuning: the head alone for a fifth of the epochs, then the whole network with layer-wise decay; killed, it continues.

Everything drawn hangs on (seed, epoch) only, and a checkpoint is committed after every epoch, so a run that was killed and started
again ends bit for bit as one that was not. Checkpoints are those of training (`pipeline.checkpoint.store`): a manifest with the
digest of every file, written last. One process.

Legend: B items · K classes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import storage
from cluster.errors import UsageError
from cluster.progress import Progress, progress
from model.pretrained import Pretrained
from pipeline.checkpoint import store
from pipeline.checkpoint.tensors import TensorFile, write_tensors
from pipeline.config import OptimizerConfig
from pipeline.evaluate import dense
from pipeline.evaluate.boxes import Detector, records_of
from pipeline.evaluate.encode import Encoder, Network, PixelStatistics, make_batch
from pipeline.evaluate.frozen import (
    Sides,
    Targets,
    check_pixels,
    dense_records,
    features,
    features_folder,
    global_records,
    head_records,
    sides,
    targets_of,
    unseen,
)  # fmt: skip
from pipeline.evaluate.items import Boxes, Item, LabelledSet, Sample
from pipeline.evaluate.metrics import Records, value_of
from pipeline.evaluate.registry import Row
from pipeline.evaluate.results import Result, keep
from pipeline.evaluate.run import POOL, Settings, default_layer, facts_of, features_key, few, result_of, tell
from pipeline.optimizer import adamw, set_rates
from pipeline.probes.offline import untrained_twin
from pipeline.schedules import learning_rate

FROZEN_SHARE = 0.2
BACKBONE_RATE = 0.1  # of the head's, once the whole network learns (OlmoEarth's protocol)
LAYER_DECAY = 0.9
HELD_BYTES = 1 << 30  # samples of smaller sets are read once
FILE = "state.safetensors"


class Tuned(nn.Module):
    """A network and a head for one row, trained together.

    Args:
        network: its own copy of the weights. layer: as `encode.Network`, as is the pool of the settings.
    """

    def __init__(
        self,
        network: Pretrained,
        row: Row,
        labelled: LabelledSet,
        head: str,
        layer: str,
        settings: Settings,
        first: Sample,
    ) -> None:
        super().__init__()
        self.row, self.num_classes = row, len(labelled.classes)
        self.network = network
        merges = settings.merges if settings.merges is not None else row.merges
        self.encoder = Network("tuned", network, row, layer, settings.pool or POOL, merges)
        with torch.no_grad():
            found = self.encoder(make_batch(network, row, [first]), dense=row.kind not in ("class", "labels"))
        if row.kind in ("class", "labels"):
            dim = found.pooled[0].shape[1]
            self.head: nn.Module = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, self.num_classes))
        elif row.kind == "boxes":
            maps = found.maps[0]
            height = next(
                part.valid_BTHW.shape[2]
                for part in make_batch(network, row, [first]).views[0].modalities.values()
                if part.valid_BTHW.any()
            )
            self.head = Detector(
                [m.shape[1] for m in maps], self.num_classes, height, [m.shape[2] for m in maps], row.oriented
            )
        else:
            if head not in dense.HEADS:
                raise UsageError(f"--head {head}: {row.name} takes {', '.join(row.heads)}")
            self.head = dense.HEADS[head]([m.shape[1] for m in dense.joined(found.maps)], self.num_classes)

    def maps(self, samples: Sequence[Sample]) -> list[Tensor]:
        return dense.joined(self.encoder(make_batch(self.network, self.row, list(samples)), dense=True).maps)

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [B, K] of global rows."""
        return self.head(self.encoder(make_batch(self.network, self.row, list(samples)), dense=False).pooled[0])

    def loss(self, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
        """Mean over the items; boxes: the detector's own sum."""
        targets = [sample.target for sample in samples]
        if self.row.kind == "class":
            return F.cross_entropy(self.scores(samples), torch.tensor(np.array(targets, np.int64)))
        if self.row.kind == "labels":
            return F.binary_cross_entropy_with_logits(self.scores(samples), torch.tensor(np.array(targets, np.float32)))
        if self.row.kind == "boxes":
            (sample,), (truth,) = samples, targets
            assert isinstance(truth, Boxes)
            height, width = sample.images["hr"].shape[2:]
            return torch.stack(list(self.head(self.maps(samples), (height, width), truth).values())).sum()
        labels = torch.from_numpy(np.stack([np.asarray(target, np.int64) for target in targets]))
        return dense.pixel_loss(self.head(self.maps(samples)), labels, generator)


def layer_rates(network: Pretrained) -> dict[str, float]:
    """Learning-rate scale by parameter prefix: BACKBONE_RATE x LAYER_DECAY ^ (layers above it). Fusion and final norm: none above."""
    cfg, depths = network.cfg, network.cfg.depths
    layers = sum(depths) + 1

    def rate(layer: int) -> float:
        return BACKBONE_RATE * LAYER_DECAY ** (layers - layer)

    scales = {"network": BACKBONE_RATE}
    owners = (
        [f"network.skysense.backbone.each.{name}" for name in cfg.modalities]
        if cfg.separate
        else ["network.skysense.backbone"]
    )
    for owner in owners:
        scales |= {f"{owner}.tokenizers": rate(0), f"{owner}.embed_norm": rate(0)}
        for s in range(4):
            start = sum(depths[:s])
            scales |= {f"{owner}.stages.{s}.{i}": rate(start + i + 1) for i in range(depths[s])}
            if s:
                scales[f"{owner}.merges.{s - 1}"] = rate(start)
            if s >= 2 and cfg.prompts:
                scales[f"{owner}.prompts.{s - 2}"] = rate(start)
    return scales


class Tuning:
    """One fine-tuning under way: weights, optimizer, epoch. `run` goes on from the newest committed checkpoint."""

    def __init__(self, tuned: Tuned, items: Sequence[Item], settings: Settings, seed: int, url: str) -> None:
        self.tuned, self.items, self.settings, self.seed, self.url = tuned, list(items), settings, seed, url
        self.batch = 1 if tuned.row.kind == "boxes" else settings.batch
        names = {name for name, _ in tuned.named_parameters()}
        scales = {
            prefix: rate
            for prefix, rate in layer_rates(tuned.network).items()
            if any(name.startswith(f"{prefix}.") for name in names)
        }
        self.optimizer = adamw(tuned, OptimizerConfig(lr_scale=scales))
        self.steps_per_epoch = math.ceil(len(self.items) / self.batch)
        self.frozen_epochs = math.ceil(settings.epochs * FROZEN_SHARE)
        self.epoch, self.notes = 0, dict[str, float]()
        self._held: dict[str, Sample] | None = None

    def run(self, after_frozen: Any) -> None:
        """All epochs that are left. after_frozen: called without arguments when the head alone has learnt; its figure is kept."""
        store.clear_leftovers(self.url)
        self.resume()
        with progress(self.settings.epochs, f"fine-tune {self.tuned.row.name}") as bar:
            bar.done = self.epoch
            while self.epoch < self.settings.epochs:
                loss = self._one_epoch(bar)
                self.epoch += 1
                if self.epoch == self.frozen_epochs:
                    self.notes["train_score_frozen"] = after_frozen()
                self.save()
                bar.advance(1, f"loss {loss:.4f}")

    def _one_epoch(self, bar: Progress) -> float:
        whole = self.epoch >= self.frozen_epochs
        self.tuned.network.requires_grad_(whole)
        self.tuned.network.eval()  # no drop-path: few items, and nothing drawn that a restart would have to draw again
        self.tuned.head.train()
        order = dense.epochs(list(range(len(self.items))), self.seed * 1_000_003 + self.epoch, self.batch)
        total, losses = self.settings.epochs * self.steps_per_epoch, []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + self.epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            for step in range(self.steps_per_epoch):
                done = self.epoch * self.steps_per_epoch + step + 1
                set_rates(
                    self.optimizer.param_groups,
                    learning_rate(done, total, max(1, total // 20), self.settings.lr, self.settings.lr * 0.01),
                    0.01,
                )
                samples = [self._sample(self.items[i]) for i in next(order)]
                loss = self.tuned.loss(samples, generator)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.tuned.parameters(), 3.0)
                self.optimizer.step()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise UsageError(
                        f"fine-tuning {self.tuned.row.name}: the loss is {losses[-1]} in epoch {self.epoch + 1}; lower --lr ({self.settings.lr:g})"
                    )
        return float(np.mean(losses))

    def _sample(self, item: Item) -> Sample:
        """Read once where the whole set is small."""
        if self._held is None:
            size = sum(x.nbytes for x in self.items[0].read().images.values())
            self._held = {} if size * len(self.items) < HELD_BYTES else None
            if self._held is None:
                return item.read()
        if item.key not in self._held:
            self._held[item.key] = item.read()
        return self._held[item.key]

    def save(self) -> None:
        """Commits weights, moments and epoch."""
        tensors = {f"model/{name}": value.detach() for name, value in self.tuned.state_dict().items()}
        names = {id(p): name for name, p in self.tuned.named_parameters()}
        steps: dict[str, float] = {}
        for parameter, state in self.optimizer.state.items():
            name = names[id(parameter)]
            tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
            steps[name] = float(state["step"])
        tensors = dict(sorted(tensors.items()))  # the optimizer's own order changes with a resume
        entry = write_tensors(storage.join(store.step_url(self.url, self.epoch), FILE), tensors)
        pieces = {
            name: {"shape": list(value.shape), "pieces": [[0, value.numel(), FILE]]} for name, value in tensors.items()
        }
        manifest = {
            "format": store.FORMAT, "step": self.epoch, "samples": self.epoch * len(self.items), "files": {FILE: entry},
            "parameters": pieces, "adam_steps": steps, "notes": self.notes,
        }  # fmt: skip
        store.commit(self.url, self.epoch, manifest)
        store.retain(self.url, 1, 0)

    def resume(self) -> None:
        """From the newest whole checkpoint, if there is one."""
        for url in store.committed(self.url):
            checkpoint = store.open_checkpoint(url)
            store.check_sizes(checkpoint)
            file = TensorFile(storage.local_path(storage.join(url, FILE)))
            self.tuned.load_state_dict({name: file.read(f"model/{name}") for name in self.tuned.state_dict()})
            for name, parameter in self.tuned.named_parameters():
                if name in checkpoint.manifest["adam_steps"]:
                    step = torch.tensor(checkpoint.manifest["adam_steps"][name])
                    moments = {key: file.read(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {"step": step, **moments}
            self.epoch, self.notes = checkpoint.step, dict(checkpoint.manifest["notes"])
            return


@torch.no_grad()
def tuned_records(
    tuned: Tuned, labelled: LabelledSet, rows: Sequence[int], trained: Sequence[int], targets: Targets
) -> Records:
    """What items got from the fine-tuned network."""
    tuned.eval()
    row, items = tuned.row, labelled.items
    if row.kind in ("class", "labels"):
        scores = np.concatenate([tuned.scores([items[i].read()]).numpy() for i in rows])
        many = np.array([targets.values[i] for i in range(len(items))])
        one_hot = many.astype(bool) if row.kind == "labels" else np.eye(tuned.num_classes, dtype=bool)[many.astype(int)]
        return global_records(row, scores, one_hot[list(rows)], one_hot[list(trained)])
    if row.kind == "boxes":

        def boxes(i: int) -> tuple[list[Tensor], tuple[int, int], Boxes]:
            truth = targets.values[i]
            assert isinstance(truth, Boxes)
            return tuned.maps([items[i].read()]), targets.sizes[i], truth

        assert isinstance(tuned.head, Detector)
        return Records(row.metric, records_of(tuned.head, boxes, rows, tuned.num_classes))

    def load(picked: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        labels = np.stack([np.asarray(targets.values[i], np.int64) for i in picked])
        return tuned.maps([items[i].read() for i in picked]), torch.from_numpy(labels)

    return dense_records(row, tuned.head, load, rows, labelled, targets, trained)


def finetune_row(model: Pretrained, row: Row, root: str, settings: Settings) -> list[Result]:
    """The fine-tuned network beside the same one frozen, untrained, trained from scratch, and pixel statistics."""
    started = time.monotonic()
    labelled = row.read(root, row)
    dates = max(len(images) for images in labelled.items[0].read().images.values())
    layer = settings.layer or default_layer(row, dates)
    if not storage.is_local(settings.out):
        raise UsageError(f"--out {settings.out}: fine-tuning keeps its checkpoints in a local folder")
    notes = check_pixels(row, labelled.items)
    head = (settings.heads or row.heads)[0]
    head = "linear" if row.kind in ("class", "labels") else head
    merges = settings.merges if settings.merges is not None else row.merges
    facts = {
        "layer": layer, "pool": settings.pool or POOL, "merges": list(merges) if merges else None, "epochs": settings.epochs, "lr": settings.lr,
        "batch": settings.batch, **facts_of(model, row),
    }  # fmt: skip
    found: dict[str, list[Records]] = {}
    chosen: dict[str, Any] = {}
    targets = targets_of(row, labelled.items)
    notes += [*unseen(labelled, targets, sides(labelled, settings.labels, 0)), *few(labelled)]
    for seed in range(settings.seeds):
        parts, twin = sides(labelled, settings.labels, seed), untrained_twin(model, seed)
        for name, network in (("trained", model), ("scratch", twin)):
            records, figures = _tune(name, network, row, labelled, head, layer, settings, parts, targets, seed, facts)
            found.setdefault(name, []).append(records)
            chosen |= figures if name == "trained" and seed == 0 else {}
        frozen_head = row.heads[1] if row.kind in ("class", "labels") else head
        encoders: list[Encoder] = [
            Network("frozen", model, row, layer, facts["pool"], merges),
            Network("untrained", twin, row, layer, facts["pool"], merges),
            PixelStatistics(row),
        ]
        for encoder in encoders:
            folder = features_folder(settings.cache, features_key(encoder, model, row, labelled, facts, seed))
            kept, frozen_targets = features(model, encoder, row, labelled.items, folder)
            found.setdefault(encoder.name, []).append(
                head_records(row, labelled, frozen_head, kept, frozen_targets, parts, seed)[0]
            )
    before, after = chosen["train_score_frozen"], chosen["train_score"]
    notes.append(f"score on training items: {before:.3f} when the head alone had learnt, {after:.3f} at the end")
    result = result_of(row, labelled, settings, head, found, notes, time.monotonic() - started, chosen, facts)
    keep(settings.out, result, [item.key for item in labelled.of("test")], found["trained"])
    tell(settings, [result])
    return [result]


def _tune(
    name: str, network: Pretrained, row: Row, labelled: LabelledSet, head: str, layer: str, settings: Settings, parts: Sides,
    targets: Targets, seed: int, facts: dict[str, Any],
) -> tuple[Records, dict[str, float]]:  # fmt: skip
    """Trains (or goes on training) one network; records of the test items, and scores on the training items."""
    own = Pretrained(network.cfg, network.statistics).eval()
    own.load_state_dict(copy.deepcopy(network.state_dict()))
    rows = [*parts.train, *parts.val]
    if row.kind == "boxes":
        rows = [i for i in rows if len(targets.values[i].labels)]  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = Tuned(own, row, labelled, head, layer, settings, labelled.items[rows[0]].read())
    identity = json.dumps(
        [name, row.name, labelled.digest, head, settings.labels, seed, facts], sort_keys=True, default=str
    )
    url = storage.join(
        settings.out, "finetune", f"{row.name}-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    )
    tuning = Tuning(tuned, [labelled.items[i] for i in rows], settings, seed, url)
    shown = rows[:: max(1, len(rows) // 64)]

    def on_training() -> float:
        return value_of(tuned_records(tuned, labelled, shown, rows, targets))

    tuning.run(on_training)
    figures = {**tuning.notes, "train_score": on_training()}
    return tuned_records(tuned, labelled, parts.test, rows, targets), figures
