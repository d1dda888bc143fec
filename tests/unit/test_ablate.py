"""Ablations: every variant is a valid config that differs from the base in exactly its own key; the array script makes them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import flatten, load, to_dict
from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.ablate import ABLATIONS, array_script, is_finished, plan
from pipeline.commands import ablate
from pipeline.config import PretrainConfig
from pipeline.tracking import RunFacts
from pipeline.tracking.mirror import set_status, write_record
from tests.data_folder import REPOSITORY

SHIPPED = ("tiny", "skysense_v2")
# what the paper varied (method.md section 5), and the one key that does it here
KEYS = {
    "experts": "model.moe.experts", "placement": "model.moe.placement", "prompts": "model.prompts",
    "attention": "model.attention", "qsacl": "objective.qsacl_weight", "ita": "objective.ita_weight",
    "unified": "model.separate",
}  # fmt: skip


def changes(base: PretrainConfig, other: PretrainConfig) -> set[str]:
    a, b = flatten(to_dict(base)), flatten(to_dict(other))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and not key.startswith("run.")}


@pytest.mark.parametrize("config", SHIPPED)
@pytest.mark.parametrize("name", KEYS)
def test_each_variant_changes_its_key_and_no_other(config: str, name: str) -> None:
    path = str(REPOSITORY / "pipeline" / "runs" / f"{config}.yaml")
    (_, base), *variants = plan(path, ["run.dir=out"], [name], [])
    assert variants
    for variant_name, variant in variants:
        assert changes(base, variant) == {KEYS[name]}
        assert variant.run.dir == f"out/{variant_name}"
    loaded = load(PretrainConfig, path, ["run.dir=out"])
    assert changes(base, loaded) == set()


def test_all_together_have_folders_of_their_own() -> None:
    path = str(REPOSITORY / "pipeline/runs/tiny.yaml")
    own = ["model.window=4", "train.seed=1"]
    assert set(KEYS) == set(ABLATIONS)
    runs = plan(path, ["run.dir=out"], list(ABLATIONS), own)
    variants = sum(len(ablation.variants) for ablation in ABLATIONS.values())
    assert len({config.run.dir for _, config in runs}) == len(runs) == 1 + (variants - 1) + 2  # 8 experts are the base
    assert [name for name, _ in runs][-2:] == ["window_4", "seed_1"]
    assert [name for name, _ in plan(path, ["run.dir=out"], [], own)] == ["base", "window_4", "seed_1"]


def test_a_layout_that_one_run_forbids_is_told_before_any_starts(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    args = parser.parse_args([str(REPOSITORY / "pipeline/runs/demo.yaml"), f"run.dir={tmp_path}/runs", "--set",
                              "model.moe.experts=0", "--processes", "2"])  # fmt: skip
    with pytest.raises(UsageError, match="needs experts"):
        ablate.main(args)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_finished_when_it_said_so_after_its_last_step(tmp_path: Path) -> None:
    config = load(PretrainConfig, None, [f"run.dir={tmp_path}/run", "train.steps=2"])
    rundir = RunDir(config.run.dir)
    assert not is_finished(config)
    rundir.write_resolved(config)
    write_record(rundir, "test", "a run", RunFacts())
    rundir.append_metrics({"step": 1, "samples": 8})
    set_status(rundir, "FINISHED")
    assert not is_finished(config)  # it was shorter then
    rundir.append_metrics({"step": 2, "samples": 16})
    rundir.close()
    set_status(rundir, "RUNNING")
    assert not is_finished(config)  # its last checkpoint may not be there yet
    set_status(rundir, "FINISHED")
    assert is_finished(config)
    assert not is_finished(load(PretrainConfig, None, [f"run.dir={tmp_path}/run", "train.steps=2", "model.prompts=0"]))


def test_what_is_no_ablation_is_refused() -> None:
    path = str(REPOSITORY / "pipeline/runs/tiny.yaml")
    with pytest.raises(UsageError, match="known ones are experts"):
        plan(path, [], ["colour"], [])
    with pytest.raises(UsageError, match="no variant differs"):
        plan(path, [], [], ["model.size=tiny"])
    with pytest.raises(UsageError, match="prompts"):
        plan(path, [], [], ["model.prompts=-1"])


def test_the_array_script_hands_each_task_its_number_and_all_words_unchanged(tmp_path: Path) -> None:
    words = ["a b.yaml", "run.dir=$(touch PWNED)", "--set", "model.prompts='0'", "--only", "experts"]
    script = tmp_path / "ablate.sh"
    text = array_script(words, 3, "runs of mine").replace(f"PYTHON={sys.executable}", f"PYTHON={tmp_path}/python")
    script.write_text(text)
    assert "#SBATCH --array=0-2\n" in text
    assert "#SBATCH --job-name=geoloom-ablate-runs-of-mine\n" in text
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)], env={"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, check=True,
        timeout=20, text=True,
    )  # fmt: skip
    assert done.stdout.split("\0")[:-1] == ["-m", "pipeline", "ablate", *words, "--task", "2", "--tasks", "3"]
    assert not list(tmp_path.glob("PWNED"))


def test_the_command_prints_a_script_that_asks_for_the_same_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    typed = [str(REPOSITORY / "pipeline/runs/tiny.yaml"), f"run.dir={tmp_path}/runs", "--only", "experts", "ita",
             "--set", "train.seed=1", "--processes", "2"]  # fmt: skip
    args = parser.parse_args([*typed, "--array-script"])
    assert ablate.main(args) == 0
    text = capsys.readouterr().out
    [line] = [line for line in text.splitlines() if line.startswith("ARGUMENTS=(")]
    words = line.removeprefix("ARGUMENTS=(").removesuffix(")").split()
    again = parser.parse_args(words)
    for name in ("config", "overrides", "only", "set", "processes"):
        assert getattr(again, name) == getattr(args, name)
    assert f"#SBATCH --array=0-{len(plan(args.config, args.overrides, args.only, args.set)) - 1}\n" in text
    assert not (tmp_path / "runs").exists()
