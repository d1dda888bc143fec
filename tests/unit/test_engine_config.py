"""DeepSpeed's settings: one pure function; free settings may add, never contradict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import from_dict
from cluster.errors import UsageError
from cluster.ranks import Ranks
from pipeline.config import EngineConfig, PretrainConfig
from pipeline.engine import deepspeed_config
from pipeline.parallel.layout import Layout

CONFIG = from_dict(PretrainConfig, {"train": {"batch": 16, "micro_batch": 4, "precision": "bf16"}})


def settings(config: PretrainConfig) -> dict:
    return deepspeed_config(config, Layout.of(config, Ranks(world=2)))


def test_batch_figures_agree() -> None:
    found = settings(CONFIG)
    assert found["train_batch_size"] == 16
    assert found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * 2 == 16
    assert found["bf16"]["enabled"]
    assert found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["communication_data_type"] == "fp32"  # else the sum over ranks is bfloat16's
    narrow = replace(CONFIG, parallel=replace(CONFIG.parallel, reduce="bf16"))
    assert settings(narrow)["communication_data_type"] == "bf16"


def test_extra_is_merged_last_and_refuses_collisions() -> None:
    extra = {"comms_logger": {"enabled": True}, "zero_optimization": {"round_robin_gradients": False}}
    found = settings(replace(CONFIG, engine=EngineConfig(extra=extra)))
    assert found["comms_logger"] == {"enabled": True}
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["round_robin_gradients"] is False
    with pytest.raises(UsageError, match=r"engine\.extra\.zero_optimization\.stage collides"):
        settings(replace(CONFIG, engine=EngineConfig(extra={"zero_optimization": {"stage": 3}})))


def test_zero_0_leaves_clipping_to_us() -> None:
    config = from_dict(PretrainConfig, {"train": {"batch": 2, "precision": "fp32"}, "parallel": {"zero_stage": 0}})
    assert settings(config)["gradient_clipping"] == 0.0
    assert settings(CONFIG)["gradient_clipping"] == CONFIG.optimizer.clip
