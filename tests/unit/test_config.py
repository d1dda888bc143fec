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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0123", "0123"), ("no", "no"), ("1e3", "1e3"), ("2024-01-01", "2024-01-01"), ("12:30:00", "12:30:00"), ("'null'", "null"),
        ("~", None), ("null", None), ("true", "true"), ("0x1F", "0x1F"), ("[0123]", None),
    ],
)  # fmt: skip
def test_text_is_kept_as_typed(text: str, value: str | None) -> None:
    if text == "[0123]":
        with pytest.raises(UsageError, match=r"run\.name"):
            load(f"run.name={text}")
    else:
        assert load(f"run.name={text}").run.name == value


def test_booleans_and_numbers_are_those_of_yaml_1_2() -> None:
    for word in ("yes", "no", "on", "off", "y"):
        with pytest.raises(UsageError, match="true or false"):
            load(f"data.verify_checksums={word}")
    assert load("data.verify_checksums=false").data.verify_checksums is False
    assert load("train.steps=0123").train.steps == 123
    assert load("engine.extra={a: [1e-3, yes, 0o17, .5, 12:30]}").engine.extra == {
        "a": [0.001, "yes", 15, 0.5, "12:30"]
    }
    for wrong in ("1_000", "1:30", "12.5", "1e3"):
        with pytest.raises(UsageError, match="whole number"):
            load(f"train.steps={wrong}")


def test_an_empty_section_takes_its_keys(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\nrun: ~\n")
    assert config.load(PretrainConfig, str(path), ["train.steps=5"]).train.steps == 5
    assert config.load(PretrainConfig, str(path)) == load()


def test_a_key_that_stands_twice_is_named(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(UsageError, match="line 3: key steps stands twice"):
        config.load(PretrainConfig, str(path))


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=-1", "train.steps=0", "train.batch=0", "train.micro_batch=0", "train.log_every=0", "train.stall_timeout_s=0",
        "train.seed=-1", "data.error_budget=7", "data.error_budget=-0.1", "data.max_cloud=2", "data.cache_gb=0", "data.timeout_s=-1",
        "data.views_global.hr_px=0", "data.views_local.s2_dates=-1", "optimizer.lr=-1", "optimizer.betas=[0.9, 1.5]", "optimizer.eps=0",
        "optimizer.clip=-1", "optimizer.warmup=-1", "parallel.zero_stage=4", "parallel.ep=0", "checkpoint.every=-1",
        "checkpoint.keep_last=0", "probe.every=-1", "probe.samples=0",
    ],
)  # fmt: skip
def test_numbers_outside_their_range_are_named(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=key.rpartition(".")[2]) as error:
        load(override)
    assert key.split(".")[0] in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "nan", "1e999"])
def test_no_number_is_infinite(value: str) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.lr.*finite"):
        load(f"optimizer.lr={value}")


@given(st.text(max_size=40))
def test_any_text_as_an_override_is_a_value_or_one_line(text: str) -> None:
    message = ""
    try:
        load(f"run.name={text}")
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
