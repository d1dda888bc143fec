"""Config files that build on others, their schema for editors, and what `--explain` says of a key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.config import flatten, layers, load, to_dict
from cluster.errors import UsageError
from cluster.schema import describe, explain, json_schema
from data_prep.config import BuildConfig
from model.config import ObjectiveConfig
from pipeline.commands.schema import schema_text
from pipeline.config import PretrainConfig
from tests.data_folder import REPOSITORY

RUNS = {"train": REPOSITORY / "pipeline/runs", "build": REPOSITORY / "data_prep/runs"}
CLASSES = {"train": PretrainConfig, "build": BuildConfig}


def differing(a: str, b: str) -> dict[str, tuple]:
    first, second = (flatten(to_dict(load(PretrainConfig, str(RUNS["train"] / f"{name}.yaml")))) for name in (a, b))
    return {key: (first[key], second[key]) for key in first if first[key] != second[key] and not key.startswith("run.")}


def test_the_dense_configs_are_their_base_but_for_the_experts() -> None:
    assert differing("demo", "demo_dense") == {"model.moe.experts": (4, 0), "parallel.ep": (2, 1)}
    assert differing("skysense_v2", "skysense_v2_dense") == {"model.moe.experts": (8, 0)}


def test_sections_are_merged_and_lists_replaced(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text(
        "train: {steps: 3, batch: 8}\nmodel: {modalities: [hr, s2], merge: {hr: [true, true, true]}}\n"
    )
    (tmp_path / "mid.yaml").write_text("base: low.yaml\ntrain: {steps: 4}\n")
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("base: ../mid.yaml\nmodel: {modalities: [s1], merge: {s1: [true, false, false]}}\n")
    config = load(PretrainConfig, str(top), ["train.seed=5"])
    assert (config.train.steps, config.train.batch, config.train.seed) == (4, 8, 5)
    assert config.model.modalities == ("s1",)
    assert config.model.merge == {"hr": (True, True, True), "s1": (True, False, False)}
    assert [Path(file).name for file, _ in layers(str(top))] == ["low.yaml", "mid.yaml", "top.yaml"]


@pytest.mark.parametrize(
    ("text", "why"),
    [("base: top.yaml", "based on itself"), ("base: none.yaml", "none.yaml does not exist"), ("base: [a]", "base must be the name"),
     ("base: bad.yaml", "base bad.yaml.*train.stpes")],
)  # fmt: skip
def test_a_bad_base_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "top.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text("train: {stpes: 1}")
    with pytest.raises(UsageError, match=why) as error:
        load(PretrainConfig, str(tmp_path / "top.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["train", "build"])
def test_the_shipped_schema_is_the_code_s_and_every_config_names_it(which: str) -> None:
    assert (RUNS[which] / "schema.json").read_text() == schema_text(which), "run make schema"
    for path in sorted(RUNS[which].glob("*.yaml")):
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path.name
        for file, _ in layers(str(path)):
            assert not misfits(yaml.safe_load(Path(file).read_text()), json_schema(CLASSES[which], "")), file


def misfits(value: object, schema: dict, where: str = "") -> list[str]:
    """What of a YAML tree an editor would underline: the part of draft 7 that `json_schema` writes."""
    if "anyOf" in schema:
        tried = [misfits(value, option, where) for option in schema["anyOf"]]
        return min(tried, key=len)
    if "enum" in schema:
        return [] if value in schema["enum"] else [where]
    kinds = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return [where]
    if kind == "array" and isinstance(schema["items"], list):
        assert isinstance(value, list)
        return [where] * (len(value) != schema["minItems"]) + [
            w for v, s in zip(value, schema["items"]) for w in misfits(v, s, where)
        ]
    if kind == "array":
        return [w for v in value for w in misfits(v, schema["items"], where)]  # type: ignore[attr-defined]
    if kind == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        found = []
        for key, inner in value.items():  # type: ignore[attr-defined]
            rule = known.get(key, more)
            found += [f"{where}.{key}"] if rule is False else misfits(inner, rule, f"{where}.{key}")
        return found
    return []


def test_the_schema_refuses_what_load_refuses() -> None:
    schema = json_schema(PretrainConfig, "")
    wrong = {
        "train": {"stpes": 1, "seed": True, "precision": "fp8"},
        "data": {"scale": [1.0]},
        "model": {"merge": {"hr": [1]}},
    }
    assert set(misfits(wrong, schema)) == {
        ".train.stpes",
        ".train.seed",
        ".train.precision",
        ".data.scale",
        ".model.merge.hr",
    }
    assert misfits(json.loads(json.dumps(to_dict(PretrainConfig()))), schema) == []


def test_explain_says_what_a_key_is_and_where_its_value_comes_from(tmp_path: Path) -> None:
    path = str(RUNS["train"] / "demo_dense.yaml")
    told = explain(PretrainConfig, path, [], "model.moe.experts")
    for wanted in ("whole number", "0 = dense", "default: 8", "here: 0, from", "demo_dense.yaml"):
        assert wanted in told
    steps = yaml.safe_load((RUNS["train"] / "demo.yaml").read_text())["train"]["steps"]
    assert f"here: {steps}, from" in (told := explain(PretrainConfig, path, [], "train.steps"))
    assert told.endswith("demo.yaml")
    assert "here: 7, from override train.steps=7" in explain(PretrainConfig, path, ["train.steps=7"], "train.steps")
    assert explain(PretrainConfig, path, [], "train.stall_timeout_s").endswith("from the default")
    assert "  parallel.ep = 1" in explain(PretrainConfig, path, [], "parallel")
    for key, near in (("train.step", "train.steps"), ("train.steps.x", "no section"), ("trian", "train")):
        with pytest.raises(UsageError, match=near):
            explain(PretrainConfig, path, [], key)


def test_every_term_of_the_objective_has_words() -> None:
    silent = [name for name in ObjectiveConfig.__dataclass_fields__ if not describe(ObjectiveConfig, name)]
    assert [name for name in silent if name.endswith("_weight") or name.startswith("hide_")] == []
