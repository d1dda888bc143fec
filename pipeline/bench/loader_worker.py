"""One loader in a process of its own: `python -m pipeline.bench.loader_worker JSON`. Started by `pipeline.bench.loader`.

Talks in lines: prints `ready {…}` after the first batch, waits for a line, delivers the asked number of samples, prints
`done {…}`, waits again. The parent looks at the CPU time and memory of the process tree in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.bench import loader_rivals as rivals


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rivals.packages_on_path(spec["packages"])
    name, data, folder, batch = spec["loader"], spec["data"], spec["folder"], spec["batch"]
    if spec["mode"] == "prepare":
        os.makedirs(folder, exist_ok=True)
        rivals.PREPARE[name](data, folder)
    elif spec["mode"] == "coverage":
        keys = Counter(
            key for found, _ in rivals.OPEN[name](data, folder, batch, spec["workers"], False) for key in found
        )
        wanted = {sample["__key__"] for sample in rivals.TarStream(rivals.tars(data))}
        _say("done", {"exactly_once": dict(keys) == dict.fromkeys(wanted, 1), "delivered": sum(keys.values())})
    elif spec["mode"] == "resume":
        _say("done", rivals.resumed(name, data, folder, batch))
    else:
        _measure(spec)
    sys.stdout.flush()
    os._exit(0)  # rivals' worker processes and threads are not waited for: they may hang at exit


def _measure(spec: dict[str, Any]) -> None:
    began = time.perf_counter()
    if spec["loader"] == "views":
        stream = _views(spec)
    else:
        stream = rivals.OPEN[spec["loader"]](spec["data"], spec["folder"], spec["batch"], spec["workers"], True)
    keys, arrays = next(stream)
    _say(
        "ready",
        {"first_batch_s": time.perf_counter() - began, "bytes": sum(a.nbytes for a in arrays.values()) / len(keys)},
    )
    sys.stdin.readline()
    began, samples, touched = time.perf_counter(), 0, 0
    while samples < spec["samples"]:
        keys, arrays = next(stream)
        samples += len(keys)
        touched += sum(float(array.reshape(-1)[-1]) for array in arrays.values()) > 0
    _say("done", {"samples": samples, "wall_s": time.perf_counter() - began})
    sys.stdin.readline()


def _views(spec: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """Pretraining batches (u, v, local views) without end. interleave: 1 makes ranges as long as `data.range_mb` allows."""
    from model.config import ModelConfig
    from pipeline.config import DataConfig
    from pipeline.reader.reader import Reader

    data = DataConfig(url=spec["data"], split="", threads=spec["workers"], interleave=spec["interleave"])
    with Reader(
        data, ModelConfig(modalities=tuple(spec["modalities"])), seed=0, batch_per_rank=spec["batch"]
    ) as reader:
        for batch in reader:
            yield batch.keys, {name: view.x_BTCHW for name, view in batch.u.modalities.items()}


def _say(word: str, facts: dict[str, Any]) -> None:
    print(word, json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
