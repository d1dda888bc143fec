"""Saving and loading a run's state: ours (blocked time and total), torch.save of the same tensors, DeepSpeed's own form."""

from __future__ import annotations

import argparse
import time
from typing import Any

REPEATS = 3  # saves after the first one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a run; its model decides the size")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--url", help="where to write (any fsspec URL); default: a temporary folder")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    import tempfile
    from dataclasses import replace

    import torch

    from pipeline.parallel.processes import choose_accelerator

    choose_accelerator()
    from cluster import storage
    from cluster.cli import print_json
    from cluster.config import load
    from cluster.ranks import Ranks
    from data_prep.schema import MODALITIES
    from model.losses.reduce import SingleProcess
    from pipeline.checkpoint import Saver, open_checkpoint, restore
    from pipeline.checkpoint.load import open_files
    from pipeline.checkpoint.save import snapshot
    from pipeline.config import PretrainConfig
    from pipeline.engine import Engine
    from pipeline.first_weights import first_networks
    from pipeline.launch import free_port
    from pipeline.parallel.layout import Layout
    from pipeline.parallel.processes import finish, start

    config = load(PretrainConfig, args.config, args.overrides)
    config = replace(config, parallel=replace(config.parallel, ep=1))
    ranks = Ranks(port=free_port())
    device = start(ranks, 600.0)
    statistics = {n: {"mean": [0.0] * len(m.bands), "std": [1.0] * len(m.bands)} for n, m in MODALITIES.items()}
    layout = Layout.of(config, ranks)
    student, teacher = first_networks(config, layout, statistics, [], device)
    engine = Engine(student, teacher, config, layout, device, SingleProcess())
    with tempfile.TemporaryDirectory(prefix="geoloom-bench-") as folder:
        url = storage.join(args.url or folder, "bench-checkpoints")
        saver = Saver(url, config.checkpoint, 0, 1, lambda: None)
        figures: dict[str, dict[str, float]] = {}

        began = time.perf_counter()
        saver.save(engine, 1, 1, {"config": {}})
        blocked = time.perf_counter() - began
        saver.wait()
        total = time.perf_counter() - began
        began = time.perf_counter()
        checkpoint = open_checkpoint(storage.join(url, "step-00000001"))
        with open_files(checkpoint) as files:
            restore(engine, checkpoint, files)
        size = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
        figures["geoloom"] = _figures(blocked, total, time.perf_counter() - began, size)
        fresh, again = [], []
        for step in range(2, 2 + REPEATS):  # in turns: what else runs here weighs on both
            began = time.perf_counter()
            tensors, _ = snapshot(engine, 0)
            fresh.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.save(engine, step, step, {"config": {}})
            again.append(time.perf_counter() - began)
            saver.wait()
        figures["geoloom"] |= {"blocked_again_s": min(again), "blocked_fresh_memory_s": min(fresh)}

        path = f"{folder}/plain.pt"
        began = time.perf_counter()
        torch.save(tensors, path)
        total = time.perf_counter() - began
        began = time.perf_counter()
        torch.load(path, weights_only=True)
        figures["torch_save"] = _figures(total, total, time.perf_counter() - began, size)

        began = time.perf_counter()
        engine.deepspeed.save_checkpoint(f"{folder}/deepspeed", tag="1", save_latest=False)
        total = time.perf_counter() - began
        began = time.perf_counter()
        engine.deepspeed.load_checkpoint(f"{folder}/deepspeed", tag="1")
        figures["deepspeed"] = _figures(total, total, time.perf_counter() - began, size)
        storage.remove(url, recursive=True)
    for name, row in figures.items():
        print(f"{name:<12}" + "".join(f"{key} {value:<12.3f}" for key, value in row.items()))
    print(
        "blocked: how long training stands still; fresh_memory: the same copy into memory that no save has used before"
    )
    print("geoloom and torch_save hold the teacher too, geoloom with checksums; deepspeed holds the student only")
    if args.json:
        print_json({"checkpoint": figures})
    finish()


def _figures(blocked_s: float, total_s: float, load_s: float, size_bytes: int) -> dict[str, Any]:
    return {
        "blocked_s": blocked_s, "save_s": total_s, "load_s": load_s, "mb": size_bytes / 1e6,
        "save_mb_per_s": size_bytes / 1e6 / total_s, "load_mb_per_s": size_bytes / 1e6 / load_s,
    }  # fmt: skip
