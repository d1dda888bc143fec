"""One row, from a checkpoint to its result: read, check, encode, train the heads, compare with the baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from model.pretrained import Pretrained
from pipeline.evaluate.encode import LAYERS, POOLS, Encoder, Network, PixelStatistics
from pipeline.evaluate.frozen import check_pixels, features, features_folder, head_records, sides, unseen
from pipeline.evaluate.items import LabelledSet
from pipeline.evaluate.metrics import Records, difference_of, score_of, value_of
from pipeline.evaluate.registry import OWN, Row, row_named
from pipeline.evaluate.results import Result, keep
from pipeline.evaluate.store import weights_digest
from pipeline.evaluate.track import track
from pipeline.probes.features import FUSED
from pipeline.probes.offline import untrained_twin
from pipeline.tracking.facts import git_revision

POOL = "mean+std"  # default, chosen as `default_layer` was
FEW = 30  # test items below which a score is a proof that the row runs, not a measurement


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        mode: frozen or finetune. labels: share of the training labels. seeds: repetitions of everything that is drawn.
        heads: None takes the row's; layer, pool: None take the default (`default_layer`).
        out: folder of results; cache: local folder of features. epochs, lr: fine-tuning.
    """

    mode: str = "frozen"
    labels: float = 1.0
    seeds: int = 1
    heads: tuple[str, ...] | None = None
    layer: str | None = None
    pool: str | None = None
    merges: tuple[bool, bool, bool] | None = None
    out: str = "eval_out"
    cache: str = "eval_out/features"
    epochs: int = 10
    lr: float = 1e-3
    batch: int = 8

    def __post_init__(self) -> None:
        if self.mode not in ("frozen", "finetune"):
            raise UsageError(f"--mode {self.mode}: frozen or finetune")
        if self.seeds < 1 or self.epochs < 1 or self.batch < 1 or self.lr <= 0:
            raise UsageError("--seeds, --epochs, --batch must be at least 1 and --lr above 0")
        if self.layer not in (None, *LAYERS) or self.pool not in (None, *POOLS):
            raise UsageError(
                f"--layer {self.layer} --pool {self.pool}: known are {', '.join(LAYERS)} and {', '.join(POOLS)}"
            )


def default_layer(row: Row, labelled_dates: int = 1) -> str:
    """Series and several sensors: the model's own fusion. One image: all four stages (LOG.md has the comparison)."""
    return FUSED if len(row.sensors) > 1 or row.max_dates < 1 or labelled_dates > 1 else "concat"


