"""Ablations: every variant is a valid config that differs from the base in its own keys; seeds, grids, budgets, the array script."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from cluster.config import flatten, load, to_dict
from cluster.errors import UsageError
from cluster.rundir import RunDir
from pipeline.ablate import Budget, PlannedRun, hours_left, is_finished, plan, plan_tree, read_plan
from pipeline.commands import ablate
from pipeline.config import PretrainConfig
from pipeline.tracking import RunFacts
from pipeline.tracking.mirror import set_status, write_record
from pipeline.variants import read_list, shipped, split_values
from tests.data_folder import REPOSITORY

SHIPPED = ("tiny", "skysense_v2")
# what the paper varied (arXiv 2507.13812), and the one key that does it here
KEYS = {
    "experts": "model.moe.experts", "placement": "model.moe.placement", "prompts": "model.prompts",
    "attention": "model.attention", "qsacl": "objective.qsacl_weight", "ita": "objective.ita_weight",
    "unified": "model.separate",
}  # fmt: skip


EMBEDDINGS = "objective.ita_embeddings=pipeline/runs/text_embeddings.safetensors"


def changes(base: PretrainConfig, other: PretrainConfig) -> set[str]:
    a, b = flatten(to_dict(base)), flatten(to_dict(other))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and not key.startswith("run.")}


@pytest.mark.parametrize("config", SHIPPED)
@pytest.mark.parametrize("name", KEYS)
def test_each_variant_changes_its_key_and_no_other(config: str, name: str) -> None:
    path = str(REPOSITORY / "pipeline" / "runs" / f"{config}.yaml")
    base, *variants = plan(path, ["run.dir=out", EMBEDDINGS], [name]).runs
    assert variants
    for run in variants:
        assert changes(base.config, run.config) == {KEYS[name]}
        assert run.config.run.dir == f"out/{run.variant}/seed-0"
    loaded = load(PretrainConfig, path, ["run.dir=out", EMBEDDINGS])
    assert changes(base.config, loaded) == set()


def test_all_together_have_folders_of_their_own() -> None:
    path = str(REPOSITORY / "pipeline/runs/tiny.yaml")
    own = ["model.window=4", "model.patch=2"]
    claims = read_list("claims").variants
    assert set(KEYS) == {variant.group for variant in claims}
    planned = plan(path, ["run.dir=out"], list(KEYS), own, seeds=2)
    names = [run.variant for run in planned.runs]
    assert len({run.config.run.dir for run in planned.runs}) == len(names) == 2 * (1 + len(claims) - 2 + 2)
    assert planned.left_out == ("experts_8", "no_ita")  # the base has 8 experts, and no embeddings to align with
    assert names[: len(names) // 2] == names[len(names) // 2 :]  # a whole round of one seed, then the next
    assert [run.config.train.seed for run in planned.runs] == [0] * (len(names) // 2) + [1] * (len(names) // 2)
    assert names[-2:] == ["window_4", "patch_2"]
    assert [run.name for run in plan(path, ["run.dir=out"], [], own).runs] == [
        "base/seed-0",
        "window_4/seed-0",
        "patch_2/seed-0",
    ]
    assert set(planned.claims) == {variant.name for variant in claims} - set(planned.left_out)


def test_a_grid_is_every_combination_and_its_first_values_are_the_base() -> None:
    path = str(REPOSITORY / "pipeline/runs/tiny.yaml")
    grid = ["model.prompts=4,0", "model.moe.experts=8,4", "data.scale=[0.5,1.0]", "run.dir=out"]
    runs = plan(path, grid, seeds=1).runs
    assert [run.variant for run in runs] == ["base", "experts_4", "prompts_0", "prompts_0-experts_4"]
    assert changes(runs[0].config, runs[3].config) == {"model.prompts", "model.moe.experts"}
    assert {run.config.data.scale for run in runs} == {(0.5, 1.0)}
    with pytest.raises(UsageError, match="stands twice"):
        plan(path, ["model.prompts=4,4"])


@pytest.mark.parametrize(
    ("text", "values"),
    [("1", ["1"]), ("", [""]), ("[1,2]", ["[1,2]"]), ("[1,2], [3]", ["[1,2]", "[3]"]), ("'a,b',c", ["'a,b'", "c"]),
     ("{a: 1, b: 2}", ["{a: 1, b: 2}"])],
)  # fmt: skip
def test_only_commas_outside_brackets_part_values(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_the_terms_are_ablated_by_name_and_against_what_they_are_a_part_of() -> None:
    planned = plan(str(REPOSITORY / "tests/runs/small.yaml"), ["run.dir=out"], variants="terms", seeds=1)
    configs = {run.variant: run.config for run in planned.runs}
    assert set(configs) == {"base", *(variant.name for variant in read_list("terms").variants)}
    assert changes(configs["base"], configs["cross"]) == {"objective.cross_weight"}
    assert changes(configs["all"], configs["all_minus_qsacl"]) == {"objective.qsacl_weight"}
    assert planned.references["all_minus_mgcl"] == "all"
    assert planned.references["cross"] == "base"
    every = {key for config in configs.values() for key in changes(configs["base"], config)}
    assert {"objective.restore_weight", "objective.masked_weight", "objective.modality_dropout"} <= every
    few = plan(str(REPOSITORY / "tests/runs/small.yaml"), ["run.dir=out"], ["all_minus_ita"], variants="terms")
    assert [run.variant for run in few.runs] == ["base", "all", "all_minus_ita"]  # with what it is held against


@pytest.mark.parametrize(
    ("text", "why"),
    [("variants: {}", "at least one name"), ("x: 1\nvariants: {a: {set: {}}}", "unknown key x"), ("variants: {a: 1}", "variants.a must be"),
     ("variants: {a/b: {set: {}}}", "a name has letters"), ("variants: {a: {set: {}, against: b}}", "there is no b"), ("[", "as YAML")],
)  # fmt: skip
def test_a_list_that_is_none_is_told_by_file_and_key(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=why) as error:
        read_list(str(path))
    assert str(path) in str(error.value)
    assert shipped() == ["claims", "terms"]


def test_a_budget_lets_no_run_begin_that_would_pass_it(tmp_path: Path) -> None:
    def run(name: str) -> PlannedRun:
        words = [f"run.dir={tmp_path}/{name}", "train.steps=10", "train.batch=8"]
        return PlannedRun(name, load(PretrainConfig, None, words))

    done, half, new = (run(name) for name in ("done", "half", "new"))
    for planned, steps in ((done, 10), (half, 5)):
        rundir = RunDir(planned.config.run.dir)
        rundir.append_metrics({"step": steps, "samples": 8 * steps, "gpu_hours": 2 * 0.1 * steps})
        rundir.close()
        write_record(rundir, "test", planned.variant, RunFacts(2, "two"))
    runs = (done, half, new)
    assert Budget.parse("160").allows(runs, half)  # 120 seen, 40 to come
    assert not Budget.parse("159samples").allows(runs, half)
    assert not Budget.parse("160").allows(runs, new)
    assert Budget.parse("2.1h").allows(runs, half)  # 1.5 hours of two ranks so far
    assert not Budget.parse("1.9h").allows(runs, half)
    assert Budget.parse("0.001h").allows((new,), new)  # nobody knows yet what it costs
    assert hours_left(runs) == pytest.approx(1.5)  # 120 of 240 samples took as long
    assert hours_left((new,)) is None
    for text in ("0", "4d", "-1", "h"):
        with pytest.raises(UsageError, match="--budget"):
            Budget.parse(text)


def test_a_layout_that_one_run_forbids_is_told_before_any_starts(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    args = parser.parse_args([str(REPOSITORY / "tests/runs/small.yaml"), f"run.dir={tmp_path}/runs", "--set",
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
    with pytest.raises(UsageError, match="known ones are attention"):
        plan(path, [], ["colour"])
    with pytest.raises(UsageError, match="shipped are claims, terms"):
        plan(path, [], variants="colour")
    with pytest.raises(UsageError, match="no variant differs"):
        plan(path, [], [], ["model.size=tiny"])
    with pytest.raises(UsageError, match="prompts"):
        plan(path, [], [], ["model.prompts=-1"])
    with pytest.raises(UsageError, match="what --seeds N does"):
        plan(path, [], [], ["train.seed=1"])
    with pytest.raises(UsageError, match="called prompts_0"):
        plan(path, ["model.prompts=4,0"], [], ["model.prompts=0"])
    with pytest.raises(UsageError, match="--seeds 0"):
        plan(path, [], seeds=0)


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    return parser.parse_intermixed_args([str(REPOSITORY / "pipeline/runs/tiny.yaml"), *words])


def test_slurm_dry_run_shows_one_task_per_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (f"run.dir={tmp_path}/runs", "model.prompts=4,0", "--seeds", "3", "--slurm", "--gpus-per-node", "8")
    assert ablate.main(asked(*words, "--parallel", "2", "--time", "60", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-5%2\n" in text
    assert "#SBATCH --ntasks-per-node=8\n" in text
    assert "#SBATCH --time=60\n" in text
    assert f"{tmp_path}/runs/prompts_0/seed-2/logs)" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--slurm", "--budget", "4h"), "--budget"), (("--slurm", "--processes", "2"), "--processes"),
     (("--parallel", "2"), "--slurm"), (("--slurm", "--parallel", "0"), "--parallel"),
     (("--slurm", "run.dir=memory://x"), "memory of one process"), (("--slurm", "--nodes", "0"), "--nodes")],
)  # fmt: skip
def test_what_does_not_go_with_an_array_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ablate.main(asked(f"run.dir={tmp_path}/runs", "model.prompts=4,0", *words))


def test_a_kept_plan_names_the_same_runs(tmp_path: Path) -> None:
    planned = plan(str(REPOSITORY / "pipeline/runs/tiny.yaml"), ["run.dir=out"], ["experts"], seeds=2)
    kept = tmp_path / "plan.json"
    kept.write_text(json.dumps(plan_tree(planned)))
    assert read_plan(str(kept)) == planned
    args = asked("--compare")
    args.config, args.seeds = str(kept), 2
    with pytest.raises(UsageError, match="says what the runs are"):
        ablate.main(args)
    kept.write_text("{}")
    with pytest.raises(UsageError, match="is no plan"):
        read_plan(str(kept))
