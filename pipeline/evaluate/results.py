"""What an evaluation leaves behind: one line per row in `results.jsonl`, and per test item what it got, under the split's digest.

    OUT/results.jsonl                                      one JSON object a line, appended whole
    OUT/items/<row>-<mode>-<head>-<split>-<fingerprint>.npz  records of the network by seed (plain arrays, never pickled)

A line with the same fingerprint (weights, row, mode, head, layer, share, seeds, split) replaces the one before it when read.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster import storage
from cluster.errors import UsageError
from pipeline.evaluate.metrics import FIRST, Records
from pipeline.probes.scores import Difference, Score

RESULTS, ITEMS = "results.jsonl", "items"


@dataclass(frozen=True)
class Result:
    """One row, one head, one mode.

    Attributes:
        task: row name, with its sensors in brackets where some were left out.
        split: digest. score … baselines: by name (untrained, pixels; fine-tuning: scratch), the gain over each paired over items.
        by_seed: the score of every seed. chosen: what validation chose. notes: what to know before quoting the score.
        facts: checkpoint, weights, step, layer, pool, head, revision, sizes, bands.
    """

    task: str
    mode: str
    head: str
    metric: str
    split: str
    how: str
    score: Score
    baselines: dict[str, Score]
    gains: dict[str, Difference]
    by_seed: list[float]
    seeds: int
    labels: float
    items: dict[str, int]
    chosen: dict[str, Any]
    notes: list[str]
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The agreed keys first; `low`, `high`: 95 % interval over test items."""
        flat: dict[str, Any] = {
            "task": self.task, "mode": self.mode, "head": self.head, "split": self.split, "metric": self.metric,
            "score": self.score.value, "low": self.score.low, "high": self.score.high, "chance": self.score.chance,
        }  # fmt: skip
        for name, score in self.baselines.items():
            flat |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return {
            **flat, "gains": {name: asdict(gain) for name, gain in self.gains.items()}, "seeds": self.seeds, "by_seed": self.by_seed,
            "labels": self.labels, "items": self.items, "how": self.how, "chosen": self.chosen, "notes": self.notes,
            "seconds": round(self.seconds, 1), **self.facts,
        }  # fmt: skip


IDENTITY = (
    "task",
    "mode",
    "head",
    "split",
    "metric",
    "labels",
    "seeds",
    "weights_sha256",
    "layer",
    "pool",
    "merges",
    "epochs",
)


def fingerprint_of(line: dict[str, Any]) -> str:
    """What makes two lines the same measurement."""
    return hashlib.sha256(json.dumps([line.get(key) for key in IDENTITY]).encode()).hexdigest()[:12]


def items_url(out: str, line: dict[str, Any]) -> str:
    name = f"{line['task'].replace('[', '-').replace(']', '').replace(',', '-')}-{line['mode']}-{line['head']}-{line['split']}"
    return storage.join(out, ITEMS, f"{name}-{fingerprint_of(line)}.npz")


def keep(out: str, result: Result, keys: Sequence[str], records: Sequence[Records]) -> None:
    """Writes items first, then the line: a line that stands has its items."""
    line = result.to_json()
    arrays: dict[str, np.ndarray] = {
        "keys": np.array(keys, np.str_),
        "split": np.array(result.split),
        "metric": np.array(result.metric),
    }
    for seed, one in enumerate(records):
        arrays |= {f"{seed}/{name}": values for name, values in one.arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    storage.write_atomic(items_url(out, line), buffer.getvalue())
    lines = [*read_lines(out), line]
    latest = {fingerprint_of(one): one for one in lines}
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in latest.values())
    storage.write_atomic(storage.join(out, RESULTS), text.encode())


def read_lines(out: str) -> list[dict[str, Any]]:
    """The results of a folder, oldest first; empty if there are none.

    Raises:
        UsageError: the file is damaged.
    """
    url = storage.join(out, RESULTS)
    if not storage.exists(url):
        return []
    try:
        return [json.loads(line) for line in storage.read_bytes(url).decode().splitlines() if line]
    except ValueError as error:
        raise UsageError(f"{url} is damaged ({error}); remove it and evaluate again") from None


def read_items(out: str, line: dict[str, Any]) -> tuple[list[str], list[Records]]:
    """Keys of the test items and the records of every seed.

    Raises:
        FileNotFoundError: not kept. UsageError: damaged.
    """
    url = items_url(out, line)
    data = storage.read_bytes(url)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metric, split = str(arrays.pop("metric")), str(arrays.pop("split"))
        keys = [str(key) for key in arrays.pop("keys")]
        by_seed: dict[str, dict[str, np.ndarray]] = {}
        for name, values in arrays.items():
            seed, _, what = name.partition("/")
            by_seed.setdefault(seed, {})[what] = values
        records = [Records(metric, by_seed[seed]) for seed in sorted(by_seed, key=int)]
        if split != line["split"] or any(len(one.arrays[FIRST[metric]]) != len(keys) for one in records):
            raise ValueError("it is of another split")
        return keys, records
    except Exception as error:  # numpy, zipfile and zlib each have their own for broken bytes
        raise UsageError(
            f"{url} holds no readable items ({' '.join(str(error).split())[:120]}); evaluate again"
        ) from None
