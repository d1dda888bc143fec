"""Inside the ranks of a job: one row watched by a network whose weights all ranks draw alike."""

from __future__ import annotations

from typing import Any

from cluster.config import load
from pipeline.config import PretrainConfig
from pipeline.evaluate.in_loop import describe_items, plan_watched, watch
from pipeline.probes.features import network
from tests.unit.test_evaluate_run import STATISTICS, tiny_model


def watch_row(argument: dict[str, Any]) -> dict[str, Any]:
    """Scores, and the fused features of every image in order. The ranks have met already."""
    cfg = load(PretrainConfig, None, argument["overrides"])
    (watched,) = plan_watched(cfg)
    model = tiny_model()
    (features,) = describe_items([network(model.skysense)], model, watched, "cpu")
    figures = watch(model.skysense, cfg, watched, STATISTICS)
    return {
        "keys": [item.key for item in watched.items], "fused": features.pooled["fused"].tolist(),
        "figures": {key: value for key, value in figures.items() if not key.endswith("/seconds")},
    }  # fmt: skip
