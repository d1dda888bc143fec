"""Inside the ranks of a job: train a few steps, save, and note the features the teacher gives in the engine."""

from __future__ import annotations

from typing import Any

import torch

import pipeline.train
from cluster.config import load
from cluster.ranks import Ranks
from data_prep.shards import ShardSet
from model.inputs import normalise
from pipeline.config import PretrainConfig
from pipeline.probes.in_loop import run_probes, statistics_dict
from pipeline.probes.sites import view_of_sites
from pipeline.stop import StopFlag


def train_and_feel(argument: dict[str, Any]) -> dict[str, Any]:
    """Fused features of the set's first two sites, and probe figures, as the engine's own teacher gives them."""
    config = load(PretrainConfig, argument["config"], argument["overrides"])
    pipeline.train.start = lambda ranks, timeout_s: torch.device("cpu")  # the ranks of this job have met already
    run = pipeline.train.build(config, Ranks.from_environment(), "never")
    pipeline.train.loop(run, StopFlag())
    shardset = ShardSet.open(argument["shards"])
    skysense = run.engine.teacher.module.skysense
    raw = view_of_sites(
        [shardset.read_sample(row) for row in (0, 1)], config.data.views_global, config.model.modalities
    )
    with torch.no_grad():
        fused = skysense(normalise(raw, statistics_dict(shardset))).fused
    figures = run_probes(skysense, config, shardset)
    pipeline.train.close(run, "FINISHED")
    return {"fused": fused.tolist(), "probes": {key: value for key, value in figures.items() if key != "probe/seconds"}}