def evaluate_row(model: Pretrained, row: Row, root: str, settings: Settings) -> list[Result]:
    """Results of one row, one per head. Everything is kept in `settings.out`.

    Raises:
        UsageError: bad input; nothing is written then.
    """
    if settings.mode == "finetune":
        from pipeline.evaluate.finetune import finetune_row

        return finetune_row(model, row, root, settings)
    started = time.monotonic()
    labelled = row.read(root, row)
    dates = max(len(images) for images in labelled.items[0].read().images.values())
    layer, pool = settings.layer or default_layer(row, dates), settings.pool or POOL
    if len(row.sensors) > 1 and layer not in ("last", FUSED):
        raise UsageError(
            f"--layer {layer}: {row.name} has {len(row.sensors)} sensors; take fused, or one sensor with --sensors"
        )
    merges = settings.merges if settings.merges is not None else row.merges
    trained = Network("trained", model, row, layer, pool, merges)
    notes = check_pixels(row, labelled.items)
    facts = {"layer": layer, "pool": pool, "merges": list(merges) if merges else None, **facts_of(model, row)}
    found: dict[str, dict[str, list[Records]]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    heads = settings.heads or row.heads[: 2 if row.kind in ("class", "labels") else 1]
    for seed in range(settings.seeds):
        parts = sides(labelled, settings.labels, seed)
        twin = untrained_twin(model, seed)
        encoders: list[Encoder] = [trained, Network("untrained", twin, row, layer, pool, merges), PixelStatistics(row)]
        for encoder in encoders:
            folder = features_folder(settings.cache, features_key(encoder, model, row, labelled, facts, seed))
            store, targets = features(model, encoder, row, labelled.items, folder)
            for head in heads:
                records, picked = head_records(row, labelled, head, store, targets, parts, seed)
                found.setdefault(head, {}).setdefault(encoder.name, []).append(records)
                if encoder is trained and seed == 0:
                    chosen[head] = picked
            if encoder is trained:
                notes += [note for note in unseen(labelled, targets, parts) if note not in notes]
    seconds = (time.monotonic() - started) / len(heads)
    notes += few(labelled)
    results = []
    for head in heads:
        result = result_of(row, labelled, settings, head, found[head], notes, seconds, chosen[head], facts)
        keep(settings.out, result, [item.key for item in labelled.of("test")], found[head]["trained"])
        results.append(result)
    tell(settings, results)
    return results


def few(labelled: LabelledSet) -> list[str]:
    """A note where there are too few test items to measure anything."""
    tests = len(labelled.of("test"))
    return [f"{tests} test items: the row runs, but no such score tells two checkpoints apart"] if tests < FEW else []


def tell(settings: Settings, results: Sequence[Result]) -> None:
    """MLflow, if the checkpoint's run is tracked; a store that is away costs a note, not the results."""
    problem = track(settings.out, [result.to_json() for result in results])
    for result in results if problem else ():
        result.notes.append(str(problem))


def result_of(
    row: Row, labelled: LabelledSet, settings: Settings, head: str, found: dict[str, list[Records]], notes: Sequence[str],
    seconds: float, chosen: dict[str, Any], facts: dict[str, Any],
) -> Result:  # fmt: skip
    """Score, baselines and paired gains of one head. `found`: records by encoder (`trained` first), one per seed."""
    trained = found["trained"]
    base = {name: records for name, records in found.items() if name != "trained"}
    gains = {name: difference_of(trained, records) for name, records in base.items()}
    if row.metric == "accuracy" and len(labelled.classes) > 5:
        facts = {**facts, "top5": float(np.mean([one.arrays["right5"].mean() for one in trained]))}
        notes = [*notes, f"{head}: among the five likeliest classes in {facts['top5']:.3f} of the test items"]
    return Result(
        task_name(row), settings.mode, head, row.metric, labelled.digest, labelled.how, score_of(trained),
        {name: score_of(records) for name, records in base.items()}, {n: g for n, g in gains.items() if g is not None},
        [value_of(one) for one in trained], settings.seeds, settings.labels,
        {side: len(labelled.of(side)) for side in ("train", "val", "test")},
        chosen, list(notes), seconds, facts,
    )  # fmt: skip


def task_name(row: Row) -> str:
    """The row's name, and which of its sensors are used where some were left out."""
    if row.name == OWN:
        return OWN
    whole = row_named(row.name).sensors
    return row.name if whole == row.sensors else f"{row.name}[{','.join(row.sensors)}]"


def facts_of(model: Pretrained, row: Row) -> dict[str, Any]:
    """What stands with every score of this checkpoint and row."""
    known = {key: model.facts.get(key) for key in ("checkpoint", "step", "samples", "weights", "run_id")}
    return {
        **known, "weights_sha256": weights_digest(model.skysense), "bands": [bands.describe() for bands in row.bands],
        "tile_px": row.tile_px, "revision": git_revision(),
    }  # fmt: skip


def features_key(
    encoder: Encoder, model: Pretrained, row: Row, labelled: LabelledSet, facts: dict[str, Any], seed: int
) -> dict[str, Any]:  # fmt: skip
    """What features hang on: nothing that may change without changing this."""
    weights = facts["weights_sha256"] if encoder.name in ("trained", "frozen") else encoder.name
    used = (
        ("layer", "pool", "merges") if row.kind in ("class", "labels") else ("layer", "merges")
    )  # maps are not pooled
    network = {} if encoder.name == "pixels" else {key: facts[key] for key in used}
    drawn = seed if encoder.name == "untrained" else 0
    return {
        "weights": weights, "seed": drawn, "row": row.name, "bands": facts["bands"], "tile_px": row.tile_px, "split": labelled.digest,
        "statistics": model.statistics, "config": str(model.cfg), **network,
    }  # fmt: skip


def default_out(model: Pretrained, checkpoint: str) -> str:
    """`evaluate/` in the run directory that the weights come from, else `eval_out`."""
    rundir, _, _ = str(model.facts.get("checkpoint", "")).rpartition("/checkpoints/")
    return (
        storage.join(rundir, "evaluate")
        if rundir and storage.exists(storage.join(rundir, "resolved.json"))
        else "eval_out"
    )
