"""The strict config tree: round trips, full-path errors with the nearest key, overrides win over files."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config
from cluster.errors import UsageError
from model.config import MoEConfig
from pipeline.config import PretrainConfig


def load(*overrides: str) -> PretrainConfig:
    return config.load(PretrainConfig, None, overrides)


def test_round_trip_is_equal_and_keeps_the_fingerprint() -> None:
    tree = load("train.steps=7", "model.merge={hr: [true, false, true]}", "optimizer.lr_scale={backbone: 0.5}")
    again = config.from_dict(PretrainConfig, config.to_dict(tree))
    assert again == tree
    assert config.fingerprint(again) == config.fingerprint(tree)
    assert config.fingerprint(load("train.steps=8")) != config.fingerprint(load("train.steps=7"))


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("model.moe.expert=4", ["model.moe.expert", "model.moe.experts"]),
        ("trian.steps=4", ["trian", "train"]),
        ("train.steps=many", ["train.steps", "whole number", "many"]),
        ("train.steps=true", ["train.steps", "whole number"]),
        ("train.precision=fp8", ["train.precision", "fp32"]),
        ("data.scale=[1.0]", ["data.scale", "list of 2"]),
        ("optimizer.lr=nan", ["optimizer.lr", "finite"]),
        ("model.modalities=[hr, s3]", ["model", "s3"]),
        ("train=3", ["train", "section"]),
        ("train.steps", ["key.path=value"]),
    ],
)
def test_errors_name_the_full_path_and_the_fix(override: str, names: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load(override)
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_in_yaml_scientific_notation_is_a_number() -> None:
    assert load("optimizer.lr=1e-4").optimizer.lr == 1e-4


def test_overrides_win_over_the_file(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3, batch: 8}\n")
    tree = config.load(PretrainConfig, str(path), ["train.steps=5"])
    assert (tree.train.steps, tree.train.batch) == (5, 8)


@pytest.mark.parametrize(
    ("text", "why"), [("train: [", "not valid YAML"), ("- 1", "mapping"), (None, "does not exist")]
)
def test_bad_files_are_one_line_errors(tmp_path, text: str | None, why: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=why):
        config.load(PretrainConfig, str(path))


@given(st.sampled_from([0, 2, 8, 512]), st.integers(1, 8), st.sampled_from(["last_n", "uniform"]), st.floats(0, 1))
def test_any_valid_tree_round_trips(experts: int, top_k: int, placement: str, weight: float) -> None:
    moe = MoEConfig(experts=experts, top_k=min(top_k, max(experts, 1)), placement=placement, balance_weight=weight)
    assert config.from_dict(MoEConfig, config.to_dict(moe)) == moe


def test_config_modules_import_no_torch() -> None:
    probe = "import sys, pipeline.config, model.config, data_prep.schema, cluster.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
